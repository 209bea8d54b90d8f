"""How weights are stored: their dtype, and which layers get how many bits."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .errors import Error
from .families import Family
from .families.base import Careful

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# The ways to quantize -> bits per number. A whole number means integers: every group of numbers has a scale and a
# shift. The other ways are MLX's small floats: a group has a scale only.
BITS: dict[int | str, int] = {3: 3, 4: 4, 5: 5, 6: 6, 8: 8, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}
SMALLER = f"{', '.join(map(str, BITS))}: smaller, not faster"
_GROUPS = {"mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
_TEXT = Careful(whole=("text_projection", "embeddings"))


@dataclass(frozen=True)
class Recipe:
    dtype: str
    bits: int | str | None

    def __str__(self) -> str:
        """One word: float16, float16-4bit, float16-mxfp4."""
        if self.bits is None:
            return self.dtype
        return f"{self.dtype}-{self.bits}bit" if isinstance(self.bits, int) else f"{self.dtype}-{self.bits}"


def recipe(bits: int | str | None = None, dtype: str | None = None, family: Family | None = None) -> Recipe:
    """A checked recipe. dtype None: the dtype that suits this machine and the family, if that is known."""
    if bits is not None and bits not in [*BITS]:
        raise Error(f"Weights cannot be quantized to {bits!r}.", f"Use one of {', '.join(map(str, BITS))}.")
    if dtype is not None and dtype not in [*DTYPES]:
        raise Error(f"{dtype!r} is not a dtype for weights.", f"Use one of {', '.join(DTYPES)}.")
    return Recipe(default_dtype(family) if dtype is None else dtype, bits)


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
