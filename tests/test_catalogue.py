"""`mlxdiff` and `mlxdiff models`. References: the registry's rows and the storybook's own tables of words."""

import pytest

from mlxdiff import advice, catalogue
from mlxdiff.__main__ import COMMANDS, main
from mlxdiff.builtin import unknown_words, vocabulary
from mlxdiff.families import MODELS
from mlxdiff.train.storybook import captions


def test_every_command_says_what_it_is(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().out == out
    assert main(["help"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generat"], "'generat' is not a command. Did you mean generate? To draw it: mlxdiff generate generat\n"),
        (["Models", "sdxl"], "'Models' is not a command. Did you mean models? To draw it: mlxdiff generate Models\n"),
        (["help", "generat"], "'generat' is not a command. Did you mean generate? Use one of generate, upscale, "),
        (["verify", "--help"], "'verify' is not a command. Use one of generate, upscale, "),
        (["verify", "-h"], "'verify' is not a command. Use one of generate, upscale, "),
        (["help", "a red house"], "'a red house' is not a command. Use one of generate, upscale, "),
        (["-m", "sdxl"], "'-m' is not a command. To draw: mlxdiff generate -m ..., or "),
    ],
)
def test_a_word_close_to_a_command_is_not_drawn(capsys, words, says):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mlxdiff: {says}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["a red house"], ["lighthouse", "-s", "1"], ["train at night"]])
def test_what_is_no_command_is_a_prompt(words, monkeypatch):
    drawn = []
    monkeypatch.setattr("mlxdiff.generate.main", lambda argv: drawn.append(argv) or 0)
    assert main(words) == 0
    assert drawn == [words]


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "studio"])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as e:
        main([name, "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mlxdiff {name}")
    with pytest.raises(SystemExit) as e:
        main(["help", name])
    assert e.value.code == 0
    assert capsys.readouterr().out == out


def test_the_list_has_every_model_and_storybook_its_words(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in MODELS)
    editing = {line.split()[0] for line in out.splitlines() if line.endswith("; edits pictures")}
    assert editing == {name for name in MODELS if "klein" in name or "kontext" in name}
    masked = {line.split()[0] for line in out.splitlines() if line.endswith("; needs a mask")}
    assert masked == {"sd15-inpaint", "sdxl-inpaint", "flux-fill"}
    assert out.count("; needs a control picture\n") == 2
    assert "FLUX.2 dev" not in out  # it converts, but does not draw
    assert main(["models", "storybook"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for words in captions.vocabulary().values() for word in words)
    assert main(["models", "flux2-klein"]) == 0
    out = capsys.readouterr().out
    assert "up to 4 pictures: -i FILE" in out
    assert 'To edit: mlxdiff generate "make it winter" -i photo.png -m flux2-klein' in out
    assert main(["models", "flux-fill"]) == 0
    out = capsys.readouterr().out
    assert "a picture and a mask: -i FILE --mask FILE" in out
    assert 'mlxdiff generate "a red door" -i photo.png --mask door.png -m flux-fill' in out
    assert main(["models", "flux-depth"]) == 0
    assert (
        'mlxdiff generate "a red house under a full moon" --control picture.png -m flux-depth'
        in capsys.readouterr().out
    )
    assert main(["models", "nothing"]) == 1
    assert capsys.readouterr().err == "mlxdiff models: There is no model named 'nothing'. `mlxdiff models` lists all.\n"


@pytest.mark.parametrize("gpu", [False, True])
def test_the_memory_of_a_model_says_when_its_peak_comes_and_no_figure_twice(monkeypatch, capsys, gpu):
    """On a CPU, where decoding takes most and is not quantized, and on a Mac, which then needs no second list."""
    monkeypatch.setattr(advice, "this_machine", lambda: advice.Machine(24 * 2**30, 18 * 2**30, gpu))
    assert main(["models", "flux2-klein"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("  ")]
    for low in (False, True):
        figures = [row.split(" GB")[0].split()[-1] for row in rows if ("--low-memory" in row) == low]
        assert len(figures) == len(set(figures)) > 1
    assert all(any(stage in row for stage in catalogue._STAGES) for row in rows)
    assert ("A Mac's GPU takes less" in out) == (not gpu)
    assert ("what sets it is not quantized" in out) == (len(rows) < len(catalogue._WAYS))
    assert len(rows) < len(catalogue._WAYS) or gpu


def test_words_the_built_in_model_does_not_know():
    assert {kind: list(words) for kind, words in captions.vocabulary().items()} == vocabulary()
    assert unknown_words("a (red:1.3) house BREAK [under a full moon]") == []
    assert unknown_words("A Dragon, and a red dragon by the sea") == ["dragon", "and"]
