"""CLIPText against transformers' CLIPTextModel and CLIPTextModelWithProjection with the same random weights."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlxdiff.models import clip

from .oracle import error, give, randomize, rounded

CASES = {
    "like CLIP-L": clip.Config(99, 77, 36, 3, 3, 70, "quick_gelu", None, 98, 1e-5),
    "like bigG": clip.Config(101, 77, 60, 4, 5, 130, "gelu", 28, 100, 1e-5),
}


def pair(config: clip.Config, seed: int):
    kind = CLIPTextModel if config.projection is None else CLIPTextModelWithProjection
    theirs = kind(
        CLIPTextConfig(
            vocab_size=config.vocab,
            max_position_embeddings=config.positions,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            hidden_act=config.act,
            projection_dim=config.projection or 1,
            eos_token_id=config.eos,
            layer_norm_eps=config.eps,
        )
    )
    return randomize(theirs, seed), clip.CLIPText(config)


def prompts(config: clip.Config, seed: int) -> np.ndarray:
    """Two rows that end at different places, padded with eos as CLIP-L does and with 0 as bigG does."""
    ids = np.random.default_rng(seed).integers(1, config.eos, (2, 77))
    ids[0, 20:], ids[1, 5:] = config.eos, 0
    ids[1, 5] = config.eos
    return ids


def reference(theirs, ids: np.ndarray) -> tuple:
    out = theirs(torch.tensor(ids), output_hidden_states=True)
    pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    return out.hidden_states, out.last_hidden_state, pooled


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_clip_equals_transformers(config):
    theirs, ours = pair(config, 0)
    give(theirs, ours)
    ids = prompts(config, 1)
    states, last, pooled = reference(theirs, ids)
    out = ours(mx.array(ids.astype(np.int32)))
    assert len(out.states) == len(states) == config.layers + 1
    for ours_k, theirs_k in zip(out.states, states, strict=True):  # every layer clip skip may choose
        assert error(ours_k, theirs_k) < 1e-5  # float32 sums in another order; 5e-7 is seen
    assert error(out.last, last) < 1e-5
    assert error(out.pooled, pooled) < 1e-5


def test_pooled_without_eos_is_at_the_highest_id():
    """transformers' rule for files that say eos_token_id 2, as all early ones do."""
    config = CASES["like CLIP-L"]
    theirs, ours = pair(config, 2)
    theirs.eos_token_id = 2
    give(theirs, ours)
    ids = prompts(config, 3) % config.eos
    _, _, pooled = reference(theirs, ids)
    assert error(ours(mx.array(ids.astype(np.int32))).pooled, pooled) < 1e-5


# A row of about twenty roundings in each of the layers, which add up as a random walk: a few eps at the worst value.
@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "eps"), [(mx.float16, torch.float16, 2**-11), (mx.bfloat16, torch.bfloat16, 2**-8)]
)
def test_half_precision_loses_only_rounding(dtype, torch_dtype, eps):
    config = CASES["like bigG"]
    theirs, ours = pair(config, 4)
    give(rounded(theirs, torch_dtype), ours, dtype)
    ids = prompts(config, 5)
    _, last, pooled = reference(theirs, ids)
    out = ours(mx.array(ids.astype(np.int32)))
    assert out.last.dtype == out.pooled.dtype == dtype
    assert error(out.last, last) < 8 * eps  # 3 eps is seen
    assert error(out.pooled, pooled) < 8 * eps
