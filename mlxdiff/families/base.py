"""The dataclasses that every family's file fills in. Nothing here is about one family."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..models.build import Config
from ..request import Defaults, Request

# How guidance works for a denoiser.
SECOND_PASS = "second pass"  # guidance pushes away from the negative prompt, which needs a second pass
INPUT = "input"  # guidance is an input of the network; only `true_cfg` takes a second pass
NONE = "none"  # the network was distilled to need no guidance; only `true_cfg` takes a second pass
EMBEDDED = "embedded"  # a consistency model has guidance in its time embedding; no second pass

# Networks that people keep in separate files: setting -> its name for people.
PARTS = {
    "vae": "a VAE",
    "clip": "the CLIP text encoder",
    "clip_g": "the second CLIP of SDXL and SD3",
    "t5": "T5",
    "text_encoder": "the Qwen3 text encoder",
}


_WIDTHS = ("channels", "width", "heads", "head_dim", "context")  # fields of the denoisers' Configs

PROMPT = "{prompt}"  # in a template
QUICK = "quick"  # the name of a LoRA of the package with which a model draws in few steps


@dataclass(frozen=True)
class TextPlan:
    """Which text encoders read a prompt, and how their output reaches the denoiser."""

    clip: tuple[str, ...] = ()  # CLIP encoders, in the order in which their texts are joined
    final_norm: bool = True  # whether a CLIP layer below the last also goes through the final norm
    pooled: tuple[str, ...] = ()  # encoders whose pooled vectors are used, in the order in which they are joined
    sizes: bool = False  # whether the picture's size is an input of the network
    scores: tuple[float, float] | None = None  # aesthetic scores: inputs for the prompt and for the negative prompt
    t5: str | None = None
    t5_tokens: int = 0  # with padding; there is no mask, since the networks were trained with the padding visible
    clip_read: bool = True  # whether the denoiser reads CLIP's tokens, not only its pooled vector
    qwen: str | None = None
    template: str = ""  # what Qwen reads, with PROMPT in the place of the prompt
    qwen_tokens: int = 0  # with the template and padding; without padding, as many as the memory estimate counts
    qwen_padded: bool = False  # whether the denoiser reads padding too, which Qwen does not see

    @property
    def encoders(self) -> dict[str, str]:
        """Text encoder -> its network, a key of models.build.NETWORKS."""
        one = {self.t5: "t5", self.qwen: "qwen3"}
        return dict.fromkeys(self.clip, "clip") | {name: one[name] for name in one if name is not None}

    @property
    def needs(self) -> tuple[str, ...]:
        """The encoders that drawing needs. If CLIP is read too, T5 may be left out."""
        optional = self.t5 if self.clip and self.clip_read else None
        return tuple(name for name in self.encoders if name != optional)

    @property
    def t5_optional(self) -> bool:
        return self.t5 is not None and self.t5 not in self.needs

    @property
    def tokens(self) -> int:
        """How many tokens the denoiser reads for a short prompt."""
        return 77 * (self.clip_read and bool(self.clip)) + self.t5_tokens + self.qwen_tokens


def tokenizer_of(encoder: str) -> str:
    """The folder of a text encoder's tokenizer: text_encoder_2 -> tokenizer_2."""
    return encoder.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Careful:
    """Linear layers of the denoiser that are never quantized like the rest. Each string is a part of their paths."""

    whole: tuple[str, ...]  # not quantized: small layers that every step or token passes through
    eight: tuple[str, ...] = ()  # quantized to 8 bits: the modulations of a transformer, a quarter of FLUX


class Cut(NamedTuple):
    """How a picture reaches a network: scaled by Lanczos to one size, then cropped around its middle to another.
    Each is (width, height)."""

    scaled: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """Checkpoints of a family with other inputs or other defaults. None: the same as the family. Variants are
    recognised by their tensors, not by their names; if two have the same tensors, by the scheduler, or by what the
    checkpoint calls itself: its pipeline, its architecture, its file."""

    beside: int = 0  # input channels of the denoiser beyond those of its output
    needs: tuple[str, ...] = ()  # what is not there yet, in words; such variants cannot draw
    converts: bool = True
    guidance: str | None = None
    t5_tokens: int | None = None
    defaults: Defaults | None = None
    schedule: dict | None = None
    edits: int = 0  # how many pictures it takes to edit; 0: a picture is a start image
    # What the denoiser reads in its further channels, in this order: "mask", one number a latent; "tiles", the mask of
    # all pixels of a latent; "masked", the latents of the start image with grey under the mask; "control", those of a
    # control picture.
    reads: tuple[str, ...] = ()
    starts_at_1: bool = True  # whether a seed's first draw goes to the start image even at strength 1, as in diffusers

    @property
    def inpaints(self) -> bool:
        """Whether it was made to draw a part of a picture anew, and draws nothing else."""
        return "masked" in self.reads


