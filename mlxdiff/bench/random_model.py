"""Published models with random weights, at full size or with fewer blocks, for measurements without any file."""

import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from tokenizers import Tokenizer, models, pre_tokenizers

from .. import weights
from ..description import Description, published
from ..errors import Error
from ..families import MODELS
from ..families.base import tokenizer_of
from ..models import build
from ..models.build import Config
from ..networks import Networks
from ..pipeline import Pipeline
from ..recipe import DTYPES, component_bits, component_dtype, quantization_plan, recipe
from ..tokenizers import BOS, EOS, QWEN_SPECIAL


class RandomNetworks(Networks):
    """Networks whose random weights are made when a stage needs them. Only minimal tokenizers are on disk, in a folder
    that is deleted with this object."""

    def __init__(self, description: Description):
        self._making = 0.0
        self._place = tempfile.TemporaryDirectory(prefix="mlxdiff-")
        super().__init__(Path(self._place.name), description)
        for name, kind in description.text.encoders.items():
            if name in description.components:
                _ALPHABETS[kind](self.folder / tokenizer_of(name))

    def get(self, name: str) -> nn.Module:
        """Make the weights now and subtract their time. A transformer's weights are made in the load stage, which has
        already dropped those that only `prepare` reads."""
        if name in self or name == "transformer":
            return super().get(name)
        begin, net = time.perf_counter(), super().get(name)
        mx.eval(net.parameters())
        self._making += time.perf_counter() - begin
        return net

    def open(self, name: str) -> nn.Module:
        model = self.description
        kind = DTYPES[component_dtype(model.family, name, model.recipe.dtype)]
        net = build.build(model.components[name])
        net.update(tree_map(lambda p: _random(p.shape, kind) if p.ndim > 1 else p.astype(kind), net.parameters()))
        bits = component_bits(model.family, name, model.recipe)
        return weights.quantized(net, quantization_plan(model.family, name, net, bits)).eval()

    def clock(self) -> float:
        """Seconds, without the time that making weights took."""
        return time.perf_counter() - self._making


def random_pipeline(
    name: str,
    dtype: str | None = None,
    low_memory: bool = False,
    blocks: int | None = None,
    force: bool = False,
    bits: int | str | None = None,
) -> Pipeline:
    """A named model with random weights. blocks: how many of each kind to keep, in the transformers, T5 and Qwen3."""
    model = published(name, recipe(bits, dtype, MODELS[name].family))
    return Pipeline(RandomNetworks(replace(model, components=shallow(name, blocks))), low_memory, force)


def shallow(name: str, blocks: int | None) -> dict[str, Config]:
    """A model's networks with at most `blocks` blocks of each kind."""
    networks = MODELS[name].networks
    if blocks is None:
        return networks
    if "unet" in networks:
        raise Error(f"{name} is a U-Net, which cannot be cut.", "Leave out `blocks`.")

    def cut(config: Config) -> Config:
        depth = {k: min(blocks, v) for k, v in vars(config).items() if k in ("double", "single", "layers")}
        if hasattr(config, "dual"):
            depth["dual"] = tuple(i for i in config.dual if i < blocks)
        if hasattr(config, "taps"):  # as many states as before, though of the same layer
            depth["taps"] = tuple(min(blocks, k) for k in config.taps)
        return replace(config, **depth)

    return {n: c if build.name_of(c) in ("vae", "clip") else cut(c) for n, c in networks.items()}


def _random(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A matrix or kernel whose rows are windows of one random row, each shifted by one number. It fills the memory but
    takes little time to make. Its scale keeps activations at their size."""
    inner = math.prod(shape[1:])
    row = (mx.random.normal((shape[0] + inner,), key=mx.random.key(inner)) * inner**-0.5).astype(dtype)
    return mx.contiguous(mx.as_strided(row, (shape[0], inner), (1, 1))).reshape(shape)


def _letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _alphabet(folder: Path) -> None:
    """Write a byte-level BPE without merges, so each letter is a token."""
    folder.mkdir()
    letters = _letters()
    words = [*letters, *(c + "</w>" for c in letters), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _t5_alphabet(folder: Path) -> None:
    folder.mkdir()
    words = ["<pad>", "</s>", "<unk>", *_letters()]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))


def _qwen_alphabet(folder: Path) -> None:
    folder.mkdir()
    letters = _letters()
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(letters)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    added = {len(letters) + i: {"content": name, "special": True} for i, name in enumerate(QWEN_SPECIAL)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")


_ALPHABETS = {"clip": _alphabet, "t5": _t5_alphabet, "qwen3": _qwen_alphabet}
