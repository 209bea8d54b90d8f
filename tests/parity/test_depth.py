"""Depth Anything against transformers with the same random weights, at odd sizes, and what stands around it: resizing
against torch, the picture that it reads and the one that it makes against transformers' processor."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import load_file
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from mlxdiff import convert, detect, store
from mlxdiff.convert.depth import V2_SMALL
from mlxdiff.errors import Error
from mlxdiff.models.depth import resized
from tests.checkpoints import full, sparse

from .oracle import error, nchw, nhwc, randomize

PATCH = 4


def oracle(folder, layers: int = 4, taps=(1, 2, 3, 4), **more) -> DepthAnythingForDepthEstimation:
    inside = {"hidden_size": 24, "num_attention_heads": 3, "image_size": 5 * PATCH, "patch_size": PATCH}
    inside |= {"num_hidden_layers": layers, "out_indices": list(taps), "reshape_hidden_states": False}
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(**inside),
        patch_size=PATCH,
        reassemble_hidden_size=24,
        neck_hidden_sizes=[6, 8, 10, 12],
        fusion_hidden_size=8,
        head_hidden_size=6,
    )
    theirs = randomize(DepthAnythingForDepthEstimation(config), 0)
    theirs.head.conv3.bias.data.fill_(1.0)  # else most of the map would be cut at 0
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    return oracle(folder), folder


@pytest.mark.parametrize("size", [(5, 5), (3, 7), (8, 2), (1, 1)])
def test_it_equals_transformers(saved, size):
    """In patches: the size that it was trained at, and others, whose positions are resized."""
    theirs, folder = saved
    ours = store.network(folder, "a depth model", "", dtype="float32")
    x = np.random.default_rng(1).standard_normal((2, 3, size[0] * PATCH, size[1] * PATCH), np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).predicted_depth
    assert (expected > 0).float().mean() > 0.2
    assert error(ours(nhwc(x)), expected) < 1e-4  # float32 in another order


def test_it_reads_the_layers_that_its_settings_name(tmp_path):
    x = np.random.default_rng(1).standard_normal((1, 3, 3 * PATCH, 4 * PATCH), np.float32)
    for taps in ((1, 2, 3, 5), (2, 3, 4, 5)):
        theirs = oracle(tmp_path / str(taps[0]), 6, taps)
        ours = store.network(tmp_path / str(taps[0]), "a depth model", "", dtype="float32")
        with torch.no_grad():
            assert error(ours(nhwc(x)), theirs(torch.tensor(x)).predicted_depth) < 1e-4


@pytest.mark.parametrize("size", [(5, 5), (9, 4), (1, 1), (12, 13), (3, 2)])
def test_resizing_equals_torch(size):
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4), np.float32)
    for kind, how in (
        ("corners", {"mode": "bilinear", "align_corners": True}),
        ("bicubic", {"mode": "bicubic", "align_corners": False}),
    ):
        expected = F.interpolate(torch.tensor(x), size=size, **how)
        assert error(nchw(resized(nhwc(x), *size, kind)), expected) < 1e-5


def photo(w: int, h: int) -> Image.Image:
    rng, (y, x) = np.random.default_rng(2), np.mgrid[:h, :w]
    waves = np.stack([np.sin(x / 17 + c) * np.cos(y / 15 - c) for c in range(3)], -1)
    return Image.fromarray(np.uint8(np.clip(128 + 90 * waves + rng.normal(0, 12, (h, w, 3)), 0, 255)))


def processor(patch: int, edge: int) -> DPTImageProcessorPil:
    return DPTImageProcessorPil(
        size={"height": edge, "width": edge},
        keep_aspect_ratio=True,
        ensure_multiple_of=patch,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (200, 210), (900, 300), (37, 41), (518, 518)])
def test_the_picture_reaches_it_as_the_processor_makes_it(size):
    image = photo(*size)
    expected = processor(14, 518)(image, return_tensors="np")["pixel_values"]
    ours = detect.depth_input(image, 14, 518)
    assert ours.shape == (1, *expected.shape[2:], 3)
    assert error(ours.transpose(0, 3, 1, 2), expected) < 1e-6


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (64, 64)])
def test_the_depth_picture_is_transformers_own(saved, size):
    """As its pipeline makes it: the map at the picture's size, from 0 to 255; near is white, for large is near."""
    theirs, folder = saved
    image, p = photo(*size), processor(PATCH, 5 * PATCH)
    with torch.no_grad():
        outputs = theirs(**p(image, return_tensors="pt"))
    depth = p.post_process_depth_estimation(outputs, target_sizes=[size[::-1]])[0]["predicted_depth"].numpy()
    expected = 255 * (depth - depth.min()) / (depth.max() - depth.min())
    made = detect.run("depth", image, model=folder)
    assert (made.mode, made.size) == ("RGB", size)
    assert np.abs(np.asarray(made, float) - expected[..., None]).max() < 0.6  # rounding to 8 bits
    assert np.asarray(made).std() > 10


