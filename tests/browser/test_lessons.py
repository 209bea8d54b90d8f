"""The lessons as a reader meets them: the committed notebooks in JupyterLab, on the built-in model, a control moved."""

import os
import re
import signal
import subprocess
import sys

import nbformat
import pytest

from tests import notebooks
from tests.browser.conftest import HOW, SHOTS, Desk
from tests.test_imports import ROOT

expect = pytest.importorskip("playwright.sync_api", reason=HOW).expect

LESSONS = [n for n in notebooks.names() if re.match(r"0[1-8]_", n)]  # a later one may begin without a widget


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_reads_before_it_runs_and_lives_after(lab, page, name):
    book = notebooks.read(name)  # up to its first lesson, after the map: test_notebooks.py runs the rest
    book.cells = book.cells[: 1 + [i for i, cell in enumerate(book.cells) if cell.cell_type == "code"][1]]
    nbformat.write(book, lab.folder / f"{name}.ipynb")
    d = Desk(lab, page, f"{name}.ipynb")
    try:
        still = page.locator(".jp-RenderedImage img").first
        expect(still).to_be_visible()  # the saved picture, though nothing has run and the notebook is not trusted
        d.run_all()
        lesson = page.locator(".mlxdiff-lesson").nth(1)
        lesson.wait_for(timeout=120_000)
        idle = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
        page.wait_for_function(idle, timeout=120_000)
        image = lesson.locator("img").first
        expect(image).to_be_visible()
        SHOTS.mkdir(parents=True, exist_ok=True)
        lesson.screenshot(path=SHOTS / f"lesson-{name}.png")
        for _ in range(2):  # Jupyter moves callbacks to another thread after the first time
            before = image.get_attribute("src")
            move(page, lesson)
            page.wait_for_function(
                "([img, src]) => img.src !== src", arg=[image.element_handle(), before], timeout=120_000
            )
        assert "error" not in lesson.locator(".mlxdiff-lesson-status").inner_text().lower()
        assert lesson.evaluate("e => e.scrollWidth <= e.clientWidth + 8"), "wider than its cell"  # widgets' margins
    finally:
        page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def test_a_lesson_starts_by_itself_and_a_changed_one_by_its_button(browser, page, tmp_path):
    """As `mlxdiff lessons` opens them. Only code that is the package's own runs unasked."""
    changed = notebooks.read("01_forward_noise")
    changed.cells = [nbformat.v4.new_code_cell("from mlxdiff.widgets.explain import ForwardNoise\nForwardNoise()")]
    folder = tmp_path / "lessons"
    folder.mkdir()
    nbformat.write(changed, folder / "01_forward_noise.ipynb")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(tmp_path / "c"), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "mlxdiff.widgets.lessons", "--no-browser", str(folder)]
    SHOTS.mkdir(parents=True, exist_ok=True)
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        said = next(line for line in server.stdout if "http" in line)
        page.goto(re.search(r"http\S+", said)[0])
        expect(page.locator(".mlxdiff-lesson img").first).to_be_visible(timeout=120_000)
        page.screenshot(path=SHOTS / "lessons.png")
        page.goto(re.search(r"http\S+", said)[0].replace("00_start", "01_forward_noise"))
        button = page.get_by_role("button", name="Run this lesson")
        button.wait_for(timeout=60_000)
        assert page.locator(".mlxdiff-lesson:visible").count() == 0
        button.click()
        expect(page.locator(".mlxdiff-lesson img:visible")).to_have_count(1, timeout=120_000)
        page.screenshot(path=SHOTS / "lessons-changed.png")
    finally:
        page.goto("about:blank")  # it would complain of the server's end
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def test_a_figure_is_a_light_card_in_the_dark_and_its_caption_is_its_name(desk, lab, page):
    lab.theme("JupyterLab Dark")
    try:
        d = desk("dark-lesson.ipynb", "from mlxdiff.widgets.explain import ForwardNoise\nForwardNoise()")
        d.run_all()
        lesson = page.locator(".mlxdiff-lesson")
        sheet = lesson.locator(".mlxdiff-figure")
        sheet.locator("img").wait_for()
        ground = "e => getComputedStyle(e).backgroundColor"
        assert sheet.evaluate(ground) == "rgb(255, 255, 255)"
        assert page.locator("body").evaluate(ground) != "rgb(255, 255, 255)"
        assert sheet.evaluate("e => parseFloat(getComputedStyle(e).borderRadius)") > 0
        caption = lesson.locator(".mlxdiff-lesson-caption")
        for step in ("300", "301", "302"):
            expect(caption).to_contain_text(f"Step {step} of 1000")
            expect(lesson.get_by_role("img", name=caption.inner_text(), exact=True)).to_be_visible()
            lesson.screenshot(path=SHOTS / "lesson-dark.png")
            move(page, lesson)
        page.set_viewport_size({"width": 360, "height": 1500})  # rows of controls break, and none is scrolled sideways
        boxes = "e => [e, ...e.querySelectorAll('.widget-box')].every(b => b.scrollWidth <= b.clientWidth + 1)"
        assert lesson.evaluate(boxes)
        lesson.screenshot(path=SHOTS / "lesson-narrow.png")
    finally:
        lab.theme("JupyterLab Light")


def move(page, lesson) -> None:
    """Press an arrow key on the first slider there is, or choose the next option of a list."""
    slider = lesson.locator(".noUi-handle:visible").first
    if slider.count():
        slider.focus()
        page.keyboard.press("ArrowRight")
        return
    choice = lesson.locator("select:visible").first
    options = choice.locator("option").count()
    choice.select_option(index=(choice.evaluate("e => e.selectedIndex") + 1) % options)
