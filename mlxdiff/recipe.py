"""How weights are stored: their dtype, and which layers get how many bits."""

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from .errors import Error
from .families import Family
from .families.base import Careful

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# The ways to quantize -> bits per number. A whole number means integers: every group of numbers has a scale and a
# shift. The other ways are MLX's small floats: a group has a scale only.
BITS: dict[int | str, int] = {3: 3, 4: 4, 5: 5, 6: 6, 8: 8, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}
SMALLER = f"quantize the weights, for less memory, not for speed: {', '.join(map(str, BITS))}"
OF_TEXT = "bits of T5 and Qwen3; 16: all (default: as -q; without it 8 on a GPU with less than 32 GB, else 16)"
_GROUPS = {"mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
_TEXT = Careful(whole=("text_projection", "embeddings"))
WHOLE = 16  # `text_bits` of text encoders that are not quantized
TEXT_BITS = (WHOLE, *BITS)
_AMPLE = 32 * 2**30  # bytes of a GPU's memory; with less, large text encoders are quantized


@dataclass(frozen=True)
class Recipe:
    dtype: str
    bits: int | str | None
    text_bits: int | str | None = None  # of T5 and Qwen3, or WHOLE; None: as `bits`

    def __str__(self) -> str:
        """One word: float16, float16-4bit, float16-mxfp4, float16-text8."""
        word = self.dtype
        if self.bits is not None:
            word += f"-{self.bits}bit" if isinstance(self.bits, int) else f"-{self.bits}"
        return word if self.text_bits is None else f"{word}-text{self.text_bits}"

    def values(self) -> dict:
        """Its fields, `text_bits` only where it is set."""
        return {name: value for name, value in vars(self).items() if name != "text_bits" or value is not None}

    def of(self, family: Family | None) -> "Recipe":
        """The same for a family, which may have neither T5 nor Qwen3."""
        return self if family is None or large_text(family) else replace(self, text_bits=None)


def recipe(
    bits: int | str | None = None,
    dtype: str | None = None,
    family: Family | None = None,
    text_bits: int | str | None = None,
) -> Recipe:
    """A checked recipe. dtype None: the dtype that suits this machine and the family, if that is known. text_bits None:
    those of `bits`; if that is None too, 8 on a GPU with little memory."""
    if bits is not None and bits not in [*BITS]:
        raise Error(f"Weights cannot be quantized to {bits!r}.", f"Use one of {', '.join(map(str, BITS))}.")
    if text_bits is not None and text_bits not in [*TEXT_BITS]:
        choices = f"Use one of {', '.join(map(str, TEXT_BITS))}; {WHOLE} quantizes nothing."
        raise Error(f"Text encoders cannot have `text_bits` {text_bits!r}.", choices)
    if dtype is not None and dtype not in [*DTYPES]:
        raise Error(f"{dtype!r} is not a dtype for weights.", f"Use one of {', '.join(DTYPES)}.")
    if text_bits is None and bits is None and _little_memory():
        text_bits = 8
    return Recipe(default_dtype(family) if dtype is None else dtype, bits, text_bits).of(family)


def _little_memory() -> bool:
    """Whether a GPU computes and has less than 32 GB, or shares less. A CPU multiplies quantized weights slowly."""
    if mx.default_device() != mx.Device(mx.gpu):
        return False
    info = mx.device_info()
    return int(info.get("memory_size", info.get("total_memory", _AMPLE))) < _AMPLE


def large_text(family: Family) -> tuple[str, ...]:
    """The text encoders of a family that have billions of parameters."""
    return tuple(name for name, network in family.text.encoders.items() if network in ("t5", "qwen3"))


def component_bits(family: Family | None, name: str, recipe: Recipe) -> int | str | None:
    """The bits of a component's quantized layers; None: none are."""
    bits = recipe.bits
    if recipe.text_bits is not None and family is not None and name in large_text(family):
        bits = recipe.text_bits
    return None if bits == WHOLE else bits


def default_dtype(family: Family | None = None) -> str:
    """float32 on a CPU, where half precision is emulated; float16 on M1 and M2, whose GPUs emulate bfloat16; bfloat16
    on any other GPU, but float16 for a U-Net: Metal's convolutions keep their intermediates in the input's dtype (by
    Winograd), and are off by 6 % in bfloat16, by 0.75 % in float16."""
    if mx.default_device() != mx.Device(mx.gpu):
        return "float32"
    if family is not None and family.denoiser == "unet":
        return "float16"
    chip = str(mx.device_info().get("architecture", ""))  # "applegpu_g13s": 13 is M1, 14 is M2, 15 is M3
    digits = "".join(c for c in chip.removeprefix("applegpu_g") if c.isdigit())
    return "float16" if chip.startswith("applegpu") and digits and int(digits) < 15 else "bfloat16"


def component_dtype(family: Family | None, name: str, dtype: str) -> str:
    """The model's dtype. A VAE gets float32, or float16 if it is known not to overflow there; in bfloat16, with
    its 8 significant bits, pictures would show banding."""
    if name == "vae" and not (dtype == "float16" and family is not None and family.vae_float16):
        return "float32"
    return dtype


def bits_of(text: str) -> int | str:
    """The value of the command line's -q: one of BITS."""
    return int(text) if text.isdigit() else text


def quantization_plan(family: Family, name: str, module: nn.Module, bits: int | str | None) -> dict[str, dict]:
    """Which Linear layers of a component are quantized, and how, by MLX's names: {path: {group_size, bits, mode}}."""
    if bits is None or name == "vae":
        return {}
    layers, careful = {}, family.careful if name == family.denoiser else _TEXT
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not any(k in path for k in careful.whole):
            kind = 8 if any(k in path for k in careful.eight) else bits
            group = next((g for g in _GROUPS.get(kind, (64, 32)) if layer.weight.shape[1] % g == 0), None)
            if group is not None:
                layers[path] = {"group_size": group, "bits": BITS[kind], "mode": kind if kind in _GROUPS else "affine"}
    return layers
