"""Vision models against transformers' with the same random weights, and pictures on their way to them against
transformers' processors."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mlxdiff.convert import read
from mlxdiff.models import vision

from .oracle import error, nhwc, randomize

CASES = {
    "like ViT-H": vision.Config(42, 14, 48, 3, 4, 100, "gelu", 20, True, 1e-5),
    "like ViT-L": vision.Config(32, 8, 36, 2, 3, 70, "quick_gelu", 28, True, 1e-5),
    "like SigLIP": vision.Config(32, 8, 36, 3, 3, 70, "gelu_tanh", None, False, 1e-6),
}


def transformer(config: vision.Config, seed: int) -> torch.nn.Module:
    same = {
        "image_size": config.size, "patch_size": config.patch, "hidden_size": config.width,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "intermediate_size": config.hidden, "layer_norm_eps": config.eps,
    }  # fmt: skip
    if config.class_token:
        made = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**same, hidden_act=config.act, projection_dim=config.projection)
        )
    else:
        made = SiglipVisionModel(SiglipVisionConfig(**same, hidden_act="gelu_pytorch_tanh"))
    return randomize(made, seed)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_vision_equals_transformers(config, tmp_path):
    theirs = transformer(config, 0)
    theirs.save_pretrained(tmp_path)
    ours = read(tmp_path, mx.float32)["image_encoder"]
    assert ours.config == config
    pixels = np.random.default_rng(1).standard_normal((2, 3, config.size, config.size)).astype(np.float32)
    want = theirs(torch.tensor(pixels), output_hidden_states=True)
    out = ours(nhwc(pixels))
    # float32 sums in another order; 1e-6 is seen
    assert error(out.inner, want.hidden_states[-2]) < 1e-5
    if config.class_token:
        assert error(out.pooled, want.image_embeds) < 1e-5
    else:
        assert error(out.last, want.last_hidden_state) < 1e-5
        assert out.pooled is None