def test_the_published_file_is_understood_alone(tmp_path):
    """Without its config.json, as it is fetched. Its shapes are those of transformers' network of that size."""
    inside = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, out_indices=[3, 6, 9, 12])
    with torch.device("meta"):
        theirs = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=inside))
    file = sparse(
        tmp_path / "model.safetensors", {k: tuple(v.shape) for k, v in theirs.state_dict().items()}, dtype="F32"
    )
    checkpoint = convert.open(file)
    assert (checkpoint.components["depth"].config, checkpoint.unmapped, checkpoint.missing) == (V2_SMALL, {}, [])
    assert round(file.stat().st_size / 1e6) == 99  # as the hub lists it
    config = json.loads(theirs.config.to_json_string(use_diff=False)) | {
        "architectures": ["DepthAnythingForDepthEstimation"]
    }
    config["backbone_config"]["reshape_hidden_states"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert.open(tmp_path).components["depth"].config == V2_SMALL


# a change of config.json -> what the error says
BAD = {
    "another backbone": (lambda c: c["backbone_config"].update(model_type="swin"), "model_type = 'swin'"),
    "metres": (lambda c: c.update(depth_estimation_type="metric"), "depth_estimation_type = 'metric'"),
    "no backbone": (lambda c: c.pop("backbone_config"), "backbone_config = None"),
    "a layer that there is not": (lambda c: c["backbone_config"].update(out_indices=[1, 2, 3, 9]), "out_indices"),
    "a layer twice": (lambda c: c["backbone_config"].update(out_indices=[1, 2, 2, 3]), "out_indices = [1, 2, 2, 3]"),
    "other factors": (lambda c: c.update(reassemble_factors=[2, 2, 1, 1]), "reassemble_factors"),
    "heads that do not divide": (lambda c: c["backbone_config"].update(num_attention_heads=5), "of its 5 heads"),
    "more layers": (lambda c: c["backbone_config"].update(num_hidden_layers=5), "missing"),
    "another size": (lambda c: c["backbone_config"].update(image_size=40), "does not fit"),
    "a huge size": (lambda c: c["backbone_config"].update(image_size=10**9), "image_size"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_settings_that_do_not_fit_are_refused(saved, tmp_path, kind):
    change, says = BAD[kind]
    config = json.loads((saved[1] / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved[1] / "model.safetensors").read_bytes())
    with pytest.raises(Error) as e:
        store.network(tmp_path, "a depth model", "", dtype="float32")
    assert says in str(e.value)


def test_damaged_weights_are_refused(saved, tmp_path):
    held = load_file(saved[1] / "model.safetensors")
    held["head.conv1.bias"] = np.full_like(held["head.conv1.bias"], np.nan)
    full(tmp_path / "model.safetensors", held)
    (tmp_path / "config.json").write_bytes((saved[1] / "config.json").read_bytes())
    with pytest.raises(Error, match=r"'head.conv1.bias' .* NaN or infinite"):
        store.network(tmp_path, "a depth model", "", dtype="float32")
    held = {k: v for k, v in held.items() if ".layer.3." not in k}
    with pytest.raises(Error, match="a depth model of 3 layers"):
        store.network(full(tmp_path / "depth.safetensors", held), "a depth model", "", dtype="float32")


def test_compute_stays_in_the_weights_dtype(saved):
    net = store.network(saved[1], "a depth model", "", dtype="float16")
    assert net(mx.zeros((1, 8, 12, 3), mx.float16)).dtype == mx.float16
