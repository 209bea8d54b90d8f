"""The studio as a person meets it: JupyterLab in Chromium, with a pipeline that needs no model (tests/fakes.py).
Every button is pressed at least twice: Jupyter moves callbacks to another thread after the first time."""

import importlib.metadata
import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mlxdiff import images
from mlxdiff.request import Request
from tests import fakes
from tests.browser.conftest import HOW, KERNEL, STUDIO, Hand, rgb

expect = pytest.importorskip("playwright.sync_api", reason=HOW).expect

SLOW, QUICK = STUDIO.format(pace=0.08), STUDIO.format(pace=0.01)


def drawn(lab, name: str = "pictures") -> list:
    return sorted((lab.folder / name).glob("*.png"), key=lambda p: p.stat().st_mtime_ns)


def test_the_kernel_is_the_one_to_be_tried(desk):
    """CI runs some of these tests on ipykernel 6 too, which has no subshells."""
    d = desk("kernel.ipynb", "import ipykernel; print(ipykernel.__version__)")
    d.run_all()
    where = {} if KERNEL is None else {"path": [KERNEL]}
    (found,) = importlib.metadata.distributions(name="ipykernel", **where)
    expect(d.page.locator(".jp-RenderedText").first).to_have_text(found.version)


def test_from_a_prompt_to_a_picture(desk, lab):
    d = desk("first.ipynb", SLOW)
    begin = time.perf_counter()
    d.run_all()
    s = d.studio()
    lab.timings["first widget"] = time.perf_counter() - begin
    s.shot("studio-empty")
    for prompt in ("a blue boat", "a green boat"):
        before = len(drawn(lab))
        s.label("Prompt").fill(prompt)
        s.record()
        begin = s.page.evaluate("performance.now() / 1000")
        s.press("Generate")
        expect(s.canvas).to_have_attribute("aria-label", prompt)
        s.says("Done in")
        seen = s.recorded()
        lab.timings[f"first preview of {prompt}"] = seen[0][0] - begin
        # A run of 1.6 s has a preview every 0.2 s, fewer on a busy machine; the last one is the picture.
        assert len({picture for _, picture in seen}) > 3
        file = drawn(lab)[before]
        request, _ = images.read_settings(file)
        assert request.prompt == prompt
        expect(s.root.locator(".mlxdiff-caption")).to_contain_text(f"seed {request.seed}")
        np.testing.assert_array_equal(rgb(s), np.asarray(fakes.picture(request)))  # exact: a PNG all the way


def test_cancel_within_a_step_and_draw_again(desk, lab):
    d = desk("cancel.ipynb", STUDIO.format(pace=0.3))
    d.run_all()
    s = d.studio()
    for how in ("button", "button", "key"):
        s.press("Generate")
        s.says("left")
        begin = time.perf_counter()
        if how == "button":
            s.press("Cancel")
        else:
            s.label("Prompt").press("Escape")
        s.says("Cancelled")
        lab.timings["cancel"] = time.perf_counter() - begin
        # One step is 0.3 s; the rest is the page, on a machine that may be busy with other things.
        assert lab.timings["cancel"] < 0.3 + 2
        expect(s.root.get_by_role("button", name="Cancel", exact=True)).to_be_disabled()
    s.press("Generate")
    s.says("left")
    s.shot("studio-running")


def test_keys_work_from_anywhere_and_do_not_run_the_cell(desk):
    d = desk("keys.ipynb", QUICK)
    d.run_all()
    s = d.studio()
    for n, place in enumerate((s.label("Prompt"), s.root.get_by_role("button", name="Generate"), s.label("Seed")), 1):
        place.focus()
        d.page.keyboard.press("Control+Enter")
        expect(s.thumbs).to_have_count(n)
        s.says("Done in")
    assert d.page.locator(".mlxdiff-studio").count() == 1
    expect(d.page.locator(".jp-InputPrompt").first).to_have_text("[1]:")  # run once, by run_all


