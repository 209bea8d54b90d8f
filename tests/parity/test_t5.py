"""T5Encoder against transformers' T5EncoderModel with the same random weights."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from mlxdiff.models import t5

from ..checkpoints import manifest
from .oracle import error, give, randomize, rounded

CASES = {
    "odd heads": t5.Config(97, 36, 3, 5, 12, 70, 32, 128, 1e-6),
    "few buckets": t5.Config(53, 28, 2, 3, 8, 44, 12, 20, 1e-5),
}


def pair(config: t5.Config, seed: int):
    theirs = T5EncoderModel(
        T5Config(
            vocab_size=config.vocab,
            d_model=config.width,
            d_kv=config.head_dim,
            d_ff=config.hidden,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return randomize(theirs, seed), t5.T5Encoder(config)


def once(weights: dict) -> dict:
    """Without the second name of the tied embedding."""
    return {k: v for k, v in weights.items() if k != "encoder.embed_tokens.weight"}


def prompts(config: t5.Config, seed: int, n: int) -> np.ndarray:
    """Two rows that end at different places, padded with 0."""
    ids = np.random.default_rng(seed).integers(1, config.vocab, (2, n))
    ids[0, n // 3 :], ids[1, n - 2 :] = 0, 0
    return ids


def ours_of(net: t5.T5Encoder, ids: np.ndarray) -> mx.array:
    return net(mx.array(ids.astype(np.int32)))


@pytest.mark.parametrize("n", [1, 9, 150])  # 150: past the largest distance that has a bucket of its own
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_t5_equals_transformers(config, n):
    theirs, ours = pair(config, 0)
    give(theirs, ours, rename=once)
    ids = prompts(config, 1, n)
    out = theirs(torch.tensor(ids)).last_hidden_state
    assert error(ours_of(ours, ids), out) < 1e-5  # float32 sums in another order


@pytest.mark.parametrize(("count", "far"), [(32, 128), (12, 20), (16, 100)])
def test_every_distance_falls_into_the_reference_bucket(count, far):
    """Exactly: at a bucket's edge one rounding would move a token's bias to its neighbour's."""
    distance = np.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distance), True, count, far)
    assert (t5.buckets(distance, count, far) == theirs.numpy()).all()


# Scores reach 15, for T5 does not divide them by sqrt(d): rounding q and k moves them by 15 eps, and so the weights.
@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "eps"), [(mx.float16, torch.float16, 2**-11), (mx.bfloat16, torch.bfloat16, 2**-8)]
)
def test_half_precision_loses_only_rounding(dtype, torch_dtype, eps):
    config = CASES["odd heads"]
    theirs, ours = pair(config, 2)
    give(rounded(theirs, torch_dtype), ours, dtype, once)
    ids = prompts(config, 3, 20)
    out = ours_of(ours, ids)
    assert out.dtype == dtype
    theirs = theirs(torch.tensor(ids)).last_hidden_state
    assert error(out, theirs) < 24 * eps  # 8 to 14 eps is seen


def test_float16_survives_what_t5_xxl_does_to_it():
    """Weights with which the output of wo and the residual stream pass float16's 65504 several times over, as those of
    the published T5-XXL do. transformers keeps wo in float32 for it; here every weight is float16."""
    config = CASES["odd heads"]
    theirs, ours = pair(config, 4)
    streams = []
    for block in theirs.encoder.block:
        block.layer[1].DenseReluDense.wi_1.weight.mul_(30)
        block.layer[1].DenseReluDense.wo.weight.mul_(2e4)
        block.layer[1].register_forward_hook(lambda module, args, out: streams.append(out.abs().max().item()))
    give(rounded(theirs, torch.float16), ours, mx.float16, once)
    ids = prompts(config, 5, 20)
    reference = theirs(torch.tensor(ids)).last_hidden_state
    assert len(streams) == config.layers
    assert min(streams) > 4 * 65504
    assert error(ours_of(ours, ids), reference) < 24 * 2**-11


def test_parameters_are_those_of_the_published_file():
    """Names and shapes of T5-XXL's encoder; none is made, for ours are lazy."""
    net = t5.T5Encoder(t5.Config(32128, 4096, 24, 64, 64, 10240, 32, 128, 1e-6))
    assert {name: list(p.shape) for name, p in tree_flatten(net.parameters())} == manifest("t5xxl_encoder")["tensors"]