@dataclass(frozen=True)
class Family:
    name: str  # as in model.json
    title: str
    denoiser: str  # the component that denoises
    network: str  # its network, a key of models.build.NETWORKS
    text: TextPlan
    defaults: Defaults
    fallback: tuple[str, str]  # sampler and schedule for checkpoints whose scheduler does not exist here
    prediction: str  # eps, v, x0 or flow, if the checkpoint does not say
    schedule: dict  # the schedule of checkpoints without one
    clip_skip: int  # the text layer that is read, counted from the end: 1 is the last
    vae_float16: bool  # whether the VAE is known not to overflow in float16
    taesd: str | None  # hub id of the tiny decoder for this family's latents; None if none is read here
    preview: tuple[tuple[float, ...], ...]  # latents to RGB: a row per channel, then the bias (ComfyUI's figures)
    careful: Careful
    activations: Callable[[Config, int, int, bool], float]  # (network, latents, tokens, gpu) -> numbers per sample
    guidance: str = SECOND_PASS
    patch: int = 1  # latents along the edge of one token
    zero_negative: bool = False  # zeros, not an empty text, replace a missing negative prompt
    references: tuple[str, ...] = ()  # networks that read reference pictures for it, keys of models.build.NETWORKS
    # What an IP-Adapter can take alone from a picture -> the parts of the denoiser that decide it.
    aspects: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # How the names in diffusers end of the layers that a LoRA changes.
    trained: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    first: str = ""  # the parameter that reads the latents, which a LoRA may widen to read a control picture
    takes: tuple[str, ...] = ()  # settings that not every family has, see `description.SPECIAL`
    variants: dict[str, Variant] = field(default_factory=lambda: {"base": Variant()})
    # (width, height, multiple of all edges) of a picture to edit -> its cut, which is also the size of the result.
    # Raises if the family cannot read a picture of this size.
    cut: Callable[[int, int, int], Cut] | None = None
    # (model name, denoiser, multiple of all edges, resolved request): raises if the family cannot draw the request.
    check: Callable[[str, Config, int, Request], None] | None = None

    @property
    def networks(self) -> dict[str, str]:
        """Component -> its network, a key of models.build.NETWORKS."""
        return self.text.encoders | {self.denoiser: self.network, "vae": "vae"}

    @property
    def flow(self) -> bool:
        return self.prediction == "flow"


@dataclass(frozen=True)
class Beside:
    """A published network that guides a family's models, and has a name here."""

    kind: str  # for people
    repo: str | None  # hub id, or None for a network that ships inside the package
    licence: str
    size: float  # GB at 16 bits
    net: Config  # the denoiser that it was made for
    file: str | None = None  # of the repository; None: its network in diffusers layout. In the package: its folder
    mode: str | None = None  # the kind of picture that the name means, of a network for several
    masked: bool = False  # whether its picture is the start image without what the mask marks
    encoder: float = 0.0  # GB at 16 bits of the vision model, for one that reads reference pictures
    sees: str | None = None  # hub id of the vision model, if it is in another repository
    tokens: int = 0  # that it makes of a reference picture

    def fits(self, net: Config) -> bool:
        """Whether a denoiser is as wide as that which it was made for. The network itself may show more."""
        return all(getattr(net, name, None) == getattr(self.net, name, None) for name in _WIDTHS)

    @property
    def role(self) -> str:
        """What people give it to: "control", "reference", "lora" or "word"."""
        return "reference" if self.tokens else "control"


@dataclass(frozen=True)
class Lora(Beside):
    """A published LoRA that has a name here."""

    scale: float = 1.0

    def fits(self, net: Config) -> bool:
        """Whether a denoiser has the layers of that which it was made for. None of these changes a U-Net's first layer,
        which is wider in a model that inpaints."""
        narrow = {"in_channels": self.net.in_channels} if hasattr(net, "up_depth") else {}
        return type(net) is type(self.net) and replace(net, **narrow) == self.net

    @property
    def role(self) -> str:
        return "lora"

    @property
    def wants(self) -> dict[str, int | float | str]:
        """The settings of a request that it was made for, if it was made for some."""
        return {}


@dataclass(frozen=True)
class Fast(Lora):
    """A LoRA that changes the defaults: most let a model draw in few steps."""

    steps: int = 4
    guidance: float = 0.0
    sampler: str = "euler"
    schedule: str = "trailing"

    @property
    def wants(self) -> dict[str, int | float | str]:
        return {name: getattr(self, name) for name in ("steps", "guidance", "sampler", "schedule")}


@dataclass(frozen=True)
class Word(Beside):
    """A textual inversion that has a name here."""

    word: str = ""

    @property
    def role(self) -> str:
        return "word"

    def __str__(self) -> str:  # for people
        return f"a {self.kind}"


@dataclass(frozen=True)
class Model:
    """A published model that has a name here."""

    family: Family
    repo: str | None  # hub id, or None for a model that ships inside the package
    title: str
    licence: str
    download: float  # GB of the files to fetch
    networks: dict[str, Config]  # as `convert.open` reads them from the published checkpoint; tests compare the two
    defaults: Defaults
    variant: str = "base"
    prediction: str | None = None  # if it differs from the family's
    gated: bool = False  # whether users must first accept its licence on the hub
    parts: dict[str, float] = field(default_factory=dict)  # GB of the components that single files of it may lack
