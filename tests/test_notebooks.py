"""Every notebook runs from top to bottom, offline, and says what its committed outputs say (reference: those outputs,
made by tests/notebooks.py)."""

import copy
import re

import pytest

pytest.importorskip("matplotlib", reason="the lessons need pip install -e '.[studio]'")
pytest.importorskip("ipykernel", reason="the lessons need pip install -e '.[studio]'")

from tests import notebooks


@pytest.mark.parametrize("name", notebooks.names())
def test_a_notebook_says_what_is_committed(name, tmp_path):
    committed = notebooks.read(name)
    assert any(notebooks.texts(committed)), "commit it with its outputs: python -m tests.notebooks"
    for now, then in zip(notebooks.texts(notebooks.run(name, tmp_path)), notebooks.texts(committed), strict=True):
        assert notebooks.same(now, then), f"said {now!r}, committed is {then!r}: python -m tests.notebooks {name}"


@pytest.mark.parametrize("name", notebooks.names())
def test_a_notebook_is_committed_still(name):
    book = notebooks.read(name)
    assert book == notebooks.still(copy.deepcopy(book))
    assert all(len(c.source.splitlines()) <= 25 for c in book.cells if c.cell_type == "code"), "too long to read"


@pytest.mark.parametrize("name", notebooks.names())
def test_links_to_other_notebooks_lead_there(name):
    """`mlxdiff lessons` copies the notebooks alone: beside them nothing can be linked to."""
    texts = [c.source for c in notebooks.read(name).cells if c.cell_type == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert {link.removesuffix(".ipynb") for link in links} <= set(notebooks.names())


def test_the_comparison_can_fail():
    assert notebooks.same("step 6, 31.50 dB", "step 6, 31.52 dB")
    assert not notebooks.same("step 6, 31.5 dB", "step 7, 31.5 dB")
    assert not notebooks.same("house 3", "horse 3")
