"""The networks by name. model.json stores the settings of a component: the name of its network and its Config."""

from dataclasses import asdict

import mlx.nn as nn

from ..errors import Error
from . import clip, flux, flux2, qwen3, sd3, t5, taesd, unet, vae, zimage

NETWORKS = {
    "clip": (clip.Config, clip.CLIPText),
    "t5": (t5.Config, t5.T5Encoder),
    "qwen3": (qwen3.Config, qwen3.Qwen3),
    "unet": (unet.Config, unet.UNet),
    "sd3": (sd3.Config, sd3.SD3),
    "flux": (flux.Config, flux.Flux),
    "flux2": (flux2.Config, flux2.Flux2),
    "zimage": (zimage.Config, zimage.ZImage),
    "vae": (vae.Config, vae.VAE),
    "taesd": (taesd.Config, taesd.Decoder),
}
Config = clip.Config | t5.Config | qwen3.Config | unet.Config | sd3.Config | flux.Config
Config |= flux2.Config | zimage.Config | vae.Config | taesd.Config
_NAMES = {kind: name for name, (kind, _) in NETWORKS.items()}


def name_of(config: Config) -> str:
    """The name in NETWORKS that a Config belongs to."""
    return _NAMES[type(config)]


def settings(config: Config) -> dict:
    """A network's name and Config as model.json stores them."""
    return {"network": name_of(config), **asdict(config)}


def config(settings: dict) -> Config:
    """The Config of stored settings."""
    values = {k: _tuples(v) for k, v in settings.items() if k != "network"}
    kind = NETWORKS[settings["network"]][0] if settings.get("network") in [*NETWORKS] else None
    if kind is None or kind.__dataclass_fields__.keys() != values.keys():
        raise Error(f"{settings.get('network')!r:.60} and its settings describe no known network.", _AGAIN)
    return kind(**values)


def build(config: Config) -> nn.Module:
    """The network of a Config. Its parameters are lazy: building it allocates nothing."""
    return NETWORKS[name_of(config)][1](config)


_AGAIN = "Convert the checkpoint again."


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
