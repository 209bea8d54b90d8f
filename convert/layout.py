"""What single files look like: which of their keys belong to which network, and which published networks have what no
shape shows."""

from dataclasses import dataclass, field, replace

from ..families import MODELS, Family
from ..models import build
from .rules import Row

# EMA copies are dropped: model.diffusion_model holds what the publisher meant to be used (in "emaonly" files the
# average itself), and the reference reads the same. The copies' names lack the dots and could not be mapped safely.
DROPPED: list[Row] = [
    (r"^model_ema\.", None),
    (r"^(betas|alphas_cumprod(_prev)?|sqrt_.*alphas_cumprod|log_one_minus_alphas_cumprod|posterior_\w+)$", None),
    (r"^(sqrt_recipm1_alphas_cumprod|lvlb_weights|logvar|scale_factor|global_step|epoch)$", None),  # of training
    (r"^(v_pred|ztsnr|denoiser\.sigmas)$", None),  # marks without numbers, which `checkpoint` reads by name
    (r"^embedding_manager\.", None),  # a copy of the text encoder that textual inversion keeps
    # CLIP's training alone used the scale; ComfyUI saves one for T5 too, and may put a tokenizer beside an encoder.
    (r"^(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.(logit_scale|spiece_model)$", None),
]
# A text encoder alone in a file has short names, or those that it has in ComfyUI's whole checkpoints.
ALONE = r"^(text_encoders\.\w+\.transformer\.)?"
# The VAE and the transformer of a whole checkpoint. These rows come after those of its text encoders.
_TRANSFORMER: list[Row] = [
    (r"^(vae|first_stage_model)\.", "vae."),
    (r"^((model\.)?diffusion_model\.|transformer\.|(?!text_encoder|vae\.))", "transformer."),
]
# ComfyUI's name of a text encoder -> ours, in `families.PARTS`, and how the names of its files begin
_PARTS = {
    "clip_l": ("clip", "clip_l"),
    "clip_g": ("clip_g", "clip_g"),
    "t5xxl": ("t5", "t5xxl"),
    "qwen3_4b": ("text_encoder", "qwen_3_4b"),
    "qwen3_8b": ("text_encoder", "qwen_3_8b"),
}


ENCODERS = ("clip", "t5", "qwen3")  # the networks that read text


@dataclass(frozen=True)
class Part:
    """A network that people keep in a file of its own."""

    component: str
    beside: str  # the name of its file, which is looked for beside the transformer's


@dataclass(frozen=True)
class Layout:
    title: str
    table: list[Row]  # foreign key -> component.rest
    networks: dict[str, str]  # component -> its network, a name in `registry.MODULES`
    published: dict[str, build.Config] = field(default_factory=dict)  # component -> as published, if that is known
    family: Family | None = None  # None: a network alone in a file, which any family may use
    parts: dict[str, Part] = field(default_factory=dict)  # by their names in `families.PARTS`
    use: str = ""  # of a network that is no part of a model: what to do with it

    @property
    def encoders(self) -> list[str]:
        return [name for name, network in self.networks.items() if network in ENCODERS]

    @property
    def required(self) -> list[str]:
        """The components without which there is no picture."""
        optional = self.family is not None and self.family.text.t5_optional
        return [name for name in self.networks if not optional or name != self.family.text.t5]


def of_family(model: str, table: list[Row], **changed: build.Config) -> Layout:
    """The layout of a family's files. model: one of that family, whose networks have what no shape shows. changed:
    components that these files hold otherwise."""
    row = MODELS[model]
    return Layout(row.family.title, [*DROPPED, *table], row.family.networks, row.networks | changed, row.family)


def of_transformer(model: str, encoders: dict[str, str], vae: str, **changed: build.Config) -> Layout:
    """The same for a transformer, whose text encoders and VAE people also keep in files of their own. encoders: their
    names, which are those of ComfyUI, -> component. vae: the name of its file."""
    rows = [(rf"^text_encoders\.{name}\.transformer\.", f"{component}.") for name, component in encoders.items()]
    kinds = {name: _PARTS[name] for name in encoders}
    parts = {part: Part(encoders[name], f"{file}*.safetensors") for name, (part, file) in kinds.items()}
    layout = of_family(model, [*rows, *_TRANSFORMER], **changed)
    return replace(layout, parts=parts | {"vae": Part("vae", vae)})
