"""Lesson 9: what its notebook shows passes the checks, so do its hidden answers, and every common mistake is named."""

import re

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the lessons need pip install -e '.[studio]'")
pytest.importorskip("anywidget", reason="the lessons need pip install -e '.[studio]'")

from mlxdiff.widgets.explain import Strip
from mlxdiff.widgets.explain.nothing import Mistake
from tests import notebooks


@pytest.fixture(scope="module")
def cells():
    return notebooks.read("09_from_nothing").cells


@pytest.fixture(scope="module")
def book(cells):
    """The names that the notebook defines. Its checks are run in the tests below, its pictures in test_notebooks.py."""
    names = {}
    for cell in cells:
        if cell.cell_type == "code" and "Strip(" not in cell.source:
            exec(re.sub(r"^check\.\w+\(.*", "", cell.source, flags=re.M), names)
    return names


def checked(book, name, *found):
    """What the notebook's own cell says when the functions are these."""
    return getattr(book["check"], name)(*found)


def test_the_hidden_answers_are_right(book, cells, capsys):
    answers = [c for cell in cells for c in re.findall(r"```python\n(.*?)```", cell.source, re.S)]
    own = dict(book)
    for answer in answers:
        exec(answer, own)
    checked(own, "half", own["half"])
    checked(own, "fresh", own["fresh"])
    checked(own, "redraw", own["redraw"], own["plain"]("a castle at night"))
    assert capsys.readouterr().out == "✓ Right.\n" * 3 == "✓ Right.\n" * len(answers)


def test_an_answer_that_is_missing_stops_nothing(book, capsys):
    checked(book, "half", ...)
    checked(book, "fresh", book["fresh"])
    assert capsys.readouterr().out.count("○ Not answered yet") == 2


a = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def mixed(picture, noise, t):
    return a[t] ** 0.5 * picture + (1 - a[t]) ** 0.5 * noise


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("levels", 1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, "np.cumprod"),
        ("levels", np.cumprod(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), "keeps the share 1 - beta"),
        ("levels", a**0.5, "These are square roots"),
        ("levels", 1 - a, "Subtract them from 1"),
        ("levels", a[::-1], "backwards"),
        ("levels", np.cumprod(1 - np.linspace(0.00085, 0.012, 1000)), "term by term"),  # even in themselves
        ("levels", a[:999], r"shape \(1000,\) was expected, not \(999,\)"),
        ("levels", a * np.nan, "no number"),
        ("mix", lambda p, n, t: a[t] * p + (1 - a[t]) * n, "by their square roots"),
        ("mix", lambda p, n, t: mixed(n, p, t), "the noise has the picture.s"),
        ("mix", lambda p, n, t: p + (1 - a[t]) ** 0.5 * n, "picture is not made weaker"),
        ("mix", lambda p, n, t: a[t] ** 0.5 * p + n, "noise is not made weaker"),
        ("mix", lambda p, n, t: mixed(p, -n, t), "subtracted"),
        ("mix", lambda p, n, t: None, "numbers were expected, not None"),
        ("step", lambda ask, x, t, s: mixed(*map(np.array, ask(x, t)), t), "Mix it at s"),
        ("step", lambda ask, x, t, s: ask(x, t)[0], "picture alone"),
        ("step", lambda ask, x, t, s: x, "unchanged"),
        ("step", lambda ask, x, t, s: a[s] ** 0.5 * np.array(ask(x, t)[0]), "noise is missing"),
        ("half", 500, "not of the shares"),
        ("half", int(np.argmax(a < 0.5)) - 1, "one further"),
        ("fresh", lambda ask, x, t, s, noise: mixed(*map(np.array, ask(x, t)), s), "old noise"),
        ("fresh", lambda ask, x, t, s, noise: mixed(np.array(ask(x, t)[0]), np.array(noise), t), "Mix it at s"),
    ],
)
def test_a_mistake_is_named(book, name, wrong, said):
    with pytest.raises(Mistake, match=said):
        checked(book, name, wrong)


def test_mistakes_with_the_networks_answer_are_named(book):
    network, words, roots = book["network"], book["words"], lambda t: (float(a[t] ** 0.5), float((1 - a[t]) ** 0.5))

    def taken_for_noise(x, t, text):
        v, (p, n) = network(x, t, **text), roots(t)
        return (x - n * v) / p, v

    def signs(first, second):
        def look(x, t, text):
            v, (p, n) = network(x, t, **text), roots(t)
            return p * x + first * n * v, n * x + second * p * v

        return look

    for look, said in (
        (taken_for_noise, "taken for the noise"),
        (signs(1, 1), "Yours adds"),
        (signs(-1, -1), "Yours subtracts"),
        (lambda *x: book["look"](*x)[::-1], "picture first"),
        (lambda *x: book["look"](*x)[0], "2 values were expected, 1 came"),
    ):
        with pytest.raises(Mistake, match=said):
            checked(book, "look", look, words)


def test_mistakes_of_the_loop_and_of_guidance_are_named(book):
    draw, plain = book["draw"], book["plain"]
    with pytest.raises(Mistake, match="nothing is kept of the steps"):
        checked(book, "draw", lambda ask, noise, steps: noise, plain)
    with pytest.raises(Mistake, match="Only the first step"):
        checked(book, "draw", lambda ask, noise, steps: ask(noise, 751)[0], plain)

    def by(weight):
        def wrong(prompt, scale):
            with_words, without = plain(prompt), plain("")
            return lambda x, t: [weight(p, q, scale) for p, q in zip(with_words(x, t), without(x, t), strict=True)]

        return wrong

    for weight, said in (
        (lambda p, q, s: p, "not exaggerated"),
        (lambda p, q, s: q, "empty prompt"),
        (lambda p, q, s: p + s * (q - p), "exchanged"),
        (lambda p, q, s: p + s * (p - q), "scale 1 must give just the prompt"),
        (lambda p, q, s: s * (p - q), "Only the difference"),
    ):
        with pytest.raises(Mistake, match=said):
            checked(book, "guided", by(weight), draw)


def test_mistakes_with_a_start_picture_are_named(book):
    step, mix, ask = book["step"], book["mix"], book["plain"]("a castle")

    def run(x, times):
        for t, s in zip(times, [*times[1:], 0], strict=True):
            x = step(ask, x, t, s)
        return x

    times = [751, 501, 251, 1]
    for wrong, said in (
        (lambda ask, picture, noise, *_: run(mix(picture, noise, 751), times[2:]), "first step that is left"),
        (lambda ask, picture, noise, *_: run(picture, times[2:]), "not noised"),
    ):
        with pytest.raises(Mistake, match=said):
            checked(book, "redraw", wrong, ask)


def test_a_mistake_shows_one_line_and_no_traceback():
    assert Mistake("The mixture: not yet.", "Mix it.")._render_traceback_() == ["✗ The mixture: not yet. Mix it."]


def test_a_strip_is_named_by_its_pictures(book):
    image = book["pipe"].decode(np.zeros(book["check"].shape, np.float32))[0]
    strip = Strip({"before": image, "after": image})
    assert repr(strip) == "before, after"
    assert strip._repr_png_()[:4] == b"\x89PNG"