def test_what_was_typed_counts_even_if_the_click_follows_at_once(desk):
    """Jupyter may hand the messages of a field and of a button to two threads, and read the field's second. Here it
    never comes."""
    late = "for control in (studio.controls.count, studio.controls.sampler):\n    control.comm.on_msg(lambda _: None)"
    d = desk("typed.ipynb", QUICK, late)
    d.run_all()
    s = d.studio()
    total = 0
    for count in (2, 1, 3, 1, 2):
        total += count
        s.label("Pictures").fill(str(count))
        s.label("Sampler").select_option("heun" if count == 1 else "euler")
        s.press("Generate")
        expect(s.thumbs).to_have_count(total)
        s.says("Done in")
        expect(s.root.locator(".mlxdiff-caption")).to_contain_text("heun" if count == 1 else "euler")
    expect(s.thumbs).to_have_count(total)


def test_seed_buttons_presets_and_history(desk, lab):
    d = desk("buttons.ipynb", QUICK)
    d.run_all()
    s = d.studio()
    seed = s.label("Seed")
    seeds = []
    for n in (1, 2):  # unlocked: each run has another seed
        s.press("Generate")
        expect(s.thumbs).to_have_count(n)
        s.says("Done in")
        seeds.append(seed.input_value())
    assert seeds[0] != seeds[1]
    lock = s.root.get_by_title("Keep this seed for every picture")
    for n in (3, 4):  # locked: the same
        if n == 3:
            lock.click()
        s.press("Generate")
        expect(s.thumbs).to_have_count(n)
        expect(seed).to_have_value(seeds[1])
    lock.click()
    for _ in range(2):
        before = seed.input_value()
        s.root.get_by_title("Another seed").click()
        expect(seed).not_to_have_value(before)
        s.root.get_by_title("Reuse the last picture's seed, and keep it").click()
        expect(seed).to_have_value(seeds[1])
    for thumb in (3, 2):  # the strip begins with the newest
        s.thumbs.nth(thumb).click()
        expect(s.thumbs.nth(thumb)).to_have_attribute("aria-pressed", "true")
        s.press("Use its seed")
        expect(seed).to_have_value(seeds[3 - thumb])
    for _ in range(2):
        s.label("Prompt").fill("something else")
        s.press("Restore settings")
        expect(s.label("Prompt")).to_have_value("a red house under a full moon")
    readout = s.label("Steps, as a number")
    for name, steps in (("Quick", 8), ("Fine", 40), ("Standard", 20)) * 2:
        s.press(name)
        expect(readout).to_have_text(str(steps))
    for _ in range(2):
        with d.page.expect_download() as download:
            s.root.get_by_role("link", name="Download").click()
        assert images.read_settings(download.value.path())[0].seed == int(seeds[1])
    for name in ("JPEG", "WebP"):
        with d.page.expect_download() as download:
            s.press(name)
        assert Image.open(download.value.path()).format == name.upper()
        assert images.read_settings(download.value.path())[0].seed == int(seeds[1])
    s.thumbs.first.focus()
    d.page.keyboard.press("ArrowRight")
    expect(s.thumbs.nth(1)).to_be_focused()


def test_errors_are_read_out_and_the_next_run_clears_them(desk):
    d = desk("errors.ipynb", QUICK)
    d.run_all()
    s = d.studio()
    for _ in range(2):
        s.label("Prompt").fill("fail")
        s.press("Generate")
        expect(s.error).to_contain_text("The fake model broke in step 2. Ask for something else.")
        s.error.get_by_text("Details").click()
        expect(s.error.locator("pre")).to_contain_text("in run")
        s.shot("studio-error")
        s.label("Prompt").fill("fine")
        s.press("Generate")
        s.says("Done in")
        expect(s.error).to_be_hidden()


