"""Z-Image and Z-Image-Turbo (Tongyi Lab 2025). This file holds everything that is true of this family alone."""

from dataclasses import replace

from ..models.zimage import MULTIPLE, Config
from .base import NONE, PROMPT, Careful, Defaults, Family, Model, TextPlan, Variant
from .published import FLOW, PREVIEW_FLUX, QWEN3_4B, VAE_FLUX


def _activations(net: Config, latents: int, tokens: int, gpu: bool) -> float:
    """Measured numbers per token and width: see `memory`."""
    patches = latents // 4  # of 2 x 2
    return 29 * net.width * (patches + -patches % MULTIPLE + tokens)


# Its authors and diffusers write guidance as pos + g (pos - neg), which is one less than the usual number. Here it is
# the usual one: 6 is their default of 5.
_DEFAULTS = Defaults(size=1024, steps=50, guidance=6.0)
_TURBO = replace(_DEFAULTS, steps=8, guidance=0.0)
_SCHEDULE = FLOW | {"shift": 6.0, "spacing": "trailing", "ends": "trailing"}
ZIMAGE = Family(
    name="zimage",
    title="Z-Image",
    denoiser="transformer",
    network="zimage",
    text=TextPlan(
        qwen="text_encoder",
        template=f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n",  # thinking is on
        qwen_tokens=512,
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
        whole=("x_embedder", "cap_embedder", "t_embedder", "final_layer"),
        eight=("adaLN_modulation",),
    ),
    activations=_activations,
    patch=2,
    takes=("shift",),
    variants={
        "base": Variant(),
        # It has the same shapes; the shift of its scheduler shows it, or what a single file is called.
        "turbo": Variant(guidance=NONE, defaults=_TURBO, schedule=_SCHEDULE | {"shift": 3.0}),
    },
)
FAMILIES = (ZIMAGE,)

_NETWORKS = {
    "text_encoder": replace(QWEN3_4B, layers=35, taps=(35,)),
    "transformer": Config(
        in_channels=64,
        out_channels=64,
        context=2560,
        width=3840,
        heads=30,
        hidden=10240,
        layers=30,
        refiners=2,
        axes=(32, 48, 48),
        theta=256.0,
        eps=1e-5,
    ),
    "vae": VAE_FLUX,
}
_TURBO_MODEL = Model(
    ZIMAGE,
    repo="Tongyi-MAI/Z-Image-Turbo",
    title="Z-Image-Turbo: eight steps",
    licence="Apache 2.0",
    download=32.83,
    networks=_NETWORKS,
    defaults=_TURBO,
    variant="turbo",
    parts={"text_encoder": 8.04, "vae": 0.17},
)
MODELS = {
    "z-image-turbo": _TURBO_MODEL,
    "z-image": replace(
        _TURBO_MODEL,
        repo="Tongyi-MAI/Z-Image",
        title="Z-Image",
        download=20.52,
        defaults=_DEFAULTS,
        variant="base",
    ),
}
