"""Published models at their full size with random weights, to measure with no download. A row a family: what
`convert.open` says of the published checkpoint, which a test compares."""

import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tokenizers.pre_tokenizers import ByteLevel

from . import weights
from .models import clip, unet, vae
from .pipeline import Pipeline
from .tokenizers import BOS, EOS

_CLIP_L = clip.Config(
    vocab=49408,
    positions=77,
    width=768,
    layers=12,
    heads=12,
    hidden=3072,
    act="quick_gelu",
    projection=None,
    eos=49407,
    eps=1e-5,
)
_CLIP_H = replace(_CLIP_L, width=1024, layers=23, heads=16, hidden=4096, act="gelu")
_CLIP_G = replace(_CLIP_H, width=1280, layers=32, heads=20, hidden=5120, projection=1280)

_SD1 = unet.Config(
    in_channels=4,
    out_channels=4,
    channels=(320, 640, 1280, 1280),
    layers=(2, 2, 2, 2),
    depth=((1, 1), (1, 1), (1, 1), ()),
    up_depth=((), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    mid_depth=1,
    heads=(8, 8, 8, 8),
    context=768,
    groups=32,
    eps=1e-5,
    linear_projection=False,
    time_cond=None,
    added_time=None,
    added=None,
    flip_sin_to_cos=True,
    freq_shift=0,
)
_SD2 = replace(_SD1, heads=(5, 10, 20, 20), context=1024, linear_projection=True)
_SDXL = replace(
    _SD2,
    channels=(320, 640, 1280),
    layers=(2, 2, 2),
    depth=((), (2, 2), (10, 10)),
    up_depth=((10, 10, 10), (2, 2, 2), ()),
    mid_depth=10,
    heads=(5, 10, 20),
    context=2048,
    added_time=256,
    added=2816,
)
_REFINER = replace(
    _SDXL,
    channels=(384, 768, 1536, 1536),
    layers=(2, 2, 2, 2),
    depth=((), (4, 4), (4, 4), ()),
    up_depth=((), (4, 4, 4), (4, 4, 4), ()),
    mid_depth=4,
    heads=(6, 12, 24, 24),
    context=1280,
    added=2560,
)

_VAE = vae.Config(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    channels=(128, 256, 512, 512),
    layers=2,
    groups=32,
    scale=0.18215,
    shift=0.0,
    quant_conv=True,
    post_quant_conv=True,
    mid_attention=True,
)
_VAE_XL = replace(_VAE, scale=0.13025)

ROWS = {
    "sd1": {"text_encoder": _CLIP_L, "unet": _SD1, "vae": _VAE},
    "sd2": {"text_encoder": _CLIP_H, "unet": _SD2, "vae": _VAE},
    "sdxl": {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "unet": _SDXL, "vae": _VAE_XL},
    "sdxl-refiner": {"text_encoder_2": _CLIP_G, "unet": _REFINER, "vae": _VAE_XL},
}
_PREDICTION = {"sd2": "v"}
_SCHEDULE = {
    "betas": "scaled_linear",
    "start": 0.00085,
    "end": 0.012,
    "steps": 1000,
    "zero_snr": False,
    "spacing": "leading",
    "offset": 1,
    "final_alpha_one": False,
    "sampler": None,
}


class RandomPipeline(Pipeline):
    """A family at full size, its weights made when a stage asks for them. On disk: a description and an alphabet for a
    tokenizer, in a folder that goes when this does."""

    def __init__(self, family: str, dtype: str | None = None, low_memory: bool = False):
        self._making = 0.0
        self._place = tempfile.TemporaryDirectory(prefix="mlxdiff-")
        folder = Path(self._place.name)
        components = ROWS[family]
        weights.write_json(
            folder / "model.json",
            {
                "format": weights.FORMAT,
                "name": f"{family} of random weights",
                "family": family,
                "variant": "base",
                "prediction": _PREDICTION.get(family, "eps"),
                "source": "random",
                "recipe": {"dtype": weights.default_dtype() if dtype is None else dtype, "bits": None},
                "schedule": _SCHEDULE,
                "zero_negative": family == "sdxl",
                "components": {name: asdict(config) for name, config in components.items()},
            },
        )
        for name in components:
            if name.startswith("text_encoder"):
                _alphabet(folder / name.replace("text_encoder", "tokenizer"))
        super().__init__(folder, low_memory)

    def _network(self, name: str) -> nn.Module:
        if name not in self._networks:
            kind = weights.component_dtype(self.model["family"], name, self.model["recipe"]["dtype"])
            net = weights.build(name, self.model["components"][name])
            net.set_dtype(weights.DTYPES[kind])
            net.eval()
            begin = time.perf_counter()
            for _, weight in tree_flatten(net.parameters()):
                mx.eval(weight)  # one by one: making all at once would show in the peak memory
            self._making += time.perf_counter() - begin
            self._networks[name] = net
        return self._networks[name]

    def clock(self) -> float:
        """Seconds, less those that went into making weights."""
        return time.perf_counter() - self._making


def _alphabet(folder: Path) -> None:
    """A byte-level BPE without merges: a token a letter."""
    folder.mkdir()
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
