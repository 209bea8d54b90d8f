"""Stable Diffusion 1.x and 2.x in one file: which key belongs to which network, and what no shape tells."""

from dataclasses import dataclass, field

from .rules import Row

# EMA copies are dropped: model.diffusion_model holds what the publisher meant to be used (in "emaonly" files the
# average itself), and the reference reads the same. The copies' names lack the dots and could not be mapped safely.
DROPPED: list[Row] = [
    (r"^model_ema\.", None),
    (r"^(betas|alphas_cumprod(_prev)?|sqrt_.*alphas_cumprod|log_one_minus_alphas_cumprod|posterior_\w+)$", None),
    (r"^(sqrt_recipm1_alphas_cumprod|lvlb_weights|logvar|scale_factor|global_step|epoch)$", None),  # of training
    (r"^(v_pred|ztsnr|denoiser\.sigmas)$", None),  # marks without numbers; detect reads them by name
    (r"^embedding_manager\.", None),  # textual inversion's own copy of the text encoder
    # CLIP's training alone used the scale; ComfyUI saves one for T5 too, and may put a tokenizer beside an encoder.
    (r"^(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.(logit_scale|spiece_model)$", None),
]
UNET: Row = (
    r"^((model\.)?diffusion_model\.|(?=(input|middle|output|down|mid|up)_blocks?\.|time_embed(ding)?\."
    r"|label_emb\.|add_embedding\.|out\.\d\.|conv_(in|out|norm_out)\.))",
    "unet.",
)
VAE: Row = (r"^first_stage_model\.", "vae.")


@dataclass(frozen=True)
class Part:
    component: str
    beside: str  # the name its file goes by, looked for beside the transformer's


@dataclass(frozen=True)
class Family:
    """What one family's single files look like, and what of it no shape tells."""

    table: list[Row]  # foreign key -> component.rest
    components: tuple[str, ...]  # that a whole model has
    acts: dict[str, str]  # CLIP -> activation
    pads: dict[str, str | None]  # tokenizer -> the token CLIP's fills up with; None for T5's
    optional: tuple[str, ...] = ()  # of the components
    parts: dict[str, Part] = field(default_factory=dict)  # what people have in files of their own, by its short name
    t5: str | None = None  # the component that is a T5
    pooled: bool = False  # whether text_encoder's projection is kept
    prediction: str = "eps"
    scale: float = 0.18215  # of the VAE's latents
    shift: float = 0.0
    sizes: int = 0  # numbers, beside the pooled text, that the U-Net is told
    zero_negative: bool = False  # no negative prompt is zeros, not an empty text


SD1 = Family(
    # ComfyUI once wrote `clip_l.` in between, and trainers before transformers 4 no `text_model.` (see clip).
    table=[*DROPPED, UNET, VAE, (r"^cond_stage_model\.(clip_l\.)?transformer\.", "text_encoder.")],
    components=("text_encoder", "unet", "vae"),
    acts={"text_encoder": "quick_gelu"},
    pads={"tokenizer": "<|endoftext|>"},
)

SD2 = Family(
    table=[*DROPPED, UNET, VAE, (r"^(cond_stage_model|conditioner\.embedders\.0)\.model\.", "text_encoder.")],
    components=("text_encoder", "unet", "vae"),
    acts={"text_encoder": "gelu"},
    pads={"tokenizer": "!"},  # OpenCLIP fills with id 0
)
