"""FLUX.1 (Black Forest Labs 2024). This file holds everything that is true of this family alone."""

from dataclasses import replace

from ..models.flux import Config
from .base import INPUT, NONE, Beside, Careful, Cut, Defaults, Family, Fast, Model, TextPlan, Variant
from .published import ATTENTION, CLIP_L, DYNAMIC, FLOW, PREVIEW_FLUX, T5_XXL, VAE_FLUX, hyper

# The sizes of the pictures that Kontext was trained on (Labs et al. 2025), width and height; each also turned around.
KONTEXT = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
KONTEXT += ((1024, 1024), *((h, w) for w, h in reversed(KONTEXT)))


def _cut(width: int, height: int, multiple: int) -> Cut:
    """A picture for Kontext is stretched to the size whose shape is nearest. As in diffusers, its own shape is that of
    its edges rounded down."""
    w, h = (max(multiple, edge // multiple * multiple) for edge in (width, height))
    _, *nearest = min((abs(w / h - kw / kh), kw, kh) for kw, kh in KONTEXT)
    size = tuple(edge // multiple * multiple for edge in nearest)
    return Cut(size, size)


def _activations(net: Config, latents: int, tokens: int, gpu: bool) -> float:
    """Measured numbers per token and width: see `memory`."""
    return 37.5 * net.width * (latents // 4 + tokens)  # patches of 2 x 2


_DEFAULTS = Defaults(size=1024, steps=28, guidance=3.5)
_SCHEDULE = FLOW | {"spacing": "trailing", "ends": "trailing", "dynamic": DYNAMIC}
_DEPTH = replace(_DEFAULTS, steps=30, guidance=10.0)
_CANNY = replace(_DEFAULTS, steps=50, guidance=30.0)
_FILL = replace(_DEFAULTS, steps=50, guidance=30.0)
_SCHNELL = replace(_DEFAULTS, steps=4, guidance=0.0)
FLUX = Family(
    name="flux",
    title="FLUX.1",
    denoiser="transformer",
    network="flux",
    text=TextPlan(
        clip=("text_encoder",),
        final_norm=True,
        pooled=("text_encoder",),
        t5="text_encoder_2",
        t5_tokens=512,
        clip_read=False,
    ),
    defaults=_DEFAULTS,
    fallback=("euler", "trailing"),
    prediction="flow",
    schedule=_SCHEDULE,
    clip_skip=1,
    vae_float16=False,
    taesd="madebyollin/taef1",
    preview=PREVIEW_FLUX,
    careful=Careful(
        whole=("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer", "controlnet_"),
        eight=("_mod.", ".modulation."),
    ),
    activations=_activations,
    guidance=INPUT,
    patch=2,
    references=("ip_adapter", "redux"),
    trained=ATTENTION,
    first="img_in.weight",
    takes=("shift", "true_cfg"),
    cut=_cut,
    variants={
        "base": Variant(),
        "schnell": Variant(
            guidance=NONE,
            t5_tokens=256,
            defaults=_SCHNELL,
            schedule=_SCHEDULE | {"shift": 1.0, "dynamic": None},
        ),
        # Kontext has the same shapes as dev; only the checkpoint's name for its pipeline shows it.
        "kontext": Variant(edits=1),
        "control": Variant(beside=64, reads=("control",), defaults=_DEPTH),
        "fill": Variant(beside=320, reads=("masked", "tiles"), defaults=_FILL),
    },
)
FAMILIES = (FLUX,)

_NETWORK = Config(
    in_channels=64,
    out_channels=64,
    context=4096,
    pooled=768,
    width=3072,
    heads=24,
    hidden=12288,
    double=19,
    single=38,
    axes=(16, 56, 56),
    theta=10000.0,
    guidance=True,
)
_REST = {
    "text_encoder": CLIP_L,
    "text_encoder_2": T5_XXL,
    "vae": VAE_FLUX,
}
_DEV = Model(
    FLUX,
    repo="black-forest-labs/FLUX.1-dev",
    title="FLUX.1 dev",
    licence="FLUX.1-dev Non-Commercial",
    download=33.74,
    networks={"transformer": _NETWORK, **_REST},
    defaults=_DEFAULTS,
    gated=True,
)
_DEPTH_DEV = replace(
    _DEV,
    repo="black-forest-labs/FLUX.1-Depth-dev",
    title="FLUX.1 Depth dev: needs a depth map",
    networks={"transformer": replace(_NETWORK, in_channels=128), **_REST},
    defaults=_DEPTH,
    variant="control",
)
MODELS = {
    "flux-schnell": replace(
        _DEV,
        repo="black-forest-labs/FLUX.1-schnell",
        title="FLUX.1 schnell: one to four steps",
        licence="Apache 2.0",
        download=33.72,
        networks={"transformer": replace(_NETWORK, guidance=False), **_REST},
        defaults=_SCHNELL,
        variant="schnell",
    ),
    "flux-dev": _DEV,
    "flux-krea": replace(
        _DEV,
        repo="black-forest-labs/FLUX.1-Krea-dev",
        title="FLUX.1 Krea dev",
        defaults=replace(_DEFAULTS, guidance=4.5),
    ),
    "flux-fill": replace(
        _DEV,
        repo="black-forest-labs/FLUX.1-Fill-dev",
        title="FLUX.1 Fill dev: needs a picture and a mask",
        networks={"transformer": replace(_NETWORK, in_channels=384), **_REST},
        defaults=_FILL,
        variant="fill",
    ),
    "flux-depth": _DEPTH_DEV,
    "flux-canny": replace(
        _DEPTH_DEV,
        repo="black-forest-labs/FLUX.1-Canny-dev",
        title="FLUX.1 Canny dev: needs a picture of edges",
        defaults=_CANNY,
    ),
    "flux-kontext": replace(
        _DEV,
        repo="black-forest-labs/FLUX.1-Kontext-dev",
        title="FLUX.1 Kontext dev: edits a picture",
        defaults=replace(_DEFAULTS, guidance=2.5),
        variant="kontext",
    ),
}
ADAPTERS = {
    (FLUX.name, "redux"): Beside(
        "FLUX Redux",
        "black-forest-labs/FLUX.1-Redux-dev",
        "FLUX.1-dev Non-Commercial",
        0.13,
        _NETWORK,
        "flux1-redux-dev.safetensors",
        encoder=0.86,
        tokens=729,
    ),
    (FLUX.name, "ip-adapter"): Beside(
        "IP-Adapter",
        "XLabs-AI/flux-ip-adapter",
        "FLUX.1-dev Non-Commercial",
        0.98,
        _NETWORK,
        "ip_adapter.safetensors",
        encoder=0.61,
        sees="openai/clip-vit-large-patch14",
        tokens=4,
    ),
}
ADAPTERS |= {
    (FLUX.name, f"xlabs-{name}"): Beside(
        "ControlNet",
        f"XLabs-AI/flux-controlnet-{name}-v3",
        "FLUX.1-dev Non-Commercial",
        1.49,
        _NETWORK,
        f"flux-{name}-controlnet-v3.safetensors",
    )
    for name in ("canny", "depth", "hed")
}

_UNION = Beside(
    "ControlNet",
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0",
    "FLUX.1-dev Non-Commercial",
    4.28,
    _NETWORK,
    "diffusion_pytorch_model.safetensors",
)  # of the kinds of pictures that it reads it need not be told which it is
_TOLD = replace(_UNION, repo="InstantX/FLUX.1-dev-Controlnet-Union", size=6.6)
ADAPTERS |= {(FLUX.name, name): _UNION for name in ("canny", "depth", "gray", "openpose", "softedge")}
ADAPTERS |= {(FLUX.name, name): replace(_TOLD, mode=name) for name in ("blur", "lq", "tile")}
ADAPTERS |= {
    (FLUX.name, f"hyper-{steps}"): hyper(
        f"FLUX.1-dev-{steps}steps-lora", 1.39, _NETWORK, steps, scale=0.125, guidance=3.5, sampler="euler"
    )
    for steps in (8, 16)
}
ADAPTERS |= {
    (FLUX.name, "turbo"): Fast(
        "Turbo LoRA",
        "alimama-creative/FLUX.1-Turbo-Alpha",
        "FLUX.1-dev Non-Commercial",
        0.69,
        _NETWORK,
        "diffusion_pytorch_model.safetensors",
        steps=8,
        guidance=3.5,
    )
}
ADAPTERS |= {  # with these flux-dev reads a control picture, as FLUX.1 Depth and Canny do
    (FLUX.name, f"{name}-lora"): Fast(
        "Control LoRA",
        f"black-forest-labs/FLUX.1-{name.title()}-dev-lora",
        "FLUX.1-dev Non-Commercial",
        1.24,
        file=f"flux1-{name}-dev-lora.safetensors",
        net=_NETWORK,
        steps=like.steps,
        guidance=like.guidance,
    )
    for name, like in (("depth", _DEPTH), ("canny", _CANNY))
}
