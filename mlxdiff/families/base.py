"""What a family of models is: the rows that every family file fills in. Nothing here is about one family."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..models.build import Config
from ..request import Defaults, Request

# How a denoiser is guided.
SECOND_PASS = "second pass"  # away from the negative prompt, which takes a pass of its own
INPUT = "input"  # the network is told the guidance; only `true_cfg` takes a second pass
NONE = "none"  # the network was distilled to do without; only `true_cfg` takes a second pass
EMBEDDED = "embedded"  # a consistency model is told the guidance through its time embedding; no second pass

# Networks that people keep in files of their own: setting -> what it is.
PARTS = {"vae": "a VAE", "clip": "the CLIP text encoder", "clip_g": "SD3's second CLIP", "t5": "T5"}


@dataclass(frozen=True)
class TextPlan:
    """Which text encoders read a prompt, and how the denoiser gets what they say."""

    clip: tuple[str, ...]  # CLIP encoders, in the order their texts are joined
    final_norm: bool  # whether a CLIP layer below the last still passes the final norm
    pooled: tuple[str, ...] = ()  # which encoders give the pooled vector, in the order they are joined
    sizes: bool = False  # whether the network is told the picture's size
    scores: tuple[float, float] | None = None  # aesthetic score told with the prompt and with the negative prompt
    t5: str | None = None
    t5_tokens: int = 0  # padding included; no mask: the networks were trained to see the padding
    clip_read: bool = True  # whether the denoiser reads CLIP's words, not only its pooled vector

    @property
    def needs(self) -> tuple[str, ...]:
        """The encoders without which there is no picture. Where CLIP is read too, T5 may be left out."""
        return self.clip if self.t5 is None or self.clip_read else (*self.clip, self.t5)

    @property
    def t5_optional(self) -> bool:
        return self.t5 is not None and self.t5 not in self.needs

    @property
    def tokens(self) -> int:
        """Tokens of a short prompt that the denoiser reads."""
        return 77 * self.clip_read + self.t5_tokens


def tokenizer_of(encoder: str) -> str:
    """The folder of a text encoder's tokenizer: text_encoder_2 -> tokenizer_2."""
    return encoder.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Careful:
    """Linear layers of the denoiser that no recipe quantizes like the rest, by parts of their paths."""

    whole: tuple[str, ...]  # stay as they are: small layers that every step or token passes through
    eight: tuple[str, ...] = ()  # keep 8 bits: the modulations of a transformer, a quarter of FLUX


@dataclass(frozen=True)
class Variant:
    """Checkpoints of a family that differ in what they take or are drawn with. None: as the family has it. They are
    recognised by their tensors, not by their names; two of the same tensors by what the checkpoint calls itself."""

    beside: int = 0  # input channels of the denoiser beyond those of its output
    needs: tuple[str, ...] = ()  # what it draws from beside a prompt, in words; such variants cannot draw yet
    converts: bool = True
    guidance: str | None = None
    t5_tokens: int | None = None
    defaults: Defaults | None = None
    schedule: dict | None = None
    edits: bool = False  # takes a picture to edit, which is not one to begin with


@dataclass(frozen=True)
class Family:
    name: str  # as model.json has it
    title: str
    denoiser: str  # the component that denoises
    network: str  # which network that is, of models.build
    text: TextPlan
    defaults: Defaults
    fallback: tuple[str, str]  # sampler and schedule for checkpoints whose own scheduler is not one of ours
    prediction: str  # eps, v, x0 or flow, where the checkpoint does not say
    schedule: dict  # of checkpoints that bring none
    clip_skip: int  # which text layer is read, counted from the end: 1 is the last
    vae_float16: bool  # whether the VAE is known not to overflow in float16
    taesd: str  # hub id of the tiny decoder for its latents
    preview: tuple[tuple[float, ...], ...]  # latents to RGB: a row a channel, then the bias (ComfyUI's figures)
    careful: Careful
    activations: Callable[[Config, int, int, bool], float]  # (network, latents, tokens, gpu) -> numbers a sample holds
    guidance: str = SECOND_PASS
    patch: int = 1  # latents along an edge that make one token
    zero_negative: bool = False  # no negative prompt is zeros, not an empty text
    takes: tuple[str, ...] = ()  # settings that not every family has, see `description.SPECIAL`
    variants: dict[str, Variant] = field(default_factory=lambda: {"base": Variant()})
    # (name of the model, denoiser, what edges are multiples of, resolved request): refuses what it cannot draw.
    check: Callable[[str, Config, int, Request], None] | None = None

    @property
    def flow(self) -> bool:
        return self.prediction == "flow"


@dataclass(frozen=True)
class Model:
    """A published model that has a name here."""

    family: Family
    repo: str | None  # hub id, or None for a model that ships inside the package
    title: str
    licence: str
    download: float  # GB of the files that are fetched
    networks: dict[str, Config]  # what `convert.open` says of the published checkpoint, which tests compare
    defaults: Defaults
    variant: str = "base"
    prediction: str | None = None  # where it is not the family's
    gated: bool = False  # whether its licence must be accepted on the hub first
