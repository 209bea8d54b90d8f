"""Steps that reuse earlier ones. References: the rule in numpy; the picture without it; for the networks see
parity/test_reuse.py."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxdiff import images
from mlxdiff.errors import Error
from mlxdiff.generate import main
from mlxdiff.reuse import Passes, Reuse

SIZE = {"seed": 3, "width": 64, "height": 64, "steps": 12}


def psnr(a, b) -> float:
    return 10 * np.log10(255**2 / np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.6])
def test_the_rule_is_that_of_numpy(threshold):
    """Forty steps of random lengths. What an earlier step added is added again where the mean change of what the first
    block adds, relative to its mean at the last step that was computed in full, is at most the threshold."""
    rng = np.random.default_rng(0)
    reuse, held, added, reused = Reuse(threshold), None, None, 0
    first = rng.standard_normal((2, 5, 3)).astype(np.float32)
    for k in range(40):
        first = first + rng.choice([0.01, 0.1, 0.5]) * rng.standard_normal(first.shape).astype(np.float32)
        x, far = rng.standard_normal((2, 2, 5, 3)).astype(np.float32)
        if held is not None and np.abs(first - held).mean() / np.abs(held).mean() <= threshold:
            want, reused = x + added, reused + 1
        else:
            want, held, added = far, first, far - x
        out = reuse(mx.array(first), mx.array(x), lambda far=far: mx.array(far))
        assert np.allclose(np.array(out), want, atol=1e-6), k
    assert (reuse.calls, reuse.reused) == (40, reused)
    assert 0 < reused < 39


def test_a_first_block_that_adds_nothing_is_no_reason_to_reuse():
    """0 / 0 is no change by at most a threshold."""
    reuse, zero = Reuse(1.0), mx.zeros((1, 2))
    for value in (1.0, 2.0):
        assert reuse(zero, zero, lambda value=value: mx.full((1, 2), value)).tolist() == [[value, value]]


def test_a_step_is_reused_if_all_of_its_passes_are():
    """Two passes of a guided step, each with what it keeps itself."""
    passes = Passes(0.1)
    positive, negative = passes.one()["reuse"], passes.one()["reuse"]
    assert positive is not negative
    told = []
    for a, b in ((1.0, 1.0), (1.0, 1.0), (1.0, 2.0), (1.01, 2.0), (2.0, 2.0)):
        for one, value in ((positive, a), (negative, b)):
            one(mx.array([value]), mx.array([0.0]), lambda: mx.array([5.0]))
        told.append(passes.step())
    assert told == [False, True, False, True, False]
    assert Passes(0).one() == {}
    assert not Passes(0).step()


def test_a_picture_reuses_steps_and_says_how_many(pipe):
    """0 is the picture as it always was; more is faster and further from it."""
    whole = pipe("a red house", **SIZE)
    assert whole.reused == 0
    near, far = (pipe("a red house", **SIZE, reuse=reuse) for reuse in (0.05, 1.0))
    print(near.reused, far.reused, psnr(near.image, whole.image), psnr(far.image, whole.image))
    assert 0 < near.reused < far.reused
    assert psnr(far.image, whole.image) < 30 < psnr(near.image, whole.image)
    none = pipe("a red house", **SIZE, reuse=1e-9)
    assert (none.reused, psnr(none.image, whole.image) > 90) == (0, True)


def test_the_command_line_counts_them_and_a_picture_replays(tmp_path, capsys):
    typed = ["a red house", "--steps", "10", "-W", "32", "-H", "32", "--reuse", "0.3"]
    assert main([*typed, "-s", "1", "-b", "2", "-o", str(tmp_path / "a/"), "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [s["request"]["reuse"] for s in said] == [0.3, 0.3]
    assert all(0 < s["reused"] < 10 for s in said)
    assert main(["--from-image", said[1]["path"], "-o", str(tmp_path / "b.png")]) == 0
    assert f"{said[1]['reused']} steps reused" in capsys.readouterr().out
    assert np.array_equal(images.read(tmp_path / "b.png"), images.read(said[1]["path"]))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"reuse": 0.1, "sampler": "heun"}, "reuse 0.1 cannot work: heun computes some steps twice.*euler.*unipc"),
        ({"reuse": 0.1, "sampler": "dpmpp_sde"}, "computes some steps twice"),
        ({"reuse": 0.1, "sampler": "pndm"}, "computes some steps twice"),
        ({"reuse": 0.1, "steps": 7}, "7 steps differ too much.*Take 8 or more"),
        ({"reuse": 1.5}, "reuse must be a number from 0 to 1; 1.5 was given"),
        ({"reuse": float("nan")}, "reuse"),
        ({"reuse": -0.1}, "reuse"),
        ({"reuse": "a"}, "reuse"),
    ],
)
def test_where_it_cannot_work_it_is_refused(pipe, settings, why):
    with pytest.raises(Error, match=f"(?i){why}"):
        pipe.resolve("a", **settings)
