"""Qwen3 as a text encoder against transformers' with the same random weights."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlxdiff.models import qwen3

from ..checkpoints import manifest
from .oracle import error, give, randomize, rounded

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


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "eps"), [(mx.float16, torch.float16, 2**-11), (mx.bfloat16, torch.bfloat16, 2**-8)]
)
def test_half_precision_loses_only_rounding(dtype, torch_dtype, eps):
    config = CASES["8B"]
    theirs, ours = pair(config, 2)
    give(rounded(theirs, torch_dtype), ours, dtype, read(config))
    ids, mask = prompts(config, 3, 20)
    out = ours(mx.array(ids.astype(np.int32)), mx.array(mask))
    assert out.dtype == mx.float32  # the stream, which may exceed float16
    assert error(out, theirs_of(theirs, config, ids, mask)) < 4 * eps  # 1.7 eps is seen


def test_float16_survives_states_beyond_its_range():
    """Weights with which the gated product, the output of down_proj and the residual stream pass float16's 65504, as
    those of a large language model may at single tokens and channels."""
    config = CASES["8B"]
    theirs, ours = pair(config, 4)
    streams, products = [], []
    for layer in theirs.model.layers[: config.layers]:
        layer.mlp.up_proj.weight.mul_(1e4)
        layer.mlp.down_proj.weight.mul_(40)
        layer.register_forward_hook(lambda module, args, out: streams.append(out.abs().max().item()))
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: products.append(args[0].abs().max().item()))
    give(rounded(theirs, torch.float16), ours, mx.float16, read(config))
    ids, mask = prompts(config, 5, 20)
    reference = theirs_of(theirs, config, ids, mask)
    assert min(streams) > 4 * 65504
    assert max(products) > 65504 / 2
    out = ours(mx.array(ids.astype(np.int32)), mx.array(mask))
    assert error(out, reference) < 16 * 2**-11  # 7 eps are seen


def test_padding_is_not_seen_and_later_tokens_neither():
    """What stands at padded places, and what follows a token, must not move it."""
    config = CASES["Z-Image"]
    _, ours = pair(config, 6)
    mx.eval(ours.parameters())
    ids, mask = prompts(config, 7, 12)
    n = int(mask[0].sum())
    whole = np.array(ours(mx.array(ids.astype(np.int32)), mx.array(mask)))
    alone = np.array(ours(mx.array(ids[:1, :n].astype(np.int32))))
    np.testing.assert_allclose(whole[:1, :n], alone, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    changed = ids.copy()
    changed[0, n:] = (ids[0, n:] + 1) % config.vocab
    again = np.array(ours(mx.array(changed.astype(np.int32)), mx.array(mask)))
    np.testing.assert_array_equal(whole[0, :n], again[0, :n])
    assert np.abs(whole[0, n:] - again[0, n:]).max() > 0.1


def test_parameters_are_those_of_the_published_file():
    """Names and shapes of Qwen3-4B's layers that Z-Image reads; none is made, for ours are lazy."""
    net = qwen3.Qwen3(qwen3.Config(151936, 2560, 35, 32, 8, 128, 9728, 1e6, 1e-6, (35,)))
    published = {k.removeprefix("model."): s for k, s in manifest("qwen3_4b_text_encoder")["tensors"].items()}
    held = {k: s for k, s in published.items() if not k.startswith(("layers.35.", "norm."))}
    assert {name: list(p.shape) for name, p in tree_flatten(net.parameters())} == held
