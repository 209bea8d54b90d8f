"""Qwen3 as a text encoder against transformers' with the same random weights."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlxdiff.models import qwen3

from .oracle import error, give, randomize

CASES = {
    # As klein reads the 4B: three of the layers, 4 query heads to a key head, inner width 1.6 times the width.
    "klein": qwen3.Config(97, 20, 27, 4, 1, 8, 76, 1e6, 1e-6, (9, 18, 27)),
    # As the 8B: inner width equal to the width, and a head that is not tied.
    "8B": qwen3.Config(53, 48, 4, 6, 3, 8, 144, 1e6, 1e-6, (2, 4)),
    # As Z-Image reads it: all but the last layer.
    "Z-Image": qwen3.Config(61, 28, 3, 8, 2, 6, 40, 1e4, 1e-5, (3,)),
    "one head": qwen3.Config(31, 12, 2, 1, 1, 10, 22, 1e6, 1e-6, (1, 2)),
}


def pair(config: qwen3.Config, seed: int):
    """Theirs has one layer more than we hold: that layer, its norm and the head must not matter."""
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab,
            hidden_size=config.width,
            num_hidden_layers=config.layers + 1,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.hidden,
            rope_parameters={"rope_type": "default", "rope_theta": config.theta},
            rms_norm_eps=config.eps,
            tie_word_embeddings=config.width != 48,
        )
    )
    return randomize(theirs, seed), qwen3.Qwen3(config)


def read(config: qwen3.Config):
    """The weights that we hold, under our names."""
    dropped = ("lm_head.", "norm.", f"layers.{config.layers}.")

    def rename(weights: dict) -> dict:
        ours = {name.removeprefix("model."): w for name, w in weights.items()}
        return {name: w for name, w in ours.items() if not name.startswith(dropped)}

    return rename


def prompts(config: qwen3.Config, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of different lengths, padded at the right with an id that also occurs in the text, and their mask."""
    ids = np.random.default_rng(seed).integers(0, config.vocab, (2, n))
    lengths = np.array([max(1, n // 3), n - n // 7])
    mask = (np.arange(n) < lengths[:, None]).astype(np.int64)
    ids[mask == 0] = ids[0, 0]
    return ids, mask


def theirs_of(theirs, config: qwen3.Config, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """The states stacked per token on channels, as in Flux2KleinPipeline."""
    out = theirs(torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True, use_cache=False)
    stacked = torch.stack([out.hidden_states[k] for k in config.taps], dim=1)  # (B, taps, N, d)
    return stacked.permute(0, 2, 1, 3).flatten(2)


@pytest.mark.parametrize("n", [1, 9, 77])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_qwen3_equals_transformers(config, n):
    """Also at padded positions, which FLUX.2 reads. 1e-5: float32 sums of other orders through up to 27 layers."""
    theirs, ours = pair(config, seed=n)
    give(theirs, ours, rename=read(config))
    ids, mask = prompts(config, n, n)
    want = theirs_of(theirs, config, ids, mask)
    assert error(ours(mx.array(ids.astype(np.int32)), mx.array(mask)), want) < 1e-5
