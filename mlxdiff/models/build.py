"""The networks by name. model.json stores the settings of a component: the name of its network and its Config."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import get_type_hints

import mlx.core as mx
import mlx.nn as nn

from ..errors import Error
from ..foreign import fits
from . import (
    clip,
    controlnet,
    depth,
    esrgan,
    flux,
    flux2,
    flux_controlnet,
    ip_adapter,
    qwen3,
    redux,
    sd3,
    sd3_controlnet,
    t2i,
    t5,
    taesd,
    unet,
    vae,
    vision,
    zimage,
)
from .layers import ResBlock

NETWORKS = {
    "clip": (clip.Config, clip.CLIPText),
    "t5": (t5.Config, t5.T5Encoder),
    "qwen3": (qwen3.Config, qwen3.Qwen3),
    "unet": (unet.Config, unet.UNet),
    "controlnet": (controlnet.Config, controlnet.ControlNet),
    "sd3": (sd3.Config, sd3.SD3),
    "flux": (flux.Config, flux.Flux),
    "flux2": (flux2.Config, flux2.Flux2),
    "zimage": (zimage.Config, zimage.ZImage),
    "flux_controlnet": (flux_controlnet.Config, flux_controlnet.FluxControlNet),
    "sd3_controlnet": (sd3_controlnet.Config, sd3_controlnet.SD3ControlNet),
    "union": (controlnet.UnionConfig, controlnet.Union),
    "t2i": (t2i.Config, t2i.T2IAdapter),
    "vae": (vae.Config, vae.VAE),
    "taesd": (taesd.Config, taesd.Decoder),
    "esrgan": (esrgan.Config, esrgan.ESRGAN),
    "depth": (depth.Config, depth.DepthAnything),
    "vision": (vision.Config, vision.Vision),
    "ip_adapter": (ip_adapter.Config, ip_adapter.IPAdapter),
    "redux": (redux.Config, redux.Redux),
}
Config = clip.Config | t5.Config | qwen3.Config | unet.Config | sd3.Config | flux.Config
Config |= controlnet.Config | controlnet.UnionConfig | t2i.Config | flux2.Config | zimage.Config | vae.Config
Config |= taesd.Config | esrgan.Config | depth.Config | vision.Config | ip_adapter.Config | redux.Config
Config |= flux_controlnet.Config | sd3_controlnet.Config
# The layers of denoisers and of CLIP that a training may compute twice, so that it need not keep what is inside.
BLOCKS = (ResBlock, unet.TransformerLayer, clip.Layer, sd3.Block, flux.DoubleBlock, flux.SingleBlock)
BLOCKS += (flux2.DoubleBlock, flux2.SingleBlock, zimage.Block)
# Networks that guide a denoiser -> a function of their Config, the denoiser's, and the pixels that one latent covers:
# what keeps the two from each other, in words; "" if nothing does.
GUIDES = {"controlnet": controlnet.misfit, "union": controlnet.misfit, "t2i": t2i.misfit}
GUIDES |= {"flux_controlnet": flux_controlnet.misfit, "sd3_controlnet": sd3_controlnet.misfit}
# Networks that make of a reference picture what a denoiser reads -> a function of their Config and the denoiser's: the
# same.
READERS = {"ip_adapter": ip_adapter.misfit, "redux": redux.misfit}
MOST_LAYERS = 1000  # in a network; published ones have fewer than 100
# The fields of Configs that count layers.
_LAYERS = ("layers", "depth", "up_depth", "mid_depth", "double", "single", "refiners", "blocks", "rrdb", "doublings")
_LAYERS += ("mixers",)
_MAY_BE_0 = (*_LAYERS, "dual", "eos", "freq_shift")
_MOST = 2**24  # of any number of a Config
# The field of a network's Config that is one of these words.
_WORDS = {"clip": ("act", clip.ACTS), "vision": ("act", clip.ACTS), "ip_adapter": ("kind", ip_adapter.PROJECTIONS)}
_NAMES = {kind: name for name, (kind, _) in NETWORKS.items()}


def name_of(config: Config) -> str:
    """The name in NETWORKS that a Config belongs to."""
    return _NAMES[type(config)]


def settings(config: Config) -> dict:
    """A network's name and Config as model.json stores them."""
    return {"network": name_of(config), **asdict(config)}


