"""Vision models against transformers' with the same random weights, and pictures on their way to them against
transformers' processors."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mlxdiff.convert import read
from mlxdiff.models import vision
from mlxdiff.references import pixels

from .oracle import error, nchw, nhwc, randomize

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


@pytest.mark.parametrize("size", [(301, 211), (211, 301), (224, 224), (100, 801), (60, 50), (1000, 999)])
@pytest.mark.parametrize(
    ("config", "processor"),
    [
        (vision.Config(224, 14, 48, 1, 4, 100, "gelu", 20, True, 1e-5), CLIPImageProcessorPil()),
        (
            vision.Config(384, 14, 48, 1, 4, 100, "gelu_tanh", None, False, 1e-6),
            SiglipImageProcessorPil(size={"height": 384, "width": 384}),
        ),
    ],
    ids=["CLIP", "SigLIP"],
)
def test_pictures_reach_them_as_in_transformers(config, processor, size):
    noise = np.random.default_rng(2).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    want = processor(Image.fromarray(noise), return_tensors="np").pixel_values
    assert error(nchw(pixels(Image.fromarray(noise), config)), torch.tensor(want)) < 1e-6  # roundings of float32


def test_of_a_very_long_picture_the_middle_is_read():
    """Scaled whole, it would take gigabytes."""
    config = vision.Config(224, 14, 48, 1, 4, 100, "gelu", 20, True, 1e-5)
    long = np.zeros((2, 16384, 3), np.uint8)
    long[:, 8180:8204] = 255  # the middle of the picture
    read = np.array(pixels(Image.fromarray(long), config))[0]
    assert read.min() > 1.5  # all white
