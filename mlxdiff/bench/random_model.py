"""Published models at full size, or at full width and less depth, of random weights: to measure without any file."""

import json
import math
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from tokenizers import Tokenizer, models, pre_tokenizers

from .. import weights
from ..errors import Error
from ..pipeline import Pipeline
from ..published import ROWS, Config
from ..registry import MODELS
from ..tokenizers import BOS, EOS

_DISCRETE = {
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
_FLOW = {
    "steps": 1000,
    "shift": 3.0,
    "dynamic": None,
    "spacing": "trailing",
    "ends": "trailing",
    "sampler": "euler",
}


class RandomPipeline(Pipeline):
    """A named model, its weights made when a stage asks for them. On disk: a description and alphabets for tokenizers,
    in a folder that goes when this does. blocks: how many to keep of each kind, in the transformers and in T5."""

    def __init__(
        self,
        name: str,
        dtype: str | None = None,
        low_memory: bool = False,
        blocks: int | None = None,
        force: bool = False,
        bits: int | str | None = None,
    ):
        self._making = 0.0
        self._place = tempfile.TemporaryDirectory(prefix="mlxdiff-")
        folder, row = Path(self._place.name), MODELS[name]
        components = {n: asdict(c) for n, c in shallow(name, blocks).items()}
        flow = "transformer" in components
        weights.write_json(
            folder / "model.json",
            {
                "format": weights.FORMAT,
                "name": f"{name} of random weights",
                "family": row.family,
                "variant": {"lcm": "lcm", "flux-schnell": "schnell"}.get(name, "base"),
                "prediction": "flow" if flow else {"sd2": "v"}.get(row.family, "eps"),
                "source": "random",
                "recipe": weights.recipe(bits, dtype),
                "schedule": _FLOW if flow else _DISCRETE,
                "zero_negative": row.family == "sdxl",
                "components": components,
            },
        )
        for part, config in components.items():
            if part.startswith("text_encoder"):
                (_t5_alphabet if "buckets" in config else _alphabet)(folder / part.replace("text_encoder", "tokenizer"))
        super().__init__(folder, low_memory, row.defaults, force)

    def network(self, name: str) -> nn.Module:
        """A transformer is left to be made when it is loaded, by then without what only its preparation reads."""
        if name in self._networks or name == "transformer":
            return super().network(name)
        begin, net = time.perf_counter(), super().network(name)
        mx.eval(net.parameters())
        self._making += time.perf_counter() - begin
        return net

    def _open(self, name: str) -> nn.Module:
        kind = weights.DTYPES[weights.component_dtype(self.model["family"], name, self.model["recipe"]["dtype"])]
        net = weights.build(name, self.model["components"][name])
        net.update(tree_map(lambda p: _random(p.shape, kind) if p.ndim > 1 else p.astype(kind), net.parameters()))
        return weights.quantized(net, weights.plan(name, net, self.model["recipe"]["bits"])).eval()

    def clock(self) -> float:
        """Seconds, less those that went into making weights."""
        return time.perf_counter() - self._making


def shallow(name: str, blocks: int | None) -> dict[str, Config]:
    """A model's networks, with no more than so many blocks of each kind."""
    if blocks is None:
        return ROWS[name]
    if "unet" in ROWS[name]:
        raise Error(f"{name} is a U-Net, which is not cut.", "Leave --blocks out.")

    def cut(config: Config) -> Config:
        depth = {k: min(blocks, v) for k, v in vars(config).items() if k in ("double", "single", "layers")}
        if hasattr(config, "dual"):
            depth["dual"] = tuple(i for i in config.dual if i < blocks)
        return replace(config, **depth)

    return {n: c if n == "vae" or hasattr(c, "act") else cut(c) for n, c in ROWS[name].items()}  # act: CLIP


def _random(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A matrix or kernel whose rows are windows of one random row, each begun a number later: memory to fill, but no
    time for a generator. As large as leaves what passes through its size."""
    inner = math.prod(shape[1:])
    row = (mx.random.normal((shape[0] + inner,), key=mx.random.key(inner)) * inner**-0.5).astype(dtype)
    return mx.contiguous(mx.as_strided(row, (shape[0], inner), (1, 1))).reshape(shape)


def _letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _alphabet(folder: Path) -> None:
    """A byte-level BPE without merges: a token a letter."""
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
