"""Training a word on the built-in model. References: the trained reader for its file, an uninterrupted run for a
resumed one. That gradients are torch's, and pictures diffusers', is parity/test_tune.py's."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxdiff import advice
from mlxdiff.convert import embedding as reader
from mlxdiff.errors import Error
from mlxdiff.train import footprint, inversion, tune
from mlxdiff.train.__main__ import main
from tests.training_memory import peak_of_step

WORD = "<ring>"


def begun(pipe, rings, out, **settings) -> inversion.WordRun:
    given = {"word": WORD, "initial": "red house", "size": 64, "batch": 2, "rate": 2e-2, "steps": 4, "vectors": 2}
    return inversion.WordRun(pipe, inversion.WordTuning(images=str(rings), **(given | settings)), out)


def rows(run) -> mx.array:
    (value,) = run.word.vectors.values()
    return value


def test_only_the_rows_of_the_word_move(pipe, rings, tmp_path):
    run = begun(pipe, rings, tmp_path / "run")
    before = {k: np.array(v) for k, v in tree_flatten(run.reader.parameters())}
    losses = [r.loss for r in run.steps()]
    after = dict(tree_flatten(run.reader.parameters()))
    moved = [k for k, v in before.items() if not np.array_equal(v, after[k])]
    assert moved == ["encoders.text_encoder.embeddings.token_embedding.rows"]
    assert np.abs(np.array(after[moved[0]]) - before[moved[0]]).min(axis=1).all()  # both rows
    assert len(losses) == 4
    word = reader.read(run.file, pipe.description)
    assert word.word == WORD
    assert mx.array_equal(word.vectors["text_encoder"], rows(run))


def test_the_text_of_the_word_is_read_as_the_file_says(pipe, rings, tmp_path):
    """What the training reads of a caption is what a picture reads that is drawn with the file."""
    run = begun(pipe, rings, tmp_path / "run", prompt=f"a {WORD} in the snow")
    list(run.steps())
    request = pipe.resolve("", embeddings=[f"{run.out}={WORD}"])
    (want,) = pipe.read([f"a {WORD} in the snow"], request, t5=False)
    got = run.captions.read(run.reader, {"caption": mx.array([0])})["context"]
    np.testing.assert_allclose(np.array(got), np.array(want.context), atol=1e-5)  # float32, other order
    (without,) = pipe.read(["a red house in the snow"], pipe.resolve(""), t5=False)
    assert mx.abs(without.context - want.context).max().item() > 0.1


def test_a_resumed_word_is_the_same_word(pipe, rings, tmp_path):
    whole = begun(pipe, rings, tmp_path / "whole")
    list(whole.steps())
    for report in begun(pipe, rings, tmp_path / "parts").steps():
        if report.step == 2:
            break
    second = begun(pipe, rings, tmp_path / "parts")
    assert [r.step for r in second.steps()] == [3, 4]
    assert mx.array_equal(rows(whole), rows(second))


def test_the_word_moves_the_picture(pipe, rings, tmp_path):
    """A drawn picture with the word listens to its rows: those it began with give another picture."""
    run = begun(pipe, rings, tmp_path / "run", vectors=1, rate=1.0)
    run.out.mkdir(exist_ok=True)
    settings = {"seed": 1, "steps": 4, "width": 64, "height": 64, "embeddings": [f"{run.export()}={WORD}"]}
    first = np.asarray(pipe(f"a {WORD}", **settings).image).astype(float)
    list(run.steps())
    then = np.asarray(pipe(f"a {WORD}", **settings).image).astype(float)
    assert 10 * np.log10(255**2 / np.square(then - first).mean()) < 30


def test_what_was_encoded_is_kept_and_numbers_of_captions_are_checked(pipe, rings, tmp_path, monkeypatch):
    """A run that continues does not encode; a caption that there is none of makes it encode anew."""
    run = begun(pipe, rings, tmp_path / "run")
    (first,) = run.encoded()
    monkeypatch.setattr(tune, "encode", None)
    (again,) = run.encoded()
    assert all(mx.array_equal(a, b) for a, b in zip(first.means, again.means, strict=True))
    file = run.out / tune.RUN / "encoded-0.safetensors"
    good, header = mx.load(str(file), return_metadata=True)
    mx.eval(good)
    for number in (mx.array([9]), mx.array([-1]), mx.array([0.5]), mx.array([0, 0])):
        mx.save_safetensors(str(file), good | {"1.args.caption": number}, header)
        with pytest.raises(TypeError):  # it encodes, which this test took away
            run.encoded()


def test_a_step_takes_the_memory_that_was_told(pipe, rings, tmp_path):
    """As for a LoRA: against MLX's own count."""
    run = begun(pipe, rings, tmp_path / "run", size=128, batch=8, steps=2)
    steps, told = run.steps(), footprint.step(pipe.description, run.tuning, gpu=False)
    next(steps)
    seen, _ = peak_of_step(steps, told.weights)
    steps.close()
    assert 0.97 < told.peak / seen < 1.35


def test_too_little_memory_is_told_before_the_work(rings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(advice, "this_machine", lambda: advice.Machine(35 * 10**6, 35 * 10**6, False))
    typed = ["embedding", "-m", "storybook", "-i", str(rings), "-o", str(tmp_path / "out"), "--word", WORD]
    typed += ["--initial", "house"]
    assert main(typed) == 1
    assert "GB; this machine has 0.0. What fits: --low-memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*typed, "--estimate"]) == 0
    assert "a word of 1, 1 at once: a step takes about" in capsys.readouterr().out


def test_the_command(rings, tmp_path, capsys):
    out = tmp_path / "out"
    typed = ["embedding", "-m", "storybook", "--dtype", "float32", "-i", str(rings), "-o", str(out), "--word", WORD]
    typed += ["--initial", "house", "--steps", "1", "--size", "64"]
    assert main([*typed, "--sample", f"a {WORD}"]) == 0
    said = capsys.readouterr().out
    assert f"The word {WORD}: 1 x 128 numbers of text_encoder." in said
    assert f"--embedding '{out}={WORD}'" in said
    assert (out / "sample-000001-1.png").is_file()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt": "a house"}, "has no <ring>: 'a house'"),
        ({"vectors": 0}, "Vectors must be a whole number from 1 to 32; 0 was given"),
        ({"initial": " "}, "The initial words are empty"),
        ({"word": "a ring"}, "A word that is taught cannot be 'a ring'"),
        ({"word": "red"}, "The tokenizer knows the word 'red' already. Give a `word` without spaces"),
    ],
)
def test_a_bad_word_is_refused(pipe, rings, tmp_path, settings, problem):
    with pytest.raises(Error, match=problem):
        begun(pipe, rings, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
