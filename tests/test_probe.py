"""What words do inside a run. References: softmax(q k^T / sqrt(d)) in numpy from the layers' weights, the same run
without the probe, transformers' tokenizer."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import mlxdiff
from mlxdiff import probe
from mlxdiff.errors import Error
from mlxdiff.models import layers

FOLDER = Path(mlxdiff.__file__).parent / "builtin" / "storybook"
NIGHT = "a red house under a full moon"
SETTINGS = {"seed": 7, "steps": 3, "width": 64, "height": 48}  # a level of 3 x 4 is halved to 2 x 2


@pytest.fixture(scope="module")
def pipe():
    return mlxdiff.load("storybook")


def attentions(pipe):
    net = pipe.networks.get("unet")
    return [t.attn2 for block in net.blocks() for a in block.attentions for t in a.transformer_blocks]


def watch_inputs(monkeypatch):
    """Every attention layer's input, as it is called: (layer, x)."""
    calls, own = [], layers.Attention.__call__

    def told(self, x, kv):
        calls.append((self, x))
        return own(self, x, kv)

    monkeypatch.setattr(layers.Attention, "__call__", told)
    return calls


def enlarged(plane, h, w):
    """Bilinear, pixels at their centres."""
    for axis, n in enumerate((h, w)):
        at, size = (np.arange(n) + 0.5) * plane.shape[axis] / n - 0.5, plane.shape[axis]
        plane = np.apply_along_axis(lambda line, at=at, size=size: np.interp(at, np.arange(size), line), axis, plane)
    return plane


def test_two_sides_need_guidance(pipe):
    with pytest.raises(Error, match="one prediction, not two"):
        probe.sides(pipe, NIGHT, guidance=1.0)


def test_maps_are_the_softmax_of_the_prompts_side(pipe, monkeypatch):
    """From the layers' inputs and weights and the prompt's text; float32 against float64, so to 1e-5."""
    calls = watch_inputs(monkeypatch)
    *_, last = probe.attention(pipe, NIGHT, **SETTINGS)
    context, own = np.array(pipe._texts[1][1].context[0], np.float64), attentions(pipe)
    expected = []
    for layer, x in [(layer, x) for layer, x in calls if any(layer is a for a in own)][-len(own) :]:
        assert x.shape[0] == 2  # guided: negative and positive
        q, k = (
            (a @ np.array(to.weight, np.float64).T).reshape(len(a), layer.heads, -1).swapaxes(0, 1)
            for a, to in ((np.array(x[1], np.float64), layer.to_q), (context, layer.to_k))
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))  # (heads, hw, N)
        softmax = (scores / scores.sum(-1, keepdims=True)).mean(0)
        h, w = {48: (6, 8), 12: (3, 4), 4: (2, 2), 1: (1, 1)}[len(softmax)]
        expected.append([enlarged(plane.reshape(h, w), 6, 8) for plane in softmax.T])
    assert last.maps.shape == (40, 6, 8)
    np.testing.assert_allclose(last.maps, np.mean(expected, axis=0), atol=1e-5)
    np.testing.assert_allclose(last.maps.sum(0), 1, atol=1e-5)


def test_the_probe_changes_no_step(pipe):
    """To the last bit, and a noisy sampler's steps too."""
    settings = SETTINGS | {"sampler": "euler_ancestral", "count": 2}
    plain = list(probe.trace(pipe, NIGHT, **settings))
    for step, seen in zip(plain, probe.attention(pipe, NIGHT, **settings), strict=True):
        assert (seen.step.x0 == step.x0).all()
        assert seen.step.sigma == step.sigma


def test_two_passes_in_turn_give_the_maps_of_the_batch(pipe):
    """Low memory runs the prompt's side by itself; float32 sums in another order, so to 1e-5."""
    saving = mlxdiff.load("storybook", low_memory=True)
    for a, b in zip(*(probe.attention(p, NIGHT, **SETTINGS) for p in (pipe, saving)), strict=True):
        np.testing.assert_allclose(a.maps, b.maps, atol=1e-5)


def test_the_network_is_put_back_whatever_happens(pipe, monkeypatch):
    before = attentions(pipe)
    seen = probe.attention(pipe, NIGHT, **SETTINGS)
    next(seen)
    assert all(a is b for a, b in zip(attentions(pipe), before, strict=True))  # left between two steps
    own, count = layers.Attention.__call__, iter(range(1000))

    def interrupted(self, x, kv):
        if next(count) == 5:
            raise KeyboardInterrupt
        return own(self, x, kv)

    monkeypatch.setattr(layers.Attention, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(seen)
    assert all(a is b for a, b in zip(attentions(pipe), before, strict=True))


def test_what_has_no_one_unet_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "refiner", pipe)
    with pytest.raises(Error, match="one U-Net"):
        next(probe.attention(pipe, NIGHT))


PROMPTS = ["a red house under a full moon", "An elephant plays chess, at 9 o'clock: Löwe 東京!", ""]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_and_merges_are_transformers_tokens(pipe, prompt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    ids = theirs(prompt, padding="max_length").input_ids
    (ours,) = probe.tokens(pipe, prompt)
    assert [t.id for t in ours] == ids
    assert [t.piece for t in ours] == theirs.convert_ids_to_tokens(ids)
    assert [states[-1] for states in probe.merges(pipe, prompt)] == words(theirs.tokenize(prompt))
    text = [t for t in ours if t.role == "text"]
    assert len(text) == len(theirs.tokenize(prompt))
    assert [t.role for t in ours] == ["begin", *["text"] * len(text), "end", *["padding"] * (38 - len(text))]


def words(pieces):
    out = [[]]
    for piece in pieces:
        out[-1].append(piece)
        if piece.endswith("</w>"):
            out.append([])
    return out[:-1]


def test_a_merge_joins_one_pair_and_loses_no_letter(pipe):
    """By hand for one word, by its letters for the rest."""
    (states,) = probe.merges(pipe, "moon")
    assert states[0] == ["m", "o", "o", "n</w>"]
    for states in probe.merges(pipe, "mississippi toadstool lighthouse"):
        assert len({"".join(state) for state in states}) == 1
        for a, b in pairwise(states):
            assert len(b) < len(a)
            assert len(set(b) - set(a)) <= 1


def test_weights_and_chunks_are_told(pipe):
    first, second = probe.tokens(pipe, "a (red:1.3) house BREAK the moon")
    assert [(t.piece, t.weight) for t in first[:5]] == [
        ("<|startoftext|>", 1), ("a</w>", 1), ("red</w>", 1.3), ("house</w>", 1), ("<|endoftext|>", 1),
    ]  # fmt: skip
    assert [t.piece for t in second[1:3]] == ["the</w>", "moon</w>"]
    assert len(probe.tokens(pipe, "a house", negative="moon " * 40)) == 2  # as many as the longer of the two
    assert len(probe.tokens(pipe, "a house", negative="moon " * 40, guidance=1.0)) == 1
    assert len(next(probe.attention(pipe, "a house BREAK a moon", **SETTINGS)).maps) == 80