def config(settings: dict) -> Config:
    """The Config of stored settings, every value of it checked."""
    named = settings.get("network")
    kind = NETWORKS[named][0] if named in [*NETWORKS] else None
    values = {k: v for k, v in settings.items() if k != "network"}
    if kind is None or kind.__dataclass_fields__.keys() != values.keys():
        raise Error(f"{named!r:.60} and its settings describe no known network.", _AGAIN)
    for key, hint in get_type_hints(kind).items():
        if not fits(values[key], hint) or not all(_in_range(key, v) for v in _numbers(values[key])):
            raise Error(f"{named} has {key} {values[key]!r:.60}, which cannot be.", _AGAIN)
    made = kind(**{k: _tuples(v) for k, v in values.items()})
    check_size(made)
    wrong = _mismatch(made)
    if wrong:
        raise Error(f"{named} has {wrong}.", _AGAIN)
    return made


def check_size(config: Config, tensors: int | None = None) -> None:
    """Raise if a network has too many layers, before it is built: every layer takes memory, even without weights.
    tensors: how many its file holds. Every layer needs one at least."""
    values = vars(config)
    n = sum(sum(_numbers(values[key])) for key in _LAYERS if key in values)
    if type(values.get("layers")) is int:  # in each of the levels, if there are any
        n *= len(values.get("channels", "1"))
    n = max(n, *(sum(1 for _ in _numbers(v)) for v in values.values()))  # a list has a layer, or more, for each number
    if n > MOST_LAYERS:
        raise Error(
            f"{name_of(config)} has {n:,} layers, more than {MOST_LAYERS:,}.", "Use a sound copy of this model."
        )
    if tensors is not None and n > tensors:
        raise Error(f"{name_of(config)} has {n:,} layers; its file holds {tensors:,} tensors.", "Fetch the file again.")


def build(config: Config) -> nn.Module:
    """The network of a Config. Its parameters are lazy: building it allocates nothing but the layers' objects."""
    check_size(config)
    network = NETWORKS[name_of(config)][1](config)
    # MLX draws initial weights from the process's one key. Nobody evaluates these weights, so the key would become a
    # chain of splits that grows with every network: by 80 kB for a small one.
    mx.eval(mx.random.state)
    return network


_AGAIN = "Convert the checkpoint again."


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _mismatch(config: Config) -> str:
    """What in a Config contradicts itself, so that its network could be built but would not run; "" if all fits."""
    values = vars(config)
    channels, heads, groups = (values.get(key) for key in ("channels", "heads", "groups"))
    key, known = _WORDS.get(name_of(config), ("", ()))
    if key and values[key] not in known:
        return f"{key} {values[key]!r:.60}, which is none of {', '.join(known)}"
    levels = {key: len(values[key]) for key in ("channels", "layers", "depth", "up_depth", "heads", "blocks")
              if isinstance(values.get(key), tuple)}  # fmt: skip
    if len({*levels.values()}) > 1 or 0 in levels.values():
        return f"levels {levels}"
    if isinstance(heads, int) and "width" in values and "head_dim" not in values and values["width"] % heads:
        return f"{heads} heads in a width of {values['width']}"
    if "kv_heads" in values and heads % values["kv_heads"]:
        return f"{heads} heads over {values['kv_heads']}"
    if groups is not None and any(c % groups for c in channels):
        return f"{groups} groups in channels {channels}"
    if "axes" in values and (sum(values["axes"]) * heads != values["width"] or any(n % 2 for n in values["axes"])):
        return f"axes {values['axes']} of {heads} heads in a width of {values['width']}"
    if "taps" in values and (not values["taps"] or values["taps"][-1] != values["layers"]):
        return f"taps {values['taps']} of {values['layers']} layers"
    if "depth" in values:
        attends = [bool(a or b) for a, b in zip(config.depth, reversed(config.up_depth), strict=True)]
        attends[-1] |= bool(config.mid_depth)
        down = zip(config.depth, config.layers, strict=True)
        up = zip(reversed(config.up_depth), config.layers, strict=True)
        if any(len(d) not in (0, n) for d, n in down) or any(len(d) not in (0, n + 1) for d, n in up):
            return f"depth {config.depth} of layers {config.layers}"
        if any(a and c % h for a, c, h in zip(attends, channels, heads, strict=True)):
            return f"{heads} heads in channels {channels}"
    return ""


def _numbers(value) -> Iterator[int | float]:
    """The numbers in a value, however deep they lie in lists."""
    if isinstance(value, list | tuple):
        for v in value:
            yield from _numbers(v)
    elif type(value) in (int, float):
        yield value


def _in_range(key: str, value: int | float) -> bool:
    return (0 if key in _MAY_BE_0 else -_MOST if key == "shift" else 1e-30) <= value <= _MOST
