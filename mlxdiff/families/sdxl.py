"""Stable Diffusion XL and its refiner (Podell et al. 2023).

This file holds everything that is true of these families alone."""

from dataclasses import replace

from .base import Beside, Defaults, Family, Fast, Model, TextPlan
from .published import (
    CLIP_G,
    CLIP_L,
    DISCRETE,
    UNET,
    UNET_CAREFUL,
    VAE,
    hyper,
    ip_adapter,
    lcm,
    unet_activations,
    unet_variants,
)

_PREVIEW = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
    (0.1084, -0.0175, -0.0011),
)
_DEFAULTS = Defaults(size=1024, steps=30, guidance=5.0)
SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    denoiser="unet",
    network="unet",
    text=TextPlan(clip=("text_encoder", "text_encoder_2"), final_norm=False, pooled=("text_encoder_2",), sizes=True),
    defaults=_DEFAULTS,
    fallback=("euler", "leading"),
    prediction="eps",
    schedule=DISCRETE,
    clip_skip=2,
    vae_float16=False,  # the published VAE overflows in float16 and draws black
    taesd="madebyollin/taesdxl",
    preview=_PREVIEW,
    careful=UNET_CAREFUL,
    activations=unet_activations,
    references=("ip_adapter",),
    aspects={"style": ("up_blocks.0.attentions.1",), "layout": ("down_blocks.2.attentions.1",)},
    zero_negative=True,
    takes=("guess",),
    variants=unet_variants(_DEFAULTS),
)
REFINER = replace(
    SDXL,
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    text=TextPlan(
        clip=("text_encoder_2",), final_norm=False, pooled=("text_encoder_2",), sizes=True, scores=(6.0, 2.5)
    ),
    references=(),
    aspects={},
    zero_negative=False,
)
FAMILIES = (SDXL, REFINER)

_UNET = replace(
    UNET,
    channels=(320, 640, 1280),
    layers=(2, 2, 2),
    depth=((), (2, 2), (10, 10)),
    up_depth=((10, 10, 10), (2, 2, 2), ()),
    mid_depth=10,
    heads=(5, 10, 20),
    context=2048,
    linear_projection=True,
    added_time=256,
    added=2816,
)
_UNET_REFINER = replace(
    _UNET,
    channels=(384, 768, 1536, 1536),
    layers=(2, 2, 2, 2),
    depth=((), (4, 4), (4, 4), ()),
    up_depth=((), (4, 4, 4), (4, 4, 4), ()),
    mid_depth=4,
    heads=(6, 12, 24, 24),
    context=1280,
    added=2560,
)
_VAE = replace(VAE, scale=0.13025)
_NETWORKS = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "unet": _UNET, "vae": _VAE}
_SDXL_BASE = Model(
    SDXL,
    repo="stabilityai/stable-diffusion-xl-base-1.0",
    title="Stable Diffusion XL 1.0",
    licence="CreativeML OpenRAIL++-M",
    download=6.94,
    networks=_NETWORKS,
    defaults=_DEFAULTS,
)
MODELS = {
    "sdxl": _SDXL_BASE,
    "sdxl-inpaint": replace(
        _SDXL_BASE,
        repo="diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        title="Stable Diffusion XL for inpainting: needs a picture and a mask",
        networks=_NETWORKS | {"unet": replace(_UNET, in_channels=9)},
        variant="inpaint",
    ),
    "sdxl-refiner": replace(
        _SDXL_BASE,
        family=REFINER,
        repo="stabilityai/stable-diffusion-xl-refiner-1.0",
        title="Stable Diffusion XL 1.0 refiner: finishes what sdxl begins",
        download=6.08,
        networks={"text_encoder_2": CLIP_G, "unet": _UNET_REFINER, "vae": _VAE},
    ),
    "sdxl-turbo": replace(
        _SDXL_BASE,
        repo="stabilityai/sdxl-turbo",
        title="SDXL-Turbo: one to four steps",
        licence="Stability AI Community",
        defaults=Defaults(size=512, steps=1, guidance=0.0, sampler="euler_ancestral", schedule="trailing"),
    ),
}

ADAPTERS = {
    (SDXL.name, name): Beside(
        "ControlNet", f"diffusers/controlnet-{name}-sdxl-1.0", "CreativeML OpenRAIL++-M", 2.5, _UNET
    )
    for name in ("canny", "depth")
}
_UNION = Beside(
    "ControlNet", "xinsir/controlnet-union-sdxl-1.0", "Apache 2.0", 2.51, _UNET, "diffusion_pytorch_model.safetensors"
)
_PROMAX = replace(_UNION, file="diffusion_pytorch_model_promax.safetensors")  # which reads two kinds more
ADAPTERS |= {
    (SDXL.name, name): replace(_UNION, mode=name)
    for name in ("openpose", "scribble", "softedge", "lineart", "mlsd", "normal", "seg")
}
ADAPTERS |= {(SDXL.name, name): replace(_PROMAX, mode=name, masked=name == "inpaint") for name in ("tile", "inpaint")}
ADAPTERS |= {
    (SDXL.name, f"t2i-{name}"): Beside(
        "T2I-Adapter", f"TencentARC/t2i-adapter-{repo}-sdxl-1.0", "Apache 2.0", 0.16, _UNET
    )
    for name, repo in {
        "canny": "canny",
        "depth": "depth-midas",
        "lineart": "lineart",
        "openpose": "openpose",
        "sketch": "sketch",
    }.items()
}
ADAPTERS |= {
    (SDXL.name, "ip-adapter"): ip_adapter("sdxl_models/ip-adapter_sdxl_vit-h", 0.70, 4, _UNET),
    (SDXL.name, "ip-adapter-plus"): ip_adapter("sdxl_models/ip-adapter-plus_sdxl_vit-h", 0.85, 16, _UNET),
    (SDXL.name, "ip-adapter-plus-face"): ip_adapter("sdxl_models/ip-adapter-plus-face_sdxl_vit-h", 0.85, 16, _UNET),
}
ADAPTERS |= {(SDXL.name, "lcm"): lcm("lcm-lora-sdxl", 0.39, _UNET)}
ADAPTERS |= {
    (SDXL.name, f"lightning-{steps}"): Fast(
        "Lightning LoRA",
        "ByteDance/SDXL-Lightning",
        "CreativeML OpenRAIL++-M",
        0.39,
        _UNET,
        f"sdxl_lightning_{steps}step_lora.safetensors",
        steps=steps,
    )
    for steps in (2, 4, 8)
}
ADAPTERS |= {(SDXL.name, f"hyper-{steps}"): hyper(f"SDXL-{steps}steps-lora", 0.79, _UNET, steps) for steps in (2, 4, 8)}
ADAPTERS |= {
    (SDXL.name, "turbo"): Fast(
        "Turbo LoRA",
        "shiroppo/sd_xl_turbo_lora",
        "Stability AI Community",  # of SDXL-Turbo, from which it was made
        0.39,
        _UNET,
        "sd_xl_turbo_lora_v1-64dim.safetensors",
        sampler="euler_ancestral",
    )
}
