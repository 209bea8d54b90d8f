"""The published models' networks, a row a model: what `convert.open` says of the published checkpoint, which tests
compare. From these a model's memory is known before it is downloaded, and a benchmark runs without any file."""

from dataclasses import replace

from .models import clip, flux, sd3, t5, unet, vae

Config = clip.Config | flux.Config | sd3.Config | t5.Config | unet.Config | vae.Config

_CLIP_L = clip.Config(
    vocab=49408,
    positions=77,
    width=768,
    layers=12,
    heads=12,
    hidden=3072,
    act="quick_gelu",
    projection=None,
    eos=49407,
    eps=1e-5,
)
_CLIP_H = replace(_CLIP_L, width=1024, layers=23, heads=16, hidden=4096, act="gelu")
_CLIP_G = replace(_CLIP_H, width=1280, layers=32, heads=20, hidden=5120, projection=1280)
_T5 = t5.Config(
    vocab=32128,
    width=4096,
    layers=24,
    heads=64,
    head_dim=64,
    hidden=10240,
    buckets=32,
    max_distance=128,
    eps=1e-6,
)

_SD1 = unet.Config(
    in_channels=4,
    out_channels=4,
    channels=(320, 640, 1280, 1280),
    layers=(2, 2, 2, 2),
    depth=((1, 1), (1, 1), (1, 1), ()),
    up_depth=((), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    mid_depth=1,
    heads=(8, 8, 8, 8),
    context=768,
    groups=32,
    eps=1e-5,
    linear_projection=False,
    time_cond=None,
    added_time=None,
    added=None,
    flip_sin_to_cos=True,
    freq_shift=0,
)
_SD2 = replace(_SD1, heads=(5, 10, 20, 20), context=1024, linear_projection=True)
_SDXL = replace(
    _SD2,
    channels=(320, 640, 1280),
    layers=(2, 2, 2),
    depth=((), (2, 2), (10, 10)),
    up_depth=((10, 10, 10), (2, 2, 2), ()),
    mid_depth=10,
    heads=(5, 10, 20),
    context=2048,
    added_time=256,
    added=2816,
)
_REFINER = replace(
    _SDXL,
    channels=(384, 768, 1536, 1536),
    layers=(2, 2, 2, 2),
    depth=((), (4, 4), (4, 4), ()),
    up_depth=((), (4, 4, 4), (4, 4, 4), ()),
    mid_depth=4,
    heads=(6, 12, 24, 24),
    context=1280,
    added=2560,
)

_VAE = vae.Config(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    channels=(128, 256, 512, 512),
    layers=2,
    groups=32,
    scale=0.18215,
    shift=0.0,
    quant_conv=True,
    post_quant_conv=True,
    mid_attention=True,
)
_VAE_XL = replace(_VAE, scale=0.13025)
_VAE_FLOW = replace(_VAE, latent_channels=16, quant_conv=False, post_quant_conv=False)

_SD3 = sd3.Config(
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
_SD3_REST = {
    "text_encoder": replace(_CLIP_L, projection=768),
    "text_encoder_2": _CLIP_G,
    "text_encoder_3": _T5,
    "vae": replace(_VAE_FLOW, scale=1.5305, shift=0.0609),
}
_FLUX = flux.Config(
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
_FLUX_REST = {
    "text_encoder": _CLIP_L,
    "text_encoder_2": _T5,
    "vae": replace(_VAE_FLOW, scale=0.3611, shift=0.1159),
}

_SD21 = {"text_encoder": _CLIP_H, "unet": _SD2, "vae": _VAE}
_XL = {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "unet": _SDXL, "vae": _VAE_XL}
_SD35_LARGE = {"transformer": replace(_SD3, heads=38, layers=38, qk_norm=True), **_SD3_REST}
_FLUX_DEV = {"transformer": _FLUX, **_FLUX_REST}

ROWS: dict[str, dict[str, Config]] = {
    "storybook": {
        "text_encoder": replace(_CLIP_L, vocab=1048, positions=40, width=128, layers=3, heads=4, hidden=512, eos=1047),
        "unet": replace(
            _SD1,
            channels=(64, 96, 144),
            layers=(1, 1, 1),
            depth=((1,), (1,), (1,)),
            up_depth=((1, 1), (1, 1), (1, 1)),
            heads=(2, 2, 2),
            context=128,
            groups=16,
        ),
        "vae": replace(_VAE, channels=(16, 32, 64, 96), layers=1, groups=8),
    },
    "sd15": {"text_encoder": _CLIP_L, "unet": _SD1, "vae": _VAE},
    "sd21": _SD21,
    "sd-turbo": _SD21,
    "lcm": {"text_encoder": _CLIP_L, "unet": replace(_SD1, time_cond=256), "vae": _VAE},
    "sdxl": _XL,
    "sdxl-turbo": _XL,
    "sdxl-refiner": {"text_encoder_2": _CLIP_G, "unet": _REFINER, "vae": _VAE_XL},
    "sd3-medium": {"transformer": _SD3, **_SD3_REST},
    "sd3.5-medium": {
        "transformer": replace(_SD3, positions=384, dual=tuple(range(13)), qk_norm=True),
        **_SD3_REST,
    },
    "sd3.5-large": _SD35_LARGE,
    "sd3.5-large-turbo": _SD35_LARGE,
    "flux-dev": _FLUX_DEV,
    "flux-krea": _FLUX_DEV,
    "flux-schnell": {"transformer": replace(_FLUX, guidance=False), **_FLUX_REST},
}