def test_a_dropped_picture_restores_its_settings(desk):
    d = desk("drop.ipynb", QUICK)
    d.run_all()
    s = d.studio()
    ours = io.BytesIO()
    theirs = "a lighthouse\nNegative prompt: fog\nSteps: 31, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 77"
    theirs += ", Size: 96x64"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", theirs)
    fakes.picture(Request("x", seed=1, width=64, height=64)).save(ours, "PNG", pnginfo=info)
    for _ in range(2):
        s.label("Prompt").fill("before")
        _drop(s, ours.getvalue(), "Restore its settings")
        expect(s.label("Prompt")).to_have_value("a lighthouse")
        expect(s.label("Negative prompt")).to_have_value("fog")
        expect(s.label("Seed")).to_have_value("77")
        expect(s.label("Sampler")).to_have_value("dpmpp_2m")
        expect(s.label("Width")).to_have_value("96")
        expect(s.root.get_by_text("Also set: noise nv.")).to_be_visible()
        s.press("Forget these")
        expect(s.root.get_by_text("Also set")).to_have_count(0)
        _drop(s, b"no picture", "Restore its settings")
        expect(s.error).to_contain_text("The picture cannot be read")
    chosen = {"name": "a.png", "mimeType": "image/png", "buffer": ours.getvalue()}
    for _ in range(2):
        s.label("Prompt").fill("before")
        s.label("Restore settings from…").set_input_files(chosen)
        expect(s.label("Prompt")).to_have_value("a lighthouse")
        s.says("Settings restored")


def test_a_start_picture(desk, lab):
    """It is dropped, chosen, or taken from the history; its strength is set; it is removed again."""
    d = desk("begin.ipynb", QUICK)
    d.run_all()
    s = d.studio()
    plain = io.BytesIO()
    fakes.picture(Request("x", seed=1, width=64, height=32)).save(plain, "PNG")
    thumb = s.root.get_by_role("img", name="The start picture")
    remove = s.root.get_by_title("Begin with noise alone")
    chosen = {"name": "a.png", "mimeType": "image/png", "buffer": plain.getvalue()}
    for n in (1, 2):
        expect(thumb).to_be_hidden()
        if n == 1:
            _drop(s, plain.getvalue(), "Begin with it")
        else:
            s.label("Begin with a picture…").set_input_files(chosen)
        expect(thumb).to_be_visible()
        s.says("begins with this one")
        strength = s.root.get_by_role("slider", name="Strength", exact=True)
        strength.focus()
        for _ in range(2 * n):
            d.page.keyboard.press("ArrowLeft")
        s.press("Generate")
        expect(s.thumbs).to_have_count(n)
        s.says("Done in")
        request, _ = images.read_settings(drawn(lab)[-1])
        assert (lab.folder / request.image).read_bytes() == plain.getvalue()
        assert request.strength == pytest.approx({1: 0.5, 2: 0.3}[n])  # 0.6 and steps of 0.05: 2 down, then 4 more
        s.shot("studio-begin")
        remove.click()
    expect(thumb).to_be_hidden()
    for n in (3, 4):
        s.press("Begin with it")
        expect(thumb).to_be_visible()
        s.press("Generate")
        expect(s.thumbs).to_have_count(n)
        s.says("Done in")
        request, _ = images.read_settings(drawn(lab)[-1])
        assert Path(request.image).name == drawn(lab)[-2].name


def _drop(hand: Hand, data: bytes, use: str) -> None:
    transfer = hand.page.evaluate_handle(
        "bytes => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(bytes)], 'a.png')); return t; }",
        list(data),
    )
    hand.canvas.dispatch_event("drop", {"dataTransfer": transfer})
    hand.root.get_by_role("dialog").get_by_role("button", name=use, exact=True).click()


def test_looking_back_while_a_picture_forms(desk):
    d = desk("back.ipynb", STUDIO.format(pace=0.15))
    d.run_all()
    s = d.studio()
    for n in (1, 2):
        s.press("Generate")
        expect(s.thumbs).to_have_count(n)
        s.says("Done in")
    s.label("Prompt").fill("third")
    s.press("Generate")
    expect(s.canvas).to_have_attribute("aria-label", "Preview of third")
    for _ in range(2):
        s.thumbs.last.click()
        expect(s.canvas).to_have_attribute("aria-label", "a red house under a full moon")
        expect(s.thumbs.last).to_have_attribute("aria-pressed", "true")
        frames = s.frames()
        d.page.wait_for_timeout(500)
        assert s.frames() == frames  # the preview waits
        s.press("Back to the preview")
        expect(s.canvas).to_have_attribute("aria-label", "Preview of third")
    expect(s.canvas).to_have_attribute("aria-label", "third")  # and ends in the picture


