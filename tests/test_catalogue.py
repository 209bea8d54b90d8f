"""`mlxdiff` and `mlxdiff models`. References: the registry's rows and the storybook's own tables of words."""

import pytest

from mlxdiff.__main__ import COMMANDS, main
from mlxdiff.builtin import unknown_words, vocabulary
from mlxdiff.families import MODELS
from mlxdiff.train.storybook import captions


def test_every_command_says_what_it_is(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2
    assert main(["generat"]) == 2
    assert "generat" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "studio"])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as e:
        main([name, "--help"])
    assert e.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mlxdiff {name}")


def test_the_list_has_every_model_and_storybook_its_words(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in MODELS)
    assert main(["models", "storybook"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for words in captions.vocabulary().values() for word in words)
    assert main(["models", "nothing"]) == 1
    assert "'nothing'" in capsys.readouterr().err


def test_words_the_built_in_model_does_not_know():
    assert {kind: list(words) for kind, words in captions.vocabulary().items()} == vocabulary()
    assert unknown_words("a (red:1.3) house BREAK [under a full moon]") == []
    assert unknown_words("A Dragon, and a red dragon by the sea") == ["dragon", "and"]
