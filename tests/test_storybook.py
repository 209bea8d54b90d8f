"""The storybook world: pictures and captions follow from a seed and a scene. References: the scene's own table,
Pillow's resampling across sizes, transformers' CLIPTokenizer for the learned vocabulary."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mlxdiff.train import bpe
from mlxdiff.train import storybook as sb
from mlxdiff.train.storybook import captions

RED_HOUSE = sb.Scene("night", "hills", "full moon", "house", "red", "centre")


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_seed_is_a_picture():
    scene = sb.sample(rng(3))
    assert (sb.render(scene, rng(4), 64) == sb.render(scene, rng(4), 64)).all()
    assert (sb.render(scene, rng(4), 64) != sb.render(scene, rng(5), 64)).any()


@pytest.mark.parametrize("kind", ["time", "terrain", "sky", "object"])
def test_every_word_of_the_world_is_drawn(kind):
    """Changing one word changes the picture, for each pair of words in turn."""
    words = {
        "time": sb.TIMES[:3],
        "terrain": sb.TERRAINS,
        "sky": ("clear", "sun", "clouds", "rainbow"),
        "object": sb.OBJECTS,
    }
    scene = sb.Scene("day", "sea", "sun", "house", "red", "left")
    shown = [sb.render(replace(scene, **{kind: word}), rng(1), 48).astype(int) for word in words[kind]]
    for k, a in enumerate(shown):
        for b in shown[k + 1 :]:
            assert np.abs(a - b).mean() > 0.5  # of 255; one jittered horizon alone changes nothing here


@pytest.mark.parametrize("size", [32, 96, 129])
def test_any_size_is_the_same_picture(size):
    """Against the large render shrunk by Pillow. Edges move by part of a pixel, hence a mean and not a maximum."""
    large = Image.fromarray(sb.render(RED_HOUSE, rng(7), 256)).resize((size, size), Image.Resampling.BOX)
    small = sb.render(RED_HOUSE, rng(7), size)
    assert small.shape == (size, size, 3)
    assert small.dtype == np.uint8
    assert np.abs(small.astype(float) - np.asarray(large)).mean() < 4


def test_the_object_stands_where_the_scene_says():
    """The one saturated red thing in a snow scene: the mean column of red pixels is in its third of the picture."""
    for position, (low, high) in {"left": (0.15, 0.4), "centre": (0.4, 0.6), "right": (0.6, 0.85)}.items():
        picture = sb.render(sb.Scene("day", "snow", "clear", "mushroom", "red", position), rng(2), 64).astype(int)
        red = (picture[..., 0] > 150) & (picture[..., 1] < 90)
        assert red.sum() > 100
        assert low < np.nonzero(red)[1].mean() / 64 < high


def test_training_scenes_hold_out_what_they_say():
    generator = rng()
    seen = [sb.sample(generator) for _ in range(2000)]
    unseen = [sb.sample(generator, unseen=True) for _ in range(200)]
    assert all(sb.valid(s) for s in seen + unseen)
    assert not any(sb.held_out(s) for s in seen)
    assert all(sb.held_out(s) for s in unseen)
    # Every word of a held-out pair is still seen with other partners.
    for kind, words in {"object": sb.OBJECTS, "colour": sb.COLOURS, "terrain": sb.TERRAINS}.items():
        assert {getattr(s, kind) for s in seen} == set(words)


def test_every_lists_all_valid_scenes_once():
    """Closed form: 6 terrains for nine objects and one for the boat; four skies for each of four times."""
    scenes = list(sb.every())
    assert len(set(scenes)) == len(scenes) == 4 * 4 * (9 * 6 + 1) * 8 * 3


def test_plain_caption():
    assert sb.plain(RED_HOUSE) == "a red house on a hill at night under a full moon"
    assert sb.plain(replace(RED_HOUSE, colour="orange", position="left")).startswith("an orange house on the left on")


def test_captions_vary_and_tell_no_lies():
    """No caption names another scene's colour, object or side; left and right are said whenever a subject is."""
    generator, told = rng(1), set()
    for _ in range(1500):
        scene = sb.sample(generator)
        text = sb.caption(scene, generator)
        told.add(text)
        words = set(re.findall(r"[a-z]+", text.replace("green hills", "hills")))
        assert not (words & set(sb.COLOURS)) - {scene.colour}
        sides = words & {"left", "right"}
        assert sides <= {scene.position}
        named = any(noun.split()[-1] in words for noun in captions.NOUNS[scene.object])
        if named and len(words) > 1 and scene.position != "centre":
            assert sides == {scene.position}, text
        others = [n for o, nouns in captions.NOUNS.items() if o != scene.object for n in nouns]
        assert not words & {n for n in others if " " not in n}, text
    assert len(told) > 1300


def test_vocabulary_covers_the_captions():
    """Every word of a caption is in the vocabulary, an opening or a stray word."""
    known = " ".join(w for words in sb.vocabulary().values() for w in words)
    known = set(known.split()) | {*captions.STRAY, *" ".join(captions.OPENINGS).split()}
    known |= {*sb.TIMES, *sb.TERRAINS, *sb.POSITIONS, "the", "a", "an", "moonlight", "lights"}
    generator = rng(2)
    for _ in range(1500):
        text = sb.caption(sb.sample(generator), generator)
        assert set(re.findall(r"[a-z]+", text)) <= known, text


def test_vocabulary_equals_transformers(tmp_path):
    """A learned vocabulary, read back by transformers: whole known words, byte pieces for the rest, CLIP's specials."""
    transformers = pytest.importorskip("transformers")
    generator = rng(3)
    texts = [sb.caption(sb.sample(generator), generator) for _ in range(400)]
    merges = bpe.learn(texts, 1000)
    bpe.save(tmp_path, merges, positions=40)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 512 + len(merges) + 2
    assert tokenizer.model_max_length == 40
    assert tokenizer.tokenize("A red house") == ["a</w>", "red</w>", "house</w>"]
    assert "".join(tokenizer.tokenize("zyx")) == "zyx</w>"
    ids = tokenizer("a red house").input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids(bpe.START)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(bpe.END) == tokenizer.pad_token_id
    assert bpe.learn(texts, 1000) == merges


def test_merges_of_a_hand_made_text():
    """By hand: "ab" three times as a word, once inside "abc"."""
    assert bpe.learn(["ab ab ab abc"], 10) == [("a", "b</w>"), ("a", "b"), ("ab", "c</w>")]
