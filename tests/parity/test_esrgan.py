"""ESRGAN against the same network in torch, written here after the paper and BasicSR's names, with the same random
weights, and read from every form its file comes in; tiles against the whole picture."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mlxdiff import store
from mlxdiff.models.esrgan import folded
from mlxdiff.upscale import AROUND, Upscaler
from tests.checkpoints import esrgan, full

from .oracle import error, nchw, nhwc


def reference(w: dict[str, np.ndarray], x: torch.Tensor, fold: int, blocks: int, doublings: int) -> torch.Tensor:
    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, *(torch.tensor(w[f"{name}.{leaf}"]) for leaf in ("weight", "bias")), padding=1)

    def lrelu(x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x, 0.2)

    def dense(name: str, x: torch.Tensor) -> torch.Tensor:
        made = [x]
        for i in range(4):
            made.append(lrelu(conv(f"{name}.conv{i + 1}", torch.cat(made, 1))))
        return x + 0.2 * conv(f"{name}.conv5", torch.cat(made, 1))

    first = y = conv("conv_first", F.pixel_unshuffle(x, fold))
    for b in range(blocks):
        z = y
        for d in (1, 2, 3):
            z = dense(f"body.{b}.rdb{d}", z)
        y = y + 0.2 * z
    y = first + conv("conv_body", y)
    for i in range(doublings):
        y = lrelu(conv(f"conv_up{i + 1}", F.interpolate(y, scale_factor=2, mode="nearest")))
    return conv("conv_last", lrelu(conv("conv_hr", y)))


def forerunners(name: str) -> str:
    """BSRGAN's and RealSR's names."""
    name = name.replace("body.", "RRDB_trunk.", 1) if name.startswith("body.") else name
    name = name.replace(".rdb", ".RDB").replace("conv_body", "trunk_conv")
    return name.replace("conv_up", "upconv").replace("conv_hr", "HRconv")


def numbered(name: str, blocks: int, doublings: int) -> str:
    """The first ESRGAN's: places in a sequence."""
    head, _, leaf = name.rpartition(".")
    if head.startswith("body."):
        _, b, d, c = head.split(".")
        return f"model.1.sub.{b}.{d.replace('rdb', 'RDB')}.{c}.0.{leaf}"
    places = {"conv_first": "0", "conv_body": f"1.sub.{blocks}"}
    places |= {f"conv_up{i + 1}": str(3 * i + 3) for i in range(doublings)}
    places |= {"conv_hr": str(3 * doublings + 2), "conv_last": str(3 * doublings + 4)}
    return f"model.{places[head]}.{leaf}"