def test_a_queue_of_three_and_two_studios(desk):
    d = desk("queue.ipynb", SLOW, "other = Studio('fake', worker=studio._worker, steps=4)\nother")
    d.run_all()
    s, other = d.studio(0), d.studio(1)
    for n in (3, 6):
        for _ in range(3):
            s.press("Generate")
        s.says("2 of 3")
        s.shot("studio-queue")
        expect(s.thumbs).to_have_count(n, timeout=30_000)
        s.says("3 of 3 · Done")
    for n in (1, 2):
        s.press("Generate")
        other.press("Generate")
        expect(other.thumbs).to_have_count(n)  # the one worker draws both, one after the other
        other.says("Done in")
    for _ in range(2):
        for _ in range(3):
            s.press("Generate")
        s.says("left")
        s.press("Cancel all")
        s.says("Cancelled")
        expect(s.root.get_by_role("button", name="Cancel all")).to_be_hidden()


def test_compare_fills_a_grid_and_writes_it(desk, lab):
    d = desk("compare.ipynb", QUICK)
    d.run_all()
    s = d.studio()
    s.root.get_by_role("button", name="Compare").press("Enter")
    s.label("Row values").fill("1, 2")
    s.label("Columns").select_option("steps")
    s.label("Column values").fill("3, 9")
    for n in (1, 2):
        s.press("Draw the grid")
        expect(s.thumbs).to_have_count(5 * n, timeout=30_000)  # four pictures and the grid
        s.says("Done in")
        s.shot("studio-compare")
    files = [p for p in drawn(lab) if p.stem.startswith("compare-seed-steps")]
    assert len(files) == 2
    grid = np.asarray(Image.open(files[0]))
    np.testing.assert_array_equal(rgb(s), grid)
    for seed in (1, 2):  # every cell is the picture of its seed, somewhere in the grid
        one = np.asarray(fakes.picture(Request("x", seed=seed, width=64, height=64)))
        windows = np.lib.stride_tricks.sliding_window_view(grid[:, :, 0], (64, 64))
        assert (windows == one[..., 0]).all((2, 3)).sum() == 2  # under both step counts
    s.label("Columns").select_option("seed")
    s.press("Draw the grid")
    expect(s.error).to_contain_text("Rows and columns are both seed")


