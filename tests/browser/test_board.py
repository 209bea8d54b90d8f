"""The board on which a reader draws a world, alone on a page: what mouse and keys draw, and what moves (reference: the
numbers that the page was given)."""

import base64
import json

import numpy as np
import pytest

from tests.browser.conftest import HOW, SHOTS
from tests.test_imports import ROOT

pytest.importorskip("playwright.sync_api", reason=HOW)

PLACE = ROOT / "widgets" / "explain"
PAGE = """<meta name=viewport content="width=device-width"><style>
body {{ background: Canvas; color-scheme: light dark }} {css}</style>
<div class="mlxdiff-lesson"><div id="board"></div></div><script type="module">
const source = new Blob([{js}], {{ type: "text/javascript" }});
const {{ default: widget }} = await import(URL.createObjectURL(source));
const view = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const state = {{ points: [[0.5, 0.5, 1]], most: 500, run: {run}, {arrays} }}, heard = {{}};
window.model = {{ state, saved: 0, get: (name) => state[name], set: (name, value) => {{ state[name] = value; }},
  save_changes() {{ this.saved += 1; }}, on: (name, action) => {{ heard[name] = action; }}, off() {{}} }};
widget.render({{ model, el: document.getElementById("board") }});
</script>"""


@pytest.fixture
def board(page, tmp_path):
    """One point goes from the left to the right in two steps; an arrow points up."""
    moving = {"paths": [[-2, 0], [0, 0], [2, 0]], "arrows": [[0, 0.2], [0, 0.2]], "places": [[1, 1]]}
    coded = {name: base64.b64encode(np.array(v, "<f4").tobytes()).decode() for name, v in moving.items()}
    arrays = ", ".join(f'{name}: view("{text}")' for name, text in coded.items())
    css = "".join((PLACE / name).read_text() for name in ("../theme.css", "lesson.css", "board.css"))
    run = json.dumps({"steps": 2, "count": 1, "grid": 1, "turn": 1})
    text = PAGE.format(css=css, js=json.dumps((PLACE / "board.js").read_text()), run=run, arrays=arrays)
    (tmp_path / "board.html").write_text(text)
    page.goto((tmp_path / "board.html").as_uri())
    page.locator("canvas").wait_for()
    return page


def state(page, name="points"):
    return page.evaluate(f"window.model.state.{name}")


def dark_at(page, x: float, y: float) -> bool:
    """Whether the canvas shows a moving point at this place of the world."""
    read = """([x, y]) => { const c = document.querySelector("canvas"), n = c.width;
      const at = [(x / 2.4 + 1) / 2 * n - 3, (1 - y / 2.4) / 2 * n - 3].map(Math.round);
      const data = c.getContext("2d").getImageData(...at, 6, 6).data;
      return Array.from({ length: 36 }, (_, i) => data[4 * i]).some((v) => v < 90); }"""
    return page.evaluate(read, [x, y])


def test_a_stroke_of_the_mouse_is_drawn_and_sent_once(board):
    box = board.locator("canvas").bounding_box()
    at = lambda part: (box["x"] + part * box["width"], box["y"] + box["height"] / 2)  # noqa: E731
    board.mouse.move(*at(0.25))
    board.mouse.down()
    for part in np.linspace(0.25, 0.5, 6):
        board.mouse.move(*at(part))
    assert board.evaluate("window.model.saved") == 0
    board.mouse.up()
    assert board.evaluate("window.model.saved") == 1
    drawn = np.array(state(board))[1:]
    np.testing.assert_allclose(drawn[:, 0], np.linspace(-1.2, 0, 6), atol=0.02)
    assert np.abs(drawn[:, 1]).max() < 0.02
    assert drawn[:, 2].tolist() == 6 * [0]
    board.get_by_role("button", name="Rubber").click()
    board.mouse.click(*at(0.25))
    assert len(state(board)) == 6
    board.get_by_role("button", name="Clear").click()
    assert state(board) == []


def test_keys_draw_too(board):
    canvas = board.get_by_role("application")
    canvas.focus()
    for key in ("2", "ArrowUp", "Shift+ArrowRight", " "):
        board.keyboard.press(key)
    x, y, kind = state(board)[-1]
    assert (round(x, 6), round(y, 6), kind) == (0.4, 0.1, 1)
    for key in ("p", "ArrowLeft", "ArrowLeft", "p", "ArrowLeft"):
        board.keyboard.press(key)
    assert [round(p[0], 6) for p in state(board)[1:]] == [0.4, 0.3, 0.2]
    for key in ("3", " "):
        board.keyboard.press(key)
    assert len(state(board)) < 4
    assert "Space draws a dot" in canvas.get_attribute("aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_points_move_as_python_said_and_can_be_held(board, scheme):
    board.emulate_media(color_scheme=scheme)
    board.set_viewport_size({"width": 420 if scheme == "dark" else 1440, "height": 900})
    board.wait_for_function("Number(document.querySelector('input').value) > 0.1")
    board.get_by_role("button", name="Pause").click()
    slider = board.get_by_label("Moment, from noise to points")
    for moment, x in ((0, -2), (0.25, -1), (0.5, 0), (1, 2)):
        slider.fill(str(moment))
        assert dark_at(board, x, 0)
        assert not dark_at(board, -x if x else 1, 0)
    assert board.evaluate("document.documentElement.scrollWidth <= innerWidth")
    SHOTS.mkdir(parents=True, exist_ok=True)
    board.screenshot(path=SHOTS / f"board-{scheme}.png")


def test_who_wants_no_motion_sees_the_end(page, board):
    page.emulate_media(reduced_motion="reduce")
    page.reload()
    page.locator("canvas").wait_for()
    assert page.get_by_role("button", name="Play").is_visible()
    assert dark_at(page, 2, 0)
