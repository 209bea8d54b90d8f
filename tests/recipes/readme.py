"""The README's pictures of the built-in model, drawn anew:

    python -m tests.recipes.readme                        all of them
    python -m tests.recipes.readme sheet masks            some: sheet, masks, lines, style, studio, painting, lesson

studio, painting and lesson need Chromium, as the tests in a browser do."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import mlxdiff
from mlxdiff import detect
from mlxdiff.train import measure
from mlxdiff.train import storybook as sb
from mlxdiff.train.storybook import sketches
from tests.notebooks import few_bits
from tests.recipes import inpainting

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
PROMPT = "a red house under a full moon"
SUNSET, WINTER = "a red house on a hill at sunset with the sun", "a yellow house in the snow by day with clouds"
NIGHT, DAY = "a blue house in the snow at night under a full moon", "a pink house on a hill by day with a rainbow"
ACROSS, GAP, LINE = 4, 6, 18  # of the sheet: pictures in a row, and pixels
WINDOW = {"width": 1440, "height": 900}


def sheet() -> None:
    """Twelve plain captions of random scenes; scenes and seeds are the first ones that `mlxdiff train judge` draws."""
    pipe, scenes = mlxdiff.load("storybook"), measure.scenes(12)
    pictures = [Image.fromarray(p) for p in measure.draw(pipe, scenes)]
    edge, font = pictures[0].width, ImageFont.load_default(LINE - 4)
    tall = edge + 2 * LINE + 2 * GAP
    page = Image.new("RGB", (ACROSS * (edge + GAP), len(scenes) // ACROSS * tall), "white")
    draw = ImageDraw.Draw(page)
    for k, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        x, y = k % ACROSS * (edge + GAP) + GAP // 2, k // ACROSS * tall
        page.paste(picture, (x, y))
        lines = [""]
        for word in sb.plain(scene).split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if draw.textlength(longer, font) < edge - GAP else [*lines, word]
        draw.multiline_text((x + 2, y + edge + GAP), "\n".join(lines), "black", font)
    few_bits(page).save(DATA / "storybook.png", optimize=True)


def lines() -> None:
    """A drawing as made with a mouse and two pictures that follow it; the edges of one, and pictures that follow them.
    Seeds 1 and 2, not selected."""
    pipe = mlxdiff.load("storybook")
    page = sketches.sketch("house")
    first = [pipe(text, seed=s, controls=[("sketch", page)]).image for s, text in ((1, SUNSET), (2, WINTER))]
    edges = detect.run("canny", first[0])
    second = [pipe(text, seed=s, controls=[("edges", edges)]).image for s, text in ((1, NIGHT), (2, DAY))]
    row = np.concatenate([np.asarray(p) for p in (page, *first, edges, *second)], 1)
    few_bits(Image.fromarray(row)).save(DATA / "lines.png", optimize=True)


def style() -> None:
    """The first six scenes that `mlxdiff train judge` draws, without and with the LoRA of style.py."""
    pipe, scenes = mlxdiff.load("storybook"), measure.scenes(6)
    rows = [np.concatenate(list(measure.draw(pipe, scenes, loras=loras)), 1) for loras in ([], ["paper"])]
    few_bits(Image.fromarray(np.concatenate(rows))).save(DATA / "style.png", optimize=True)


@contextmanager
def app(folder: Path, size: dict = WINDOW) -> Iterator:
    """A studio of its own, in a browser's window."""
    from playwright.sync_api import sync_playwright

    from tests.browser.conftest import CHROMIUM, Hand

    command = [sys.executable, "-m", "mlxdiff.widgets.app", "--no-browser"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    server = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    try:
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport=size)
            page.set_default_timeout(300_000)
            page.goto(address)
            yield Hand(page, page.locator(".mlxdiff-studio"))
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def drawn(s, seed: int, count: int, prompt: str = PROMPT) -> None:
    """Draw a picture and wait until so many are there."""
    from playwright.sync_api import expect

    s.label("Prompt").fill(prompt)
    s.label("Seed").fill(str(seed))
    s.press("Generate")
    expect(s.thumbs).to_have_count(count, timeout=300_000)
    expect(s.status).to_contain_text("Done in", timeout=300_000)
    s.page.wait_for_timeout(500)


def studio() -> None:
    with TemporaryDirectory() as place, app(Path(place)) as s:
        s.root.get_by_title("Keep this seed for every picture").click()
        for k, seed in enumerate((7, 8, 9)):
            drawn(s, seed, k + 1)
        s.press("☆ Favourite")
        s.page.wait_for_timeout(500)
        s.page.screenshot(path=Path(place, "a.png"))
        shot = Image.open(Path(place, "a.png")).resize((1200, 750), Image.Resampling.LANCZOS)
        few_bits(shot).save(DATA / "studio.png", optimize=True)


def painting() -> None:
    from tests.browser.test_painting import Brush

    with TemporaryDirectory() as place, app(Path(place)) as s:
        page = s.page
        s.root.get_by_title("Keep this seed for every picture").click()
        drawn(s, 7, 1)
        s.press("Change a part of it")
        brush = Brush(s)
        for stroke in (((0.3, 0.55), (0.7, 0.55)), ((0.3, 0.7), (0.7, 0.7)), ((0.3, 0.85), (0.7, 0.85))):
            brush.drag(*stroke)
        s.root.get_by_label("Soft edge").fill("6")
        s.label("Prompt").fill(PROMPT.replace("red", "blue"))
        brush.to(0.65, 0.75)
        page.wait_for_timeout(500)
        page.screenshot(path=Path(place, "a.png"))
        drawn(s, 7, 2, PROMPT.replace("red", "blue"))
        page.screenshot(path=Path(place, "b.png"))
        shots = [Image.open(Path(place, f"{n}.png")).resize((960, 600), Image.Resampling.LANCZOS) for n in "ab"]
    both = Image.new("RGB", (2 * 960 + 12, 600), "grey")
    both.paste(shots[0], (0, 0))
    both.paste(shots[1], (972, 0))
    both.quantize(256).save(DATA / "painting.png", optimize=True)


def lesson() -> None:
    """The picture that a test in a browser leaves of lesson 2."""
    test = "tests/browser/test_lessons.py::test_a_lesson_reads_before_it_runs_and_lives_after[02_the_way_back]"
    shutil.rmtree(ROOT / "build" / "shots", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "pytest", "-q", test], check=True, cwd=ROOT)
    few_bits(Image.open(ROOT / "build" / "shots" / "lesson-02_the_way_back.png")).save(
        DATA / "lesson.png", optimize=True
    )


PICTURES = {
    "sheet": sheet,
    "masks": inpainting.main,
    "lines": lines,
    "studio": studio,
    "painting": painting,
    "lesson": lesson,
    "style": style,
}


def main(names: list[str]) -> None:
    for name in names or PICTURES:
        PICTURES[name]()
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