def test_an_interrupt_cancels_the_run_a_cell_waits_for(desk):
    d = desk("block.ipynb", STUDIO.format(pace=0.3), "studio.generate().result()", "print('after', studio.status)")
    page = d.page
    d.run_all()
    s = d.studio()
    for how in ("keys", "menu"):
        s.says("left")
        if how == "keys":
            page.locator(".jp-InputPrompt").last.click()
            page.keyboard.press("i")
            page.keyboard.press("i")
        else:
            page.evaluate("() => void window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
        s.says("Cancelled")
        expect(page.locator(".jp-RenderedText").last).to_contain_text("KeyboardInterrupt")
        page.wait_for_timeout(1000)  # after an interrupt, a kernel drops for a while what it is asked to run
        page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")


def test_restart_and_run_again(desk, page):
    page.allowed.append("Could not restore the debugger state")  # JupyterLab's own, at any restart
    d = desk("restart.ipynb", QUICK)
    for _ in range(2):
        d.run_all()
        s = d.studio()
        s.press("Generate")
        expect(s.thumbs).to_have_count(1)
        s.says("Done in")
        d.restart()


LONG = "a-very-long-organisation-name/a-model-with-a-remarkably-long-name-v2.1-turbo-fp16"
CUT = """r => { const pen = document.createElement('canvas').getContext('2d');
  return [...r.querySelectorAll('input[type=text], input[type=number], select')].filter(e => {
    const style = getComputedStyle(e), text = e.selectedOptions ? e.selectedOptions[0].text : e.value;
    pen.font = style.font;
    const room = e.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    return e.offsetParent && pen.measureText(text).width > room;
  }).map(e => e.selectedOptions ? e.selectedOptions[0].text : e.value); }"""  # what boxes and lists do not show whole


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_themes_and_widths(desk, lab, page, theme):
    """Beside the controls where there is room; else between what is asked and the settings, on a phone's one screen,
    the rarer settings folded. Nothing hangs over the edge or is cut off, but a model's long name, which shows it."""
    lab.theme(f"JupyterLab {theme}")
    page.set_viewport_size({"width": 1400, "height": 1500})
    d = desk(f"{theme}.ipynb", QUICK.replace('"fake"', repr(LONG)))
    d.run_all()
    s = d.studio()
    for n in range(1, 4):
        s.press("Generate")
        expect(s.thumbs).to_have_count(n)
    s.says("Done in")
    s.label("Seed").fill("4294967295")  # as many digits as dice ever roll
    ground = s.root.locator(".mlxdiff-body").evaluate("e => getComputedStyle(e).backgroundColor")
    assert (max(int(v) for v in ground[4:-1].split(",")) < 80) == (theme == "Dark")
    s.label("Model").hover()
    expect(s.label("Model")).to_have_attribute("title", LONG)
    more = s.root.get_by_role("button", name="More settings")
    steps = s.root.get_by_role("slider", name="Steps", exact=True)
    for width in (1400, 768, 480, 360):
        page.set_viewport_size({"width": width, "height": 1500})
        narrow = width < 900
        expect(more).to_be_visible(visible=narrow)
        expect(steps).to_be_visible(visible=not narrow)
        s.shot(f"studio-{theme.lower()}-{width}")
        box, inner, ask, settings = (
            part.bounding_box() for part in (s.root, s.canvas, s.label("Prompt"), s.label("Model"))
        )
        if narrow:
            assert ask["y"] + ask["height"] < inner["y"] < inner["y"] + inner["height"] < settings["y"]
            assert inner["y"] + inner["height"] - box["y"] < 740
            more.press("Enter")  # a key is enough
            expect(steps).to_be_visible()
            expect(more).to_have_attribute("aria-expanded", "true")
        else:
            assert inner["x"] > settings["x"] + settings["width"]
        buttons = s.root.locator(".jupyter-button:visible, .mlxdiff-tools .mlxdiff-button:visible").all()
        for part in (*buttons, s.canvas):
            edge = part.bounding_box()
            assert edge["x"] + edge["width"] <= box["x"] + box["width"]
            assert part.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), part.inner_text()
        assert s.root.evaluate(CUT) == [LONG]
        assert s.label("Model").evaluate("e => getComputedStyle(e).textOverflow") == "ellipsis"
        if narrow:
            more.press(" ")
            expect(more).to_have_attribute("aria-expanded", "false")


def test_what_a_screen_reader_finds(desk):
    d = desk("reader.ipynb", SLOW)
    d.run_all()
    s = d.studio()
    labels = ("Prompt", "Negative prompt", "Model", "Sampler", "Schedule", "Width", "Height", "Pictures", "Seed")
    for name in labels:
        expect(s.label(name)).to_have_count(1)
    for name in ("Steps", "Guidance"):
        expect(s.root.get_by_role("slider", name=name)).to_have_count(1)
    titles = s.root.locator("[title]").evaluate_all("all => all.map(e => e.title)")
    assert "null" not in titles
    lock = s.root.get_by_title("Keep this seed for every picture")
    for now in ("true", "false"):
        lock.press("Enter")
        expect(lock).to_have_attribute("aria-pressed", now)
    s.press("Generate")
    bar, spoken = s.root.get_by_role("progressbar"), s.root.get_by_role("status")
    expect(bar).to_have_attribute("aria-valuenow", re.compile("[1-9]0|5"))
    expect(spoken).not_to_contain_text("Step 10")  # a run's stages are read aloud, not its steps
    expect(spoken).to_contain_text("Done in")
    expect(s.root.get_by_role("img", name="a red house under a full moon")).to_be_visible()


def test_in_notebook_7(desk, page):
    page.allowed += ["403", "reading 'schema'", "not registered"]  # Notebook 7's own, before anything is run
    d = desk("seven.ipynb", QUICK, where="notebooks")
    d.run_all()
    s = d.studio()
    for n in (1, 2):
        s.press("Generate")
        expect(s.thumbs).to_have_count(n)
        s.says("Done in")
    s.shot("studio-notebook7")
