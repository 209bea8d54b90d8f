"""FLUX.2 (Black Forest Labs 2025): klein, which is distilled, its base, and dev. This file holds everything that is
true of these families alone."""

import math
from dataclasses import replace

from ..errors import Error
from ..models.flux2 import Config
from .base import INPUT, NONE, PROMPT, Careful, Cut, Defaults, Family, Model, TextPlan, Variant
from .published import ATTENTION, EMPIRICAL, FLOW, QWEN3_4B, QWEN3_8B, VAE

# ComfyUI's figures are for each of the four latents in a patch. Their mean is the patch's colour.
_LATENT = (
    (0.0058, 0.0113, 0.0073),
    (0.0495, 0.0443, 0.0836),
    (-0.0099, 0.0096, 0.0644),
    (0.2144, 0.3009, 0.3652),
    (0.0166, -0.0039, -0.0054),
    (0.0157, 0.0103, -0.0160),
    (-0.0398, 0.0902, -0.0235),
    (-0.0052, 0.0095, 0.0109),
    (-0.3527, -0.2712, -0.1666),
    (-0.0301, -0.0356, -0.0180),
    (-0.0107, 0.0078, 0.0013),
    (0.0746, 0.0090, -0.0941),
    (0.0156, 0.0169, 0.0070),
    (-0.0034, -0.0040, -0.0114),
    (0.0032, 0.0181, 0.0080),
    (-0.0939, -0.0008, 0.0186),
    (0.0018, 0.0043, 0.0104),
    (0.0284, 0.0056, -0.0127),
    (-0.0024, -0.0022, -0.0030),
    (0.1207, -0.0026, 0.0065),
    (0.0128, 0.0101, 0.0142),
    (0.0137, -0.0072, -0.0007),
    (0.0095, 0.0092, -0.0059),
    (0.0000, -0.0077, -0.0049),
    (-0.0465, -0.0204, -0.0312),
    (0.0095, 0.0012, -0.0066),
    (0.0290, -0.0034, 0.0025),
    (0.0220, 0.0169, -0.0048),
    (-0.0332, -0.0457, -0.0468),
    (-0.0085, 0.0389, 0.0609),
    (-0.0076, 0.0003, -0.0043),
    (-0.0111, -0.0460, -0.0614),
)
_PREVIEW = (*(tuple(v / 4 for v in row) for row in _LATENT for _ in range(4)), (-0.0329, -0.0718, -0.0851))


_AREA, _LEAST, _LONGEST = 1024**2, 64, 8  # of a picture to edit: pixels at most, a shortest edge, a longest shape


def _cut(width: int, height: int, multiple: int) -> Cut:
    """A picture keeps its size, unless it has too many pixels, and loses at its edges what fills no multiple."""
    short, long = sorted((width, height))
    if short < _LEAST or long > _LONGEST * short:
        raise Error(
            f"A picture of {width}x{height} is too small or too long to edit.",
            f"Give one with edges of at least {_LEAST} pixels, the longer at most {_LONGEST} times the shorter.",
        )
    grow = min(1.0, math.sqrt(_AREA / (width * height)))
    scaled = int(width * grow), int(height * grow)
    return Cut(scaled, tuple(edge // multiple * multiple for edge in scaled))


def _activations(net: Config, latents: int, tokens: int, gpu: bool) -> float:
    """Measured numbers per token and width: see `memory`. With no, one, two and four pictures to edit, and for two
    samples, 0.94 to 1.13 of what five blocks of full width took."""
    return 43 * net.width * (latents + tokens)


_DEFAULTS = Defaults(size=1024, steps=50, guidance=4.0)
_DISTILLED = replace(_DEFAULTS, steps=4, guidance=0.0)
FLUX2 = Family(
    name="flux2",
    title="FLUX.2 klein",
    denoiser="transformer",
    network="flux2",
    text=TextPlan(
        qwen="text_encoder",
        template=(
            f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"  # thinking is off
        ),
        qwen_tokens=512,
        qwen_padded=True,
    ),
    defaults=_DEFAULTS,
    fallback=("euler", "trailing"),
    prediction="flow",
    schedule=FLOW | {"spacing": "trailing", "ends": "trailing", "dynamic": EMPIRICAL},
    clip_skip=1,
    vae_float16=False,
    taesd=None,  # madebyollin/taef2 has layers that models/taesd.py does not have
    preview=_PREVIEW,
    careful=Careful(
        whole=("img_in", "txt_in", "time_in", "guidance_in", "final_layer"),
        eight=("_stream_modulation",),
    ),
    activations=_activations,
    trained=(*ATTENTION, "to_qkv_mlp_proj", "attn.to_out"),  # of the single blocks, these are all
    takes=("shift",),
    cut=_cut,
    variants={
        "base": Variant(edits=4),  # as many pictures as Black Forest Labs' own service takes
        # It has the same shapes as base; only what a checkpoint is called shows it.
        "distilled": Variant(guidance=NONE, defaults=_DISTILLED, edits=4),
    },
)
# Its text encoder, Mistral Small 3.2 of 24B parameters, is not read.
DEV = replace(
    FLUX2,
    name="flux2-dev",
    title="FLUX.2 dev",
    text=TextPlan(),
    guidance=INPUT,
    variants={"dev": Variant(needs=("its text encoder, Mistral Small of 24B parameters",))},
)
FAMILIES = (FLUX2, DEV)

_NETWORK = Config(
    in_channels=128,
    out_channels=128,
    context=7680,
    width=3072,
    heads=24,
    hidden=9216,
    double=5,
    single=20,
    axes=(32, 32, 32, 32),
    theta=2000.0,
    guidance=False,
)
_READ = {"layers": 27, "taps": (9, 18, 27)}
_VAE = replace(VAE, latent_channels=32, scale=1.0, bn_eps=1e-4)
_4B = {"text_encoder": replace(QWEN3_4B, **_READ), "transformer": _NETWORK, "vae": _VAE}
_9B = {
    "text_encoder": replace(QWEN3_8B, **_READ),
    "transformer": replace(_NETWORK, context=12288, width=4096, heads=32, hidden=12288, double=8, single=24),
    "vae": _VAE,
}
_KLEIN = Model(
    FLUX2,
    repo="black-forest-labs/FLUX.2-klein-4B",
    title="FLUX.2 klein 4B: draws and edits in four steps",
    licence="Apache 2.0",
    download=15.98,
    networks=_4B,
    defaults=_DISTILLED,
    variant="distilled",
    parts={"text_encoder": 8.04, "vae": 0.17},
)
_KLEIN_9B = replace(
    _KLEIN,
    repo="black-forest-labs/FLUX.2-klein-9B",
    title="FLUX.2 klein 9B: draws and edits in four steps",
    licence="FLUX Non-Commercial",
    download=34.72,
    networks=_9B,
    gated=True,
    parts={"text_encoder": 16.38, "vae": 0.17},
)
MODELS = {
    "flux2-klein": _KLEIN,
    "flux2-klein-base": replace(
        _KLEIN,
        repo="black-forest-labs/FLUX.2-klein-base-4B",
        title="FLUX.2 klein 4B before its distillation",
        defaults=_DEFAULTS,
        variant="base",
    ),
    "flux2-klein-9b": _KLEIN_9B,
    "flux2-klein-9b-base": replace(
        _KLEIN_9B,
        repo="black-forest-labs/FLUX.2-klein-base-9B",
        title="FLUX.2 klein 9B before its distillation",
        defaults=_DEFAULTS,
        variant="base",
    ),
}
