"""Stable Diffusion 3 and 3.5 (Esser et al. 2024). This file holds everything that is true of this family alone."""

from dataclasses import replace

from ..errors import Error
from ..models.sd3 import Config
from ..request import Request
from .base import Beside, Careful, Defaults, Family, Model, TextPlan
from .published import ATTENTION, CLIP_G, CLIP_L, CLIP_STORYBOOK, FLOW, T5_XXL, VAE_FLOW, VAE_STORYBOOK, hyper

_PREVIEW = (
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


def _activations(net: Config, latents: int, tokens: int, gpu: bool) -> float:
    """Measured numbers per token and width: see `memory`. Dual attention holds a second set of q, k and v."""
    return (36 if net.dual else 25.5) * net.heads * net.head_dim * (latents // net.patch**2 + tokens)


def _check(name: str, net: Config, multiple: int, request: Request) -> None:
    if request.skip_layers and request.guidance <= 1:
        raise Error(f"skip_layers needs guidance, and guidance is {request.guidance:g}.", "Use `guidance` above 1.")
    for layer in request.skip_layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < net.layers:
            raise Error(
                f"skip_layers names {layer!r}; {name} has layers 0 to {net.layers - 1}.",
                "For SD3.5 medium use `skip_layers=(7, 8, 9)`.",
            )
    side = net.positions * multiple
    if max(request.width, request.height) > side:
        raise Error(f"{name} has positions for at most {side} pixels a side.", "Choose a smaller size.")


_DEFAULTS = Defaults(size=1024, steps=28, guidance=7.0)
SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    denoiser="transformer",
    network="sd3",
    text=TextPlan(
        clip=("text_encoder", "text_encoder_2"),
        final_norm=False,
        pooled=("text_encoder", "text_encoder_2"),
        t5="text_encoder_3",
        t5_tokens=256,
    ),
    defaults=_DEFAULTS,
    fallback=("euler", "linspace"),
    prediction="flow",
    schedule=FLOW,
    clip_skip=2,
    vae_float16=False,
    taesd="madebyollin/taesd3",
    preview=_PREVIEW,
    careful=Careful(
        whole=("time_text_embed", "context_embedder", "norm_out", "proj_out", "controlnet_"),
        eight=(".norm1",),
    ),
    activations=_activations,
    patch=2,
    trained=ATTENTION,
    takes=("shift", "skip_layers", "t5"),
    check=_check,
)
FAMILIES = (SD3,)

_NETWORK = Config(
    in_channels=16,
    out_channels=16,
    patch=2,
    positions=192,
    context=4096,
    pooled=2048,
    heads=24,
    head_dim=64,
    layers=24,
    dual=(),
    qk_norm=False,
)
_MEDIUM35 = replace(_NETWORK, positions=384, dual=tuple(range(13)), qk_norm=True)
_LARGE = replace(_NETWORK, heads=38, layers=38, qk_norm=True)
_REST = {
    "text_encoder": replace(CLIP_L, projection=768),
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
    "vae": replace(VAE_FLOW, scale=1.5305, shift=0.0609),
}
_STORYBOOK = {
    "transformer": replace(
        _NETWORK, in_channels=8, out_channels=8, positions=24, context=256, pooled=256, heads=2, layers=6, qk_norm=True
    ),
    "text_encoder": replace(CLIP_STORYBOOK, projection=128),
    "text_encoder_2": replace(CLIP_STORYBOOK, projection=128),
    "vae": VAE_STORYBOOK,
}
_LICENCE = "Stability AI Community"
_SD3_MEDIUM = Model(
    SD3,
    repo="stabilityai/stable-diffusion-3-medium-diffusers",
    title="Stable Diffusion 3 medium",
    licence=_LICENCE,
    download=15.50,
    networks={"transformer": _NETWORK, **_REST},
    defaults=_DEFAULTS,
    gated=True,
)
_SD35_LARGE = replace(
    _SD3_MEDIUM,
    repo="stabilityai/stable-diffusion-3.5-large",
    title="Stable Diffusion 3.5 large",
    download=27.62,
    networks={"transformer": _LARGE, **_REST},
    defaults=replace(_DEFAULTS, guidance=3.5),
)
MODELS = {
    "storybook-flow": Model(
        SD3,
        repo=None,
        title="Storybook flow: its transformer sibling, built in, 256 pixels",
        licence="MIT",
        download=0,
        networks=_STORYBOOK,
        defaults=Defaults(size=256, steps=28, guidance=4.0),
    ),
    "sd3-medium": _SD3_MEDIUM,
    "sd3.5-medium": replace(
        _SD3_MEDIUM,
        repo="stabilityai/stable-diffusion-3.5-medium",
        title="Stable Diffusion 3.5 medium",
        download=16.27,
        networks={"transformer": _MEDIUM35, **_REST},
        defaults=replace(_DEFAULTS, steps=40, guidance=4.5),
    ),
    "sd3.5-large": _SD35_LARGE,
    "sd3.5-large-turbo": replace(
        _SD35_LARGE,
        repo="stabilityai/stable-diffusion-3.5-large-turbo",
        title="Stable Diffusion 3.5 large turbo: four steps",
        defaults=replace(_DEFAULTS, steps=4, guidance=0.0),
    ),
}

_STABILITY = "stabilityai/stable-diffusion-3.5-large-controlnet-"
_MEDIUM = "ControlNet for SD3 medium"
ADAPTERS = {
    (SD3.name, "canny"): Beside(_MEDIUM, "InstantX/SD3-Controlnet-Canny", _LICENCE, 1.19, _NETWORK),
    (SD3.name, "inpaint"): Beside(
        _MEDIUM, "alimama-creative/SD3-Controlnet-Inpainting", _LICENCE, 3.92, _NETWORK, masked=True
    ),
}
ADAPTERS |= {
    (SD3.name, f"{mode}-large"): Beside(
        "ControlNet for SD3.5 large", f"{_STABILITY}{mode}", _LICENCE, 4.31, _LARGE, mode=mode
    )
    for mode in ("blur", "canny", "depth")
}
# The guidance that the authors give for each.
ADAPTERS |= {
    (SD3.name, f"hyper-{steps}"): hyper(
        f"SD3-{steps}steps-CFG-lora",
        0.47,
        _NETWORK,
        steps,
        scale=0.125,
        guidance=guidance,
        sampler="euler",
        schedule="linspace",
    )
    for steps, guidance in ((4, 3.0), (8, 5.0), (16, 7.0))
}