SPELLINGS = {
    "BasicSR": lambda name, *_: name,
    "BasicSR inside its training file": lambda name, *_: f"params_ema.{name}",
    "the forerunners": lambda name, *_: forerunners(name),
    "the first ESRGAN": numbered,
}
KINDS = {  # fold, width, growth, blocks, doublings
    "x1": (1, 8, 4, 2, 0),
    "x1 of folded pictures": (4, 8, 4, 1, 2),
    "x2": (1, 8, 4, 2, 1),
    "x2 of folded pictures": (2, 12, 6, 2, 2),
    "x4": (1, 16, 8, 3, 2),
    "x8": (1, 8, 4, 1, 3),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_reference_in_every_spelling(tmp_path, kind, spelling):
    fold, _, _, blocks, doublings = KINDS[kind]
    w = esrgan(*KINDS[kind])
    named = {SPELLINGS[spelling](name, blocks, doublings): x for name, x in w.items()}
    net = store.network(full(tmp_path / "up.safetensors", named), "an upscaler", "", dtype="float32")
    assert net.config.scale == 2**doublings // fold
    x = np.random.default_rng(1).random((2, 3, 4 * fold, 3 * fold), np.float32)
    expected = reference(w, torch.tensor(x), fold, blocks, doublings)
    assert expected.shape[2:] == (x.shape[2] * net.config.scale, x.shape[3] * net.config.scale)
    assert error(nchw(net(nhwc(x))), expected) < 1e-5  # float32 in another order; tests/README.md has what is seen


def test_a_picture_is_folded_as_torch_folds_it():
    x = np.random.default_rng(0).random((2, 3, 8, 12), np.float32)
    for n in (1, 2, 4):
        assert np.array_equal(nchw(folded(nhwc(x), n)), F.pixel_unshuffle(torch.tensor(x), n).numpy())


def upscaler(tmp_path, *kind: int) -> tuple[Upscaler, dict]:
    w = esrgan(*kind)
    file = full(tmp_path / "up.safetensors", w)
    return Upscaler(file, dtype="float32"), w


def photo(w: int, h: int) -> Image.Image:
    """Smooth colours and some noise."""
    rng, (y, x) = np.random.default_rng(2), np.mgrid[:h, :w]
    waves = np.stack([np.sin(x / 7 + c) * np.cos(y / 5 - c) for c in range(3)], -1)
    return Image.fromarray(np.uint8(np.clip(128 + 90 * waves + rng.normal(0, 12, (h, w, 3)), 0, 255)))


def decibels(a: Image.Image, b: Image.Image) -> float:
    mse = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return 10 * np.log10(255**2 / mse) if mse else np.inf


@pytest.mark.parametrize("kind", [(1, 16, 8, 8, 2), (2, 16, 8, 8, 2), (4, 16, 8, 8, 2)], ids=["x4", "x2", "x1"])
@pytest.mark.parametrize("size", [(83, 61), (1, 1), (2, 5)])
def test_tiles_make_the_whole_picture(tmp_path, monkeypatch, kind, size):
    """Of any size. The whole is the reference's; what it does to a picture's edge, folded ones are filled up with, is
    the mirror's. Tiles know nothing of what lies more than AROUND pixels away, which costs less than 50 dB shows."""
    ours, w = upscaler(tmp_path, *kind)
    fold, s = kind[0], ours.scale
    image = photo(*size)
    x = np.asarray(image, np.float32) / 255
    wide = np.pad(x, [(0, -n % fold) for n in size[::-1]] + [(0, 0)], "symmetric" if 1 in size else "reflect")
    whole = reference(w, torch.tensor(wide).permute(2, 0, 1)[None], fold, *kind[3:])[0].permute(1, 2, 0)
    whole = whole.clamp(0, 1).mul(255).round().numpy().astype(np.uint8)
    whole = Image.fromarray(whole[: s * size[1], : s * size[0]])
    assert decibels(ours(image), whole) > 60  # one tile: rounding to 8 bits alone
    monkeypatch.setattr("mlxdiff.upscale.tile_edge", lambda: (32 + 2 * AROUND * fold) * s)
    tiles = list(ours.tiles(image))
    assert [t.done for t in tiles] == list(range(len(tiles)))
    assert len(tiles) - 1 == {1: 6, 2: 6, 4: 2}[fold] if size == (83, 61) else 1
    assert tiles[-1].image.size == (s * size[0], s * size[1])
    assert decibels(tiles[-1].image, whole) > 50  # 90 is seen, as of the whole: random weights do not reach far
    if size == (83, 61) and fold == 1:
        monkeypatch.setattr("mlxdiff.upscale.AROUND", 0)
        monkeypatch.setattr("mlxdiff.upscale.tile_edge", lambda: 32 * s)
        assert decibels(ours(image), whole) < 45  # there are seams without what lies around


def test_half_precision_loses_only_rounding(tmp_path):
    file = full(tmp_path / "up.safetensors", esrgan(*KINDS["x4"]))
    a, b = (Upscaler(file, dtype=dtype)(photo(24, 20)) for dtype in ("float16", "float32"))
    assert decibels(a, b) > 50  # 11 bits and more, then 8


def test_numbers_that_overflow_stop_the_run(tmp_path):
    loud = ("conv_hr.weight", "conv_last.weight")
    w = {name: x * np.float32(3e4 if name in loud else 1) for name, x in esrgan(*KINDS["x4"]).items()}
    file = full(tmp_path / "up.safetensors", w)
    with pytest.raises(Exception, match=r'not finite. Use `dtype="float32"`'):
        Upscaler(file, dtype="float16")(photo(8, 8))
    assert Upscaler(file, dtype="float32")(photo(8, 8)).size == (32, 32)


def test_compute_stays_in_the_weights_dtype(tmp_path):
    file = full(tmp_path / "up.safetensors", esrgan(*KINDS["x2 of folded pictures"]))
    net = store.network(file, "an upscaler", "", dtype="float16")
    assert net(mx.zeros((1, 8, 8, 3))).dtype == mx.float16
