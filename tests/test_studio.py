"""The studio without a browser: traits, messages and files, over a pipeline that needs no model (tests/fakes.py)."""

import errno
import fcntl
import io
import os
import re
import subprocess
import sys
import threading
from collections import deque

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

pytest.importorskip("anywidget", reason="the studio needs ipywidgets and anywidget: pip install .[studio]")

from mlxdiff import advice, builtin, families, images, samplers, schedules
from mlxdiff.convert import lora_header
from mlxdiff.description import published
from mlxdiff.errors import Error
from mlxdiff.recipe import recipe
from mlxdiff.request import MAX_EDGE, Request
from mlxdiff.store import adapters
from mlxdiff.widgets import Studio, controls, gallery, history, settings, start_picture
from mlxdiff.widgets.view import View, line
from mlxdiff.widgets.worker import Cancelled, Update, Worker
from tests import fakes
from tests.checkpoints import header, raw

WAIT = 30


@pytest.fixture
def studio(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Studio("fake", worker=Worker(fakes.load), steps=4)


def draw(studio, **settings):
    for name, value in settings.items():
        setattr(studio, name, value)
    return studio.generate().result(WAIT)


def settled(studio):
    """Wait until the worker is idle and has sent its last messages."""
    studio._worker.submit("fake", None, lambda *_: None).result(WAIT)


def heard(studio, **message):
    """Send a message as the page does."""
    studio._on_message(message, [message.pop("data", b"")])


# --- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "a fox"),
        ("steps", 7),
        ("guidance", 3.5),
        ("sampler", "heun"),
        ("schedule", "karras"),
        ("width", 128),
        ("height", 192),
        ("count", 3),
        ("locked", True),
    ],
)
def test_traits_and_controls_mirror_each_other(studio, name, value):
    control = getattr(studio.controls, name)
    shown, before = control.value, getattr(studio, name)
    setattr(studio, name, value)
    assert control.value == value
    control.value = shown
    assert getattr(studio, name) == before
    if name != "locked":
        setattr(studio, name, value)
        assert getattr(studio.request(), name) == value


def test_an_empty_negative_prompt_is_none_but_an_explicit_one_stays(studio):
    assert studio.request().negative is None
    studio.controls.negative.value = "fog"
    assert studio.request().negative == "fog"
    studio.controls.negative.value = ""
    assert studio.request().negative is None
    studio.negative = ""  # SDXL tells the two apart
    assert studio.request().negative == ""


def test_controls_learn_what_they_could_not_show(studio):
    studio.steps, studio.guidance, studio.sampler, studio.model = 250, 30.0, "Euler a", "some-org/some-repo"
    c = studio.controls
    assert (c.steps.value, c.guidance.value, c.sampler.value, c.model.value) == (
        250,
        30.0,
        "Euler a",
        "some-org/some-repo",
    )


def test_another_model_is_asked_for_and_named(studio):
    c = studio.controls
    c.model.value = ""  # the list's last row
    assert c.other.layout.display is None
    assert studio.model == "fake"  # nothing changed yet
    c.other.value = " some-org/some-repo "
    assert studio.model == c.model.value == "some-org/some-repo"
    assert (c.other.layout.display, c.other.value) == ("none", "")


def test_the_seed_field_holds_any_seed_and_refuses_words(studio):
    studio.seed = 2**63 - 1  # more digits than a browser's numbers keep
    assert studio.controls.seed.value == str(2**63 - 1)
    for wrong in ("moon", "9" * 5000):  # more digits than Python reads
        studio.controls.seed.value = wrong
        assert (studio.seed, studio.controls.seed.value) == (2**63 - 1, str(2**63 - 1))
    studio.controls.seed.value = "12"
    assert studio.seed == 12


def test_every_request_field_can_be_set(studio):
    """Those without a control are in `more`."""
    studio.more = {"clip_skip": 2, "noise": "nv"}
    request = studio.request()
    assert (request.clip_skip, request.noise) == (2, "nv")
    assert "clip skip 2, noise nv" in studio.controls.more.value
    studio.controls.forget.click()
    assert studio.more == {}


def test_the_smallest_and_the_largest_edge_are_a_request_s(studio):
    for edge in (studio.controls.width, studio.controls.height):
        assert (edge.min, edge.max) == (8, MAX_EDGE)


def test_more_takes_the_names_of_settings_alone(studio):
    studio.more = {"clip_skp": 2}
    with pytest.raises(Error, match="A picture has no setting clip_skp"):
        studio.request()


def test_a_run_s_settings_travel_with_its_request(studio):
    """Lists send their index, the rest their value; a box without a value (an emptied number) changes nothing."""
    heun = [v for _, v in studio.controls.sampler.options].index("heun")
    page = {"prompt": "typed", "count": 2, "sampler": heun, "steps": None, "locked": True, "seed": "9"}
    heard(studio, do="generate", settings=page)
    settled(studio)
    assert [p.request.seed for p in studio.images] == [9, 10]
    request = studio.images[0].request
    assert (request.prompt, request.sampler, request.steps) == ("typed", "heun", 4)
    heard(studio, do="compare", settings={"row_values": "1, 2", "column_values": "3"})
    settled(studio)
    assert len(studio.images) == 4
    assert set(studio.view.controls) == set(studio.controls.entries())


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(Error, match="no colour"):
        Studio("fake", worker=Worker(fakes.load), colour="red")


@pytest.mark.parametrize("name", families.MODELS)
def test_presets_of_named_models_are_valid_requests(name):
    row = families.MODELS[name]
    for values in settings.presets(row.defaults).values():
        Request("x", **values).resolve(row.defaults, ("euler", "leading"), "leading", 1, 8)
    assert ("quick" in settings.presets(row.defaults)) == (row.defaults.steps >= 10)


def test_quick_takes_the_models_own_lora_and_another_preset_leaves_it_out(studio):
    studio.model, studio.loras = "storybook", ["style.safetensors:0.5"]
    settled(studio)
    studio._learn(published("storybook", recipe(dtype="float32")))  # the model that opened is a fake
    row, presets = families.ADAPTERS["sd1", families.QUICK], studio.controls.presets
    presets["quick"].click()
    request = studio.request()
    assert request.loras == ("style.safetensors:0.5", "quick")
    assert {name: getattr(request, name) for name in row.wants} == row.wants
    presets["standard"].click()
    assert studio.request().loras == ("style.safetensors:0.5",)
    assert studio.request().steps == families.MODELS["storybook"].defaults.steps
    presets["quick"].click()
    studio.model = "sd15"
    assert studio.loras == ["style.safetensors:0.5"]
    presets["quick"].click()
    assert studio.loras == ["style.safetensors:0.5"]
    assert studio.steps == 10


def test_a_page_that_has_not_seen_what_a_button_set_does_not_undo_it(studio):
    """Its settings travel with the request for a run, and may be older than the button's."""
    before = studio.view.turn
    studio._set({"steps": 7})
    heard(studio, do="generate", settings={"steps": 3}, turn=before)
    assert studio.steps == 7
    heard(studio, do="generate", settings={"steps": 3}, turn=studio.view.turn)
    assert studio.steps == 3
    settled(studio)


def test_naming_a_model_brings_its_defaults(studio):
    studio.model = "sdxl"
    assert (studio.width, studio.steps, studio.guidance) == (1024, 30, 5.0)
    assert studio.sampler is None
    studio.model = "sd-turbo"
    assert (studio.width, studio.steps, studio.guidance) == (512, 1, 0.0)
    assert studio.controls.presets["quick"].disabled


def test_a_model_of_unknown_defaults_fills_in_what_was_not_touched(studio):
    """The user set steps; size and guidance become the fake model's 64 and 5."""
    assert studio.request().width is None
    result = draw(studio)
    assert (result.request.width, result.request.steps, result.request.guidance) == (64, 4, 5.0)
    assert (studio.width, studio.steps, studio.guidance) == (64, 4, 5.0)
    assert studio.controls.width.step == 8


def test_what_a_model_ignores_is_disabled_with_the_reason(studio):
    assert not studio.controls.negative.disabled
    studio.guidance = 1.0
    assert studio.controls.negative.disabled
    assert "guidance 1" in studio.controls.why.value
    studio.guidance = 1.1
    assert not studio.controls.negative.disabled
    one = fakes.describe("LCM", "lcm")
    assert "one pass" in settings.ignored(one, 7.5, true_cfg=1.0)["negative"]
    assert settings.ignored(one, 1.0, true_cfg=2.0) == {}


def test_words_that_the_built_in_model_does_not_know_are_named(studio):
    studio.prompt = "a red hause"
    assert studio.controls.why.value == ""  # another model may know it
    studio._learn(fakes.describe("storybook"))
    assert studio.controls.why.value == "storybook does not know: hause (house?)."
    studio.prompt = "a red house"
    assert (studio.controls.why.value, studio.controls.negative.disabled) == ("", False)


def test_the_words_of_the_built_in_model_are_chips_and_a_surprise_is_made_of_them(studio):
    words = studio.controls.words
    assert words.layout.display == "none"  # another model knows other words
    studio._learn(fakes.describe("storybook"))
    assert words.layout.display is None
    for phrase in ("red", "lighthouse", "under a full moon"):
        assert f'class="mlxdiff-chip">{phrase}</button>' in words.children[1].value
    prompts = set()
    for _ in range(20):
        words.surprise.click()
        assert builtin.unknown_words(studio.prompt) == []
        prompts.add(studio.prompt)
    assert len(prompts) > 10


def test_size_presets_suit_the_model(studio):
    studio.model = "sdxl"
    found = {}
    for name, button in studio.controls.shapes.items():
        button.click()
        found[name] = studio.width, studio.height
    assert found == {"Square": (1024, 1024), "Tall": (832, 1280), "Wide": (1280, 832)}
    studio.model = "fake"
    studio._known.defaults = None
    studio.controls.shapes["Tall"].click()
    assert "not known yet" in studio.status


def test_weights_and_memory_are_options_and_fit_sets_them(studio, monkeypatch):
    c, memory = studio.controls, studio.controls.memory
    studio.options = {"taesd": "auto"}
    memory.bits.value, memory.low_memory.value = "mxfp8", True
    assert studio.options == {"taesd": "auto", "bits": "mxfp8", "low_memory": True}
    studio.options = {"bits": 4}
    assert (memory.bits.value, memory.low_memory.value) == (4, False)
    memory.bits.value = ""
    assert studio.options == {}
    monkeypatch.setattr(settings, "this_machine", lambda: advice.mac(16))
    studio.model = "flux-dev"
    studio.negative = "fog"  # which this model does not take: its run says so, the estimate goes on
    assert re.fullmatch(r"Memory: about \d\d\.\d of 11\.5 GB", memory.need.value)
    memory.fit.click()
    assert studio.error is None
    assert (studio.options["low_memory"], c.memory.bits.value in (8, 6, 5, 4)) == (True, True)
    assert studio.status.startswith("It should fit now, with ")
    workload = studio._workload()
    assert advice.fits(workload, advice.mac(16))
    memory.fit.click()
    assert studio.status == "It fits as it is"
    monkeypatch.setattr(settings, "this_machine", lambda: advice.mac(1))
    memory.fit.click()
    assert studio.status == "flux-dev fits this machine at no setting. Choose a smaller model."
    studio.model = "some-org/some-repo"
    memory.fit.click()
    assert "some-org/some-repo is not known yet" in studio.status
    assert memory.need.value == ""


def test_an_empty_prompt_is_drawn(studio):
    assert draw(studio, prompt="").request.prompt == ""
    assert studio.view.history[-1]["title"] == f"no prompt, seed {studio.seed}"


def test_rectified_flow_has_samplers_and_schedules_of_its_own(studio):
    draw(studio, sampler="heun", more={"clip_skip": 2})
    model = fakes.describe("FLUX", "flux-dev")
    studio._learn(model)
    names = [v for _, v in studio.controls.sampler.options]
    assert "euler" in names
    assert "dpmpp_sde" not in names
    assert [v for _, v in studio.controls.schedule.options] == ["", *schedules.FLOW_SPACINGS]
    assert (studio.sampler, studio.controls.sampler.value, studio.more) == ("heun", "heun", {"clip_skip": 2})
    studio._learn(fakes.describe("SD"))
    assert "dpmpp_sde" in [v for _, v in studio.controls.sampler.options]
    for preset in settings.presets(families.FAMILIES["flux"].defaults).values():
        assert preset["sampler"] is None or samplers.SAMPLERS[preset["sampler"]].flow is not None


# --- runs


def test_a_run_saves_its_pictures_with_their_settings(studio, tmp_path):
    result = draw(studio, prompt="A red house!", count=2, seed=5, locked=True)
    assert [p.path.name for p in studio.images] == ["a-red-house-5.png", "a-red-house-6.png"]
    for i, picture in enumerate(studio.images):
        assert images.read_settings(picture.path) == (picture.request, "fake")
        assert Image.open(picture.path).info["mlxdiff-recipe"] == "float32"
        assert picture.request.seed == 5 + i
        assert picture.image.convert("RGB").tobytes() == result.images[i].tobytes()
        assert Image.open(io.BytesIO(picture._repr_png_())).size == (64, 64)
    copy = studio.images[0].save(tmp_path / "copy.jpg")
    assert images.read_settings(copy)[0].seed == 5


def test_the_view_mirrors_a_run(studio, monkeypatch):
    frames = []
    monkeypatch.setattr(studio.view, "send", lambda message, buffers: frames.append((message, buffers)))
    statuses = []
    studio.observe(lambda change: statuses.append(change["new"]), "status")
    draw(studio)
    settled(studio)
    assert frames[0][0]["do"] == "frame"
    assert Image.open(io.BytesIO(frames[0][1][0])).format == "JPEG"
    assert statuses[0] == "Opening the model"
    assert any(s.startswith("Step 4 of 4 · ") for s in statuses)
    assert statuses[-1].startswith("Done in ")
    assert studio.view.shown["png"] == studio.images[-1].path.read_bytes()
    assert len(studio.view.history) == 1
    assert not studio.view.running


def test_seeds_are_fresh_unless_locked(studio):
    seeds = [draw(studio).request.seed for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert studio.seed == seeds[1]  # the field shows what was used
    studio.controls.last.click()
    assert draw(studio).request.seed == seeds[1]
    studio.controls.dice.click()
    assert studio.seed != seeds[1]
    assert draw(studio).request.seed == studio.seed  # still locked


def test_an_error_is_shown_kept_and_cleared(studio):
    with pytest.raises(Error, match="step 2"):
        draw(studio, prompt="fail")
    settled(studio)
    assert studio.status == "The fake model broke in step 2. Ask for something else."
    assert studio.view.error["fix"] == "Ask for something else."
    assert "in run" in studio.view.error["trace"]
    assert isinstance(studio.error, Error)
    draw(studio, prompt="fine")
    assert (studio.error, studio.view.error) == (None, {})


def test_an_error_goes_with_the_next_action(studio):
    def fail():
        heard(studio, do="view", key=99)

    for action in (
        lambda: studio.controls.presets["quick"].click(),
        lambda: studio.controls.dice.click(),
        lambda: setattr(studio.controls.prompt, "value", "a fox"),
        lambda: studio.view._handle_custom_msg({"do": "cancel"}, []),
    ):
        draw(studio)
        studio._try(fail)
        assert (studio.status, type(studio.error)) == ("KeyError: 99", KeyError)
        action()
        assert (studio.view.error, studio.error, studio.view.status) == ({}, None, "Ready")


def test_a_bad_setting_is_an_error_of_the_run(studio):
    with pytest.raises(Error, match="width 65"):
        draw(studio, width=65)


def test_a_refusal_for_want_of_memory_says_what_to_do_here(studio):
    machine = advice.Machine(memory=10**6, budget=10**6, gpu=False)

    def refuse(model, **_):
        advice.check(advice.named("sdxl", recipe(dtype="float16")), machine)

    studio._worker = Worker(refuse)
    with pytest.raises(Error, match="takes about"):
        draw(studio)
    assert studio.view.error["fix"] == (
        "It fits at no setting; nor does any other named model. options={'force': True} tries it as it is."
    )


def test_errors_in_callbacks_are_shown(studio):
    """Jupyter itself would show nothing."""
    studio.folder = __file__  # a file, where no folder can be made
    studio.controls.generate.click()
    assert "cannot be written to" in studio.status
    assert studio.error is not None
    studio.view._handle_custom_msg({"do": "view", "key": 99}, [])
    assert studio.status == "KeyError: 99"


def test_cancel_and_queue(studio):
    gate = threading.Event()
    studio._worker = Worker(lambda model, **_: fakes.Pipe(gate=gate))
    started, statuses = threading.Event(), []
    studio.observe(lambda change: "First step" in change["new"] and started.set(), "status")
    studio.observe(lambda change: statuses.append(change["new"]), "status")
    jobs = [studio.generate() for _ in range(3)]
    assert started.wait(WAIT)
    assert not studio.controls.cancel.disabled
    assert studio.controls.clear.layout.display is None
    studio.cancel()
    gate.set()
    with pytest.raises(Cancelled):
        jobs[0].result(WAIT)
    assert jobs[1].result(WAIT).images
    jobs[2].result(WAIT)
    assert any(s.startswith("2 of 3 · Step 1 of 4") for s in statuses)
    gate.clear()
    more = [studio.generate() for _ in range(2)]
    studio.cancel(everything=True)
    gate.set()
    for job in more:
        with pytest.raises(Cancelled):
            job.result(WAIT)
    settled(studio)
    assert not studio.view.running
    assert studio.controls.cancel.disabled


# --- history and files


def test_a_picture_shows_what_it_was_drawn_from(studio):
    draw(studio, prompt="a boat", negative="fog", seed=3, locked=True)
    assert studio.view.shown["words"] == [("Prompt", "a boat"), ("Negative prompt", "fog")]
    assert studio.view.shown["caption"].startswith("seed 3 · 64 × 64 · 4 steps of euler")
    draw(studio, negative=None, image=studio.images[0].path, strength=0.35)
    words = [("Prompt", "a boat"), ("Start picture", "a-boat-3.png"), ("Strength", "0.35")]
    assert studio.view.shown["words"] == words
    draw(studio, model="editor", image=None)
    draw(studio, image=studio.images[0].path)
    assert studio.view.shown["words"] == [("Prompt", "a boat"), ("Edited", "a-boat-3.png")]


def test_a_studio_recalls_the_pictures_of_its_folder(studio, tmp_path):
    """In the order in which they were written; files without settings, start pictures and broken ones are left out."""
    first = draw(studio, prompt="one").request
    draw(studio, prompt="two")
    folder = tmp_path / "pictures"
    (folder / "broken.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    (folder / "begin-0.png").write_bytes(studio.images[0].path.read_bytes())
    for age, name in ((30, studio.images[1].path), (10, studio.images[0].path)):  # the first was written last
        os.utime(name, (1e9 - age, 1e9 - age))
    other = Studio("fake", worker=studio._worker)
    draw(other, prompt="three")
    settled(other)
    other.recall()
    assert [entry["title"].split(",")[0] for entry in other.view.history] == ["two", "one", "three"]
    heard(other, do="restore", key=other.view.history[1]["key"])
    assert (other.prompt, other.seed) == ("one", first.seed)


def test_favourites_are_kept_beside_the_pictures_and_outlast_the_strip(studio, monkeypatch):
    monkeypatch.setattr(history, "STRIP", 2)
    for prompt in ("one", "two"):
        draw(studio, prompt=prompt)
    heard(studio, do="star", key=0)
    file = studio.images[0].path.parent / "favourites.txt"
    assert file.read_text() == f"{studio.images[0].path.name}\n"
    draw(studio, prompt="three")
    shown = [(entry["title"].split(",")[0], entry["star"]) for entry in studio.view.history]
    assert shown == [("one", True), ("two", False), ("three", False)]
    other = Studio("fake", worker=studio._worker)
    other.recall()
    assert [entry["star"] for entry in other.view.history] == [True, False, False]
    heard(studio, do="star", key=0)
    assert [entry["star"] for entry in studio.view.history] == [False, False, False]
    assert file.read_text() == ""
    heard(studio, do="star", key=1)
    heard(studio, do="delete", key=1)
    assert file.read_text() == ""


def test_two_studios_keep_each_other_s_favourites(studio, monkeypatch):
    """Of one folder: a star is what this studio shows, and no other process may note one in between."""
    for prompt in ("one", "two"):
        draw(studio, prompt=prompt)
    other = Studio("fake", worker=studio._worker)
    other.recall()
    names = [picture.path.name for picture in studio.images]
    keys = {entry["title"].split(",")[0]: entry["key"] for entry in other.view.history}
    heard(studio, do="star", key=0)
    heard(other, do="star", key=keys["one"])  # which it shows without one
    read, refused = history.favourites, []

    def favourites(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused.append(folder)
        finally:
            os.close(handle)
        return read(folder)

    monkeypatch.setattr(history, "favourites", favourites)
    heard(other, do="star", key=keys["two"])
    assert read(studio.images[0].path.parent) == {*names}
    assert refused
    assert [entry["star"] for entry in other.view.history] == [True, True]

    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(history, "favourites", read)
    monkeypatch.setattr(fcntl, "flock", without_locks)
    heard(other, do="star", key=keys["two"])
    assert read(studio.images[0].path.parent) == {names[0]}


def test_a_picture_that_is_finished_while_others_are_recalled_is_in_the_strip(studio, monkeypatch):
    draw(studio, prompt="one")
    other, newest, threads = Studio("fake", worker=studio._worker), history._newest, []

    def slow(entries):
        if threading.current_thread() is threading.main_thread():  # the strip was read, and is not changed yet
            image = studio.images[0].image
            threads.append(threading.Thread(target=other._history.keep, args=(studio.images[0], image, False)))
            threads[0].start()
            threads[0].join(0.1)
        return newest(entries)

    monkeypatch.setattr(history, "_newest", slow)
    other.recall()
    threads[0].join()
    assert len(other.view.history) == 2


def test_an_interrupt_at_any_moment_leaves_no_studio_busy(studio, interrupts):
    """A kernel's interrupt meets the thread of the cells; the worker draws on."""
    times = 0
    for moment in interrupts("studio.py", "worker.py"):
        times += 1
        with moment:
            studio.generate()
            studio.cancel(everything=True)
        studio.cancel(everything=True)
        assert draw(studio, steps=1).images
        settled(studio)
        assert (studio.view.running, studio._jobs, studio._worker._waiting) == (False, [], deque())
    assert times > 30


def test_a_copy_in_another_format_is_handed_to_the_page_and_restores(studio, monkeypatch):
    draw(studio, prompt="one")
    handed = []
    monkeypatch.setattr(studio.view, "send", lambda message, buffers=None: handed.append((message, buffers)))
    for ending, kind in (("jpg", "JPEG"), ("webp", "WEBP")):
        heard(studio, do="copy", key=0, ending=ending)
        message, (data,) = handed[-1]
        assert message == {"do": "copy", "name": f"{studio.images[0].path.stem}.{ending}"}
        assert Image.open(io.BytesIO(data)).format == kind
        studio.prompt = "another"
        heard(studio, do="drop", part=0, parts=1, use="restore", data=data)
        assert studio.prompt == "one"
    with pytest.raises(Error, match="There is no format 'exe'"):
        heard(studio, do="copy", key=0, ending="exe")


def test_favourites_of_any_name(tmp_path):
    names = {"a b.png", "line\u2028end.png", os.fsdecode(b"\xff.png"), "ä.png"}
    history._write(tmp_path, names)
    assert history.favourites(tmp_path) == names
    (tmp_path / history.FAVOURITES).write_bytes(b"a.png\r\nb.png\r\n")  # by another system's editor
    assert history.favourites(tmp_path) == {"a.png", "b.png"}


def test_favourites_that_cannot_be_read_hide_no_picture(tmp_path):
    """A pipe in their place would be read for ever."""
    settings = {"seed": 1, "steps": 1, "guidance": 1.0, "width": 8, "height": 8}
    request = Request("a fox", **settings, sampler="euler", schedule="leading")
    images.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", request, "m", "float32")
    os.mkfifo(tmp_path / history.FAVOURITES)
    view = View()
    with pytest.raises(Error, match="not a regular file"):
        history.History(view).recall(tmp_path)
    assert len(view.history) == 1


def test_a_full_disk_costs_no_favourites_and_no_mask(tmp_path, full_disk):
    """What is there stays, and nothing half-written is beside it."""
    history._write(tmp_path, {"a.png"})
    start_picture.keep(tmp_path / "mask-1.png", b"x")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk():
        with pytest.raises(Error, match="cannot be written"):
            history._write(tmp_path, {f"{i}.png" for i in range(9999)})
        with pytest.raises(Error, match="cannot be written"):
            start_picture.keep(tmp_path / "mask-1.png", b"x" * 99_999)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_settings_whose_prompt_is_no_text_are_refused_when_they_are_read(studio):
    """Jupyter could not send them to the page."""
    picture = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("mlxdiff", '{"prompt": "a \\ud800 fox", "seed": 1}')
    Image.new("RGB", (8, 8)).save(picture, "PNG", pnginfo=info)
    with pytest.raises(Error, match="not valid UTF-8"):
        studio.load(picture.getvalue())


def test_enlarge_uses_the_chosen_upscaler(studio, monkeypatch):
    draw(studio, prompt="one")
    asked = []
    monkeypatch.setattr(studio, "_submit", lambda request, *_: asked.append(request))
    for chosen, wanted in (("", None), ("realesrgan-x2plus", "realesrgan-x2plus"), ("", None)):
        studio.controls.upscaler.value = chosen
        heard(studio, do="enlarge", key=0)
        assert (asked[-1].hires, asked[-1].upscaler) == ((2.0, 0.5), wanted)


def test_restore_all_or_the_seed_alone(studio):
    first = draw(studio, prompt="one", sampler="heun", negative="fog", more={"clip_skip": 2}).request
    draw(studio, prompt="two", sampler="euler", negative=None, more={})
    heard(studio, do="seed", key=0)
    assert (studio.prompt, studio.seed, studio.locked) == ("two", first.seed, True)
    heard(studio, do="restore", key=0)
    assert (studio.prompt, studio.sampler, studio.negative) == ("one", "heun", "fog")
    assert studio.more == {"clip_skip": 2}  # and not the eta and noise that nobody chose
    assert draw(studio).request == first
    heard(studio, do="view", key=1)
    assert studio.view.shown["title"] == "two"


def test_reuse_has_a_control_and_comes_back_with_a_picture(studio):
    """Its value is not one of the control's steps, and comes back to the last digit."""
    studio.reuse = 0.12345
    first = draw(studio, steps=8, sampler="euler").request
    assert first.reuse == 0.12345
    studio.reuse = 0.0
    assert studio.controls.reuse.value == 0
    assert draw(studio).request.reuse == 0
    heard(studio, do="restore", key=0)
    assert (studio.reuse, studio.controls.reuse.value, studio.more) == (0.12345, 0.12345, {})
    assert "reuse" in studio.controls.compare.rows.options


def test_a_stochastic_sampler_s_eta_is_not_carried_to_another(studio):
    draw(studio, sampler="ddim", more={"eta": 0.5})
    studio.more = {}
    heard(studio, do="restore", key=0)
    assert studio.more == {"eta": 0.5}
    studio.sampler = "euler"  # which would refuse it
    assert studio.more == {}
    draw(studio)


def test_a_dropped_picture_of_ours_restores_everything(studio, tmp_path):
    request = draw(studio, prompt="a boat", more={"clip_skip": 2}).request
    other = Studio("fake", worker=studio._worker)
    heard(other, do="drop", part=0, parts=1, use="restore", data=studio.images[0].path.read_bytes())
    assert other.generate().result(WAIT).request == request


def test_a_file_in_parts_is_put_together(studio):
    """A second file, whose first part follows an unfinished one, begins anew."""
    draw(studio, prompt="a boat")
    data = studio.images[0].path.read_bytes()
    other = Studio("fake", worker=studio._worker)
    heard(other, do="drop", part=0, parts=3, use="restore", data=b"something left behind")
    for part in range(3):
        assert other.prompt != "a boat"
        end = part * 300 + 300 if part < 2 else None
        heard(other, do="drop", part=part, parts=3, use="restore", data=data[part * 300 : end])
    assert other.prompt == "a boat"


def test_two_pages_that_drop_files_at_once_mix_nothing(studio):
    draw(studio, prompt="a boat")
    data = studio.images[0].path.read_bytes()
    other = Studio("fake", worker=studio._worker)
    heard(other, do="drop", file="a", part=0, parts=2, use="restore", data=data[:300])
    heard(other, do="drop", file="b", part=0, parts=2, use="restore", data=data[:200])
    for part in (1, 2, -1):
        with pytest.raises(Error, match="at the same time"):
            heard(other, do="drop", file="a", part=part, parts=part + 1, use="restore", data=data[300:])
    heard(other, do="drop", file="b", part=1, parts=2, use="restore", data=data[200:])
    assert other.prompt == "a boat"


def test_restoring_finds_the_model_where_it_can(studio):
    request = Request("x", seed=1, steps=3)
    for name, expected in (("stable-diffusion-v1-5", "sd15"), ("sdxl", "sdxl"), ("unheard-of", "sdxl"), (None, "sdxl")):
        studio.restore(request, name)
        assert studio.model == expected
    assert studio.steps == 3  # and not the model's 30
    assert studio.width == 1024


def test_a_picture_without_settings_says_so(studio):
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    with pytest.raises(Error, match=r"^The picture carries no settings"):
        studio.load(out.getvalue())
    with pytest.raises(Error, match=r"^The picture cannot be read as a picture: its format is not known\."):
        studio.load(b"not a picture")
    with pytest.raises(Error, match=r"^The file cannot be read"):
        heard(studio, do="drop", part=0, parts=1, use="begin", data=b"not a picture")


def test_a_file_that_is_gone_is_named(studio):
    draw(studio)
    studio.images[0].path.unlink()
    with pytest.raises(Error, match="There is no picture at"):
        _ = studio.images[0].image
    with pytest.raises(Error, match="cannot be read"):
        studio.images[0]._repr_png_()


@pytest.mark.parametrize("now", ["gone", "text", "pipe", "folder", "cut"])
def test_a_picture_that_changed_while_it_is_shown_is_one_line(studio, now):
    """Whatever the page asks for, the studio goes on, and deleting another picture shows none that cannot be read."""
    for seed in (1, 2):
        studio.seed = seed
        draw(studio)
    keys, path = [entry["key"] for entry in studio.view.history], studio.images[0].path
    data = path.read_bytes()
    path.unlink()
    if now == "pipe":
        os.mkfifo(path)
    elif now == "folder":
        path.mkdir()
    elif now != "gone":
        path.write_bytes(b"hello" if now == "text" else data[: len(data) // 2])
    asked = [{"do": "copy", "ending": ending} for ending in ("png", "jpg", "webp")] + [{"do": "begin"}, {"do": "paint"}]
    for message in [*asked, *[{"do": "view"}] * (now not in ("text", "cut"))]:
        studio.view._handle_custom_msg({**message, "key": keys[0]}, [])
        assert path.name in studio.status, message
        assert "\n" not in studio.status
        studio.view.say("Ready")
    for do in ("seed", "restore", "star"):  # these need no file
        heard(studio, do=do, key=keys[0])
    heard(studio, do="delete", key=keys[1])
    assert [entry["key"] for entry in studio.view.history] == keys[:1]
    assert studio.view.shown.get("key") == (keys[0] if now in ("text", "cut") else None)
    assert len(studio.images) == 1
    draw(studio)


# --- the start picture


def bare(width=96, height=48) -> bytes:
    """A picture without settings."""
    out = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((width, height)).save(out, "JPEG")
    return out.getvalue()


def test_a_picture_without_settings_becomes_the_start_picture(studio, tmp_path):
    """Width and height take its shape, at no more pixels than the model's default size; the file is kept unchanged."""
    draw(studio)
    heard(studio, do="drop", part=0, parts=1, use="begin", data=bare())
    assert studio.image.read_bytes() == bare()
    assert (studio.width, studio.height) == (88, 48)  # 64 x 64 pixels make 90.5 x 45.3, in multiples of 8
    assert studio.controls.start_picture.layout.display is None
    studio.controls.strength.value = 0.35
    request = draw(studio).request
    assert (request.image, request.strength) == (studio.image, 0.35)
    assert images.read_settings(studio.images[-1].path)[0].image == str(studio.image)
    assert not list(tmp_path.rglob("*.part"))
    studio.controls.start_picture.remove[0].click()
    assert studio.controls.start_picture.layout.display == "none"
    request = draw(studio).request
    assert (request.image, request.strength) == (None, None)


def test_a_shape_is_taken_over_once_the_model_says_its_size(studio):
    """For an unknown model when it opens; then presets and other models keep the shape, instead of their square."""
    studio.image = Image.new("RGB", (96, 48))
    assert studio.request().width is None
    first = draw(studio).request
    assert (first.width, first.height) == (studio.width, studio.height) == (88, 48)
    studio.width = studio.height = 64
    studio.controls.presets["fine"].click()
    assert (studio.width, studio.height, studio.steps) == (88, 48, 40)
    studio.image = Image.new("RGB", (1600, 800))
    studio.model = "sdxl"
    assert (studio.width, studio.height) == (1472, 704)  # 1024 x 1024 pixels make 1448.2 x 724.1; multiples of 64


def test_a_picture_with_settings_restores_them_unless_it_is_to_be_the_start_picture(studio):
    draw(studio, prompt="a boat")
    png = studio.images[0].path.read_bytes()
    studio.prompt = "another"
    heard(studio, do="drop", part=0, parts=1, use="begin", data=png)
    assert (studio.prompt, studio.status) == ("another", "The next picture begins with this one")
    assert studio.image.read_bytes() == png
    heard(studio, do="drop", part=0, parts=1, use="restore", data=png)
    assert (studio.prompt, studio.image, studio.status) == ("a boat", None, "Settings restored")
    heard(studio, do="begin", key=0)
    assert studio.image == studio.images[0].path


def test_restoring_brings_back_the_start_picture(studio):
    first = draw(studio, image=Image.new("RGB", (32, 32)), strength=0.5).request
    assert first.image.size == (32, 32)
    heard(studio, do="drop", part=0, parts=1, use="begin", data=bare())
    drawn = draw(studio, strength=0.3).request
    studio.image, studio.strength = None, 0.9
    heard(studio, do="restore", key=1)
    assert (studio.image, studio.strength, studio.more) == (drawn.image, 0.3, {})
    assert (studio.width, studio.height) == (drawn.width, drawn.height)
    drawn.image.unlink()
    studio.image = None
    heard(studio, do="restore", key=1)
    assert "There is no picture at" in studio.view.error["problem"]
    assert studio.image is None


def test_a_model_that_edits_takes_several_pictures(studio):
    """Dropped or chosen one after the other; each has its own button; the result has the shape of the first."""
    shown, why = studio.controls.start_picture, studio.controls.why
    draw(studio, model="editor")
    for width in (96, 48):
        heard(studio, do="drop", part=0, parts=1, use="begin", data=bare(width))
        assert studio.status == "The next picture edits this one"
    first, second = studio.image
    assert (len(shown.remove), shown.sizes, studio.view.edits) == (2, [(96, 48), (48, 48)], True)
    assert [w.value.split('"')[1] for w in shown.children[:4:2]] == ["Picture 1 to edit", "Picture 2 to edit"]
    assert (studio.controls.strength.disabled, why.value) == (
        True,
        "This model edits: it takes no strength and no mask.",
    )
    with pytest.raises(Error, match="editor takes at most 2 pictures to edit"):
        heard(studio, do="drop", part=0, parts=1, use="begin", data=bare(40))
    request = draw(studio).request
    assert (request.image, request.strength) == ((first, second), None)
    assert (request.width, request.height) == (96, 48)
    stored, _ = images.read_settings(studio.images[-1].path)
    assert stored.image == (str(first), str(second))
    shown.remove[0].click()
    assert (studio.image, shown.sizes) == ([second], [(48, 48)])
    shown.remove[0].click()
    assert (studio.image, shown.layout.display, why.value) == (None, "none", "")
    heard(studio, do="restore", key=1)
    assert (studio.image, len(shown.remove)) == ((first, second), 2)
    studio.model = "fake"
    draw(studio, image=[first])
    assert (studio.controls.strength.disabled, why.value) == (False, "")
    assert 'alt="The start picture"' in shown.children[0].value


def test_a_named_model_that_edits_is_known_to_before_it_is_open(studio):
    """A picture becomes the next result's size as Kontext was trained on it."""
    studio.model, studio.image = "flux-kontext", Image.new("RGB", (400, 100))
    assert (studio.width, studio.height) == (1568, 672)
    assert studio.controls.strength.disabled
    assert studio.request().strength is None


def test_strengths_are_compared(studio):
    studio.image = Image.new("RGB", (32, 32))
    grid = studio.compare(strength=[0.3, 0.6]).result()
    assert [p.request.strength for p in grid.cells.values()] == [0.3, 0.6]


# --- comparisons


def test_compare_draws_every_pair_and_one_labelled_file(studio, tmp_path):
    grid = studio.compare(seed=[1, 2], steps=[2, 3, 4]).result()
    settled(studio)
    assert [len(grid.cells), len(studio.images), len(studio.view.history)] == [6, 6, 7]
    assert grid.cells[1, 2].request.seed == 2
    assert grid.cells[1, 2].request.steps == 4
    assert {small.size for small in grid._small.values()} == {(192, 192)}  # while it fills, they fill their frames
    saved = Image.open(tmp_path / "pictures" / "compare-seed-steps.png")
    assert saved.tobytes() == grid.image.tobytes()
    whole = np.asarray(saved)
    for seed in (1, 2):  # each picture is in its row, whole, once a column
        one = np.asarray(fakes.picture(Request("x", seed=seed, width=64, height=64)))[..., 0]
        found = np.argwhere((np.lib.stride_tricks.sliding_window_view(whole[..., 0], (64, 64)) == one).all((2, 3)))
        assert len(found) == 3
        assert len(set(found[:, 0])) == 1


def test_a_grid_in_one_direction_and_of_sizes(studio):
    assert studio.compare(guidance=[1.0, 2.0]).result().image.size[0] > 2 * 64
    grid = studio.compare(width=[64, 128]).result()
    assert grid.image.width > 2 * 128  # every cell has room for the largest


def test_one_fresh_seed_for_a_whole_grid(studio):
    grid = studio.compare(steps=[2, 3]).result()
    assert len({p.request.seed for p in grid.cells.values()}) == 1


def test_the_values_of_an_axis_are_read_as_their_setting_is(studio):
    assert controls.values("seed", "1, 2,3") == [1, 2, 3]
    assert controls.values("guidance", "1, 2.5") == [1.0, 2.5]
    assert controls.values("prompt", "a red, old house | a boat") == ["a red, old house", "a boat"]
    for name, text in (("steps", "few"), ("steps", " , "), ("colour", "red")):
        with pytest.raises(Error):
            controls.values(name, text)
    with pytest.raises(Error, match="cannot be compared"):
        studio.compare()
    with pytest.raises(Error, match="cannot be compared"):
        studio.compare(colour=["red"])


def test_a_sheet_is_as_square_as_it_can_be():
    tiles = [Image.new("RGB", (10, 20), (i, 0, 0)) for i in range(5)]
    sheet = images.sheet(tiles)
    assert sheet.size == (30, 40)
    assert [sheet.getpixel((x, y))[0] for y in (0, 20) for x in (0, 10, 20)] == [0, 1, 2, 3, 4, 0]


def test_interrupting_the_wait_for_a_grid_cancels_all_of_it(studio):
    grid = gallery.Grid(Request("x"), {"seed": [1, 2]})

    class Interrupted:
        cancelled = False

        def result(self):
            raise KeyboardInterrupt

        def cancel(self):
            self.cancelled = True

    grid.jobs += [Interrupted(), Interrupted()]
    with pytest.raises(KeyboardInterrupt):
        grid.result()
    assert all(job.cancelled for job in grid.jobs)


# --- words


@pytest.mark.parametrize(
    ("update", "text", "progress"),
    [
        (Update("download", 250_000_000, 10**9), "Downloading · 25% of 1.0 GB", 0.25),
        (Update("denoise", 0, 20), "First step, the slowest", 0.0),
        (
            Update("denoise", 5, 20, pace=0.5, peak=2 * 10**9),
            "Step 5 of 20 · 0.50 s a step · 7.5 s left · 2.0 GB",
            0.25,
        ),
        (Update("denoise", 1, 25, pace=8.0, peak=0), "Step 1 of 25 · 8.00 s a step · 3 min 12 s left · 0 MB", 0.04),
        (Update("decode", 0, 1), "Making pixels", -1.0),
        (Update("decode", 1, 4), "Making pixels · 2 of 4", -1.0),
    ],
)
def test_the_status_line(update, text, progress):
    assert line(update) == (text, progress)


def test_importing_the_widgets_needs_no_jupyter():
    """`mlxdiff studio --help` and the worker do without ipywidgets; Studio says what to install."""
    code = (
        "import sys; sys.modules['anywidget'] = None\nimport mlxdiff.widgets.worker\nfrom mlxdiff.widgets import Studio"
    )
    from tests.test_imports import ROOT

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "Install it with: pip install" in done.stderr


# --- LoRAs


def lora_file(path, width, layer="lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", **notes):
    shapes = {f"{layer}.lora_down.weight": (4, width), f"{layer}.lora_up.weight": (320, 4)}
    return raw(path, header(shapes, metadata=notes), size=4 * (width + 320) * 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of LoRAs for SD 1.5, which the fake model is: one that fits, and others."""
    (tmp_path / "loras" / "deep").mkdir(parents=True)
    monkeypatch.setenv("MLXDIFF_LORAS", str(tmp_path / "loras"))
    word = "ink\x1b[2J & <b>" + 60 * "x"
    lora_file(tmp_path / "loras" / "deep" / "style.safetensors", 768, **{"modelspec.trigger_phrase": word})
    lora_file(tmp_path / "loras" / "a wider one.safetensors", 2048)
    lora_file(tmp_path / "loras" / "flux.safetensors", 64, "lora_unet_double_blocks_0_img_attn_qkv")
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"")
    rows = {name: families.MODELS[name] for name in ("sd15", "flux-dev")}
    monkeypatch.setattr(lora_header, "MODELS", rows)  # all others take seconds
    return tmp_path / "loras"


def looked(studio):
    assert studio._picker.rests.wait(WAIT)
    assert studio._picker._thread.is_alive()  # MLX may abort at exit after a thread that built networks has ended
    return studio.controls.loras


def test_loras_of_a_folder_are_chosen_by_their_headers(studio, folder):
    studio.controls.loras_shown.value = True
    assert "once the model has drawn" in looked(studio).note.value
    draw(studio)
    entries = looked(studio)._list.children
    fits, *others = entries
    assert (fits.description, fits.disabled) == ("deep/style", False)
    said = {entry.children[0].description: entry.children[1].value for entry in others}
    assert all(entry.children[0].disabled for entry in others)
    assert said["a wider one"].startswith("Its layers have other shapes than those of fake.")
    assert said["flux"] == "2 of its 2 tensors have no place in fake. It seems to be made for FLUX.1."
    assert "broken.safetensors" in said["broken"]

    fits.click()
    file = folder / "deep" / "style.safetensors"
    assert studio.loras == [f"{file}:1"]
    (row,) = looked(studio).rows
    assert row.about.value == "1 of 1 layer (unet 1), rank 4"
    (word,) = re.findall("<button[^>]*>(.*?)</button>", row.words.value)
    assert word.startswith("ink\\x1b[2J &amp; &lt;b&gt;xxx")  # nothing of it reaches the page as it is
    assert len(word) < 80
    row.scale.value = -1.5
    assert studio.request().loras == (f"{file}:-1.5",)
    assert looked(studio).rows == [row]  # it still has the focus
    assert studio.controls.loras_shown.description == "LoRA, words (1)"

    studio.controls.loras.other.value = "org/repo:0.5"
    assert studio.loras == [f"{file}:-1.5", "org/repo:0.5"]
    row = looked(studio).rows[1]
    assert (row.scale.value, row.about.value) == (0.5, "It is looked at when it is drawn with.")
    row.remove.click()
    looked(studio).rows[0].remove.click()
    assert studio.request().loras is None
    assert studio.controls.loras_shown.description == "LoRA, words"


def test_a_lora_comes_back_with_a_picture_and_a_misfit_is_told(studio, folder):
    kept = f"{folder / 'a wider one.safetensors'}:0.5"
    studio.restore(Request("a fox", loras=(kept,), lora_hashes=("0",), seed=1, width=64, height=64))
    assert studio.request().loras == (kept,)
    assert studio.request().lora_hashes == ()
    assert studio.more == {}
    studio._learn(fakes.describe("fake"))
    assert "mlxdiff-misfit" in looked(studio).rows[0]._dom_classes
    assert "other shapes" in looked(studio).rows[0].about.value


def test_a_published_lora_is_chosen_by_its_name_and_brings_its_settings(studio, folder):
    """Against the registry's row: its name, its scale, and what it was made for."""
    studio.controls.loras_shown.value = True
    draw(studio)
    row = families.ADAPTERS["sd1", "lcm"]
    (lcm,) = [entry for entry in looked(studio)._named.children[1:] if entry.description == "lcm"]
    assert f"made for {row.steps} steps" in lcm.tooltip
    lcm.click()
    request = studio.request()
    assert request.loras == (f"lcm:{row.scale:g}",)
    assert {name: getattr(request, name) for name in row.wants} == row.wants
    assert row.licence in looked(studio).rows[0].about.value
    assert "lcm" not in [entry.description for entry in studio.controls.loras._named.children[1:]]
    studio.model = "z-image-turbo"
    assert looked(studio)._named.children == ()


def test_a_word_and_a_style_of_the_package_are_chosen_by_their_names(studio, monkeypatch):
    """Without a folder. They change no setting; the word is there to click on, and known. (The studio's model is a
    fake, so what fits it is said here.)"""
    monkeypatch.delenv("MLXDIFF_LORAS", raising=False)
    monkeypatch.setattr(adapters, "offered", lambda model: {n: families.ADAPTERS["sd1", n] for n in ("teal", "paper")})
    draw(studio)
    before = studio.request()
    studio.controls.loras_shown.value = True
    entries = {entry.description: entry for entry in looked(studio)._named.children[1:]}
    assert entries["teal"].tooltip == "learned word; built in; licence MIT."
    assert entries["paper"].tooltip == "style LoRA; built in; licence MIT."
    entries["teal"].click()
    entries["paper"].click()
    request = studio.request()
    assert (request.embeddings, request.loras) == (("teal",), ("paper:1",))
    for name in ("steps", "guidance", "sampler", "schedule"):
        assert getattr(request, name) == getattr(before, name)
    shown = looked(studio)
    assert shown.words[0].about.value == "A learned word. It counts where the prompt has it:"
    assert ">&lt;teal&gt;</button>" in shown.words[0].words.value
    studio.prompt = "a <teal> house"
    assert "does not know" not in studio.controls.why.value


def test_a_taught_word_is_chosen_from_the_folder(studio, folder):
    """A file of one table of 768 numbers a token is a word for CLIP-L; one of 1024 is not."""
    save_file({"<moss & co>": np.zeros((3, 768), np.float32)}, folder / "moss.safetensors")
    save_file({"clip_l": np.zeros((1, 1024), np.float32)}, folder / "wide.safetensors")
    studio.controls.loras_shown.value = True
    draw(studio)
    entries = looked(studio)._list.children
    (moss,) = [entry for entry in entries if getattr(entry, "description", "").startswith("moss")]
    assert moss.description == "moss · <moss & co>"
    (wide,) = [e for e in entries if not hasattr(e, "description") and e.children[0].description == "wide"]
    assert "rows of 768" in wide.children[1].value
    moss.click()
    file = str(folder / "moss.safetensors")
    assert studio.request().embeddings == (file,)
    (row,) = looked(studio).words
    assert row.about.value == "A word of 3 tokens. It counts where the prompt has it:"
    assert ">&lt;moss &amp; co&gt;</button>" in row.words.value
    assert studio.controls.loras_shown.description == "LoRA, words (1)"
    studio.controls.loras.word.value = "org/repo=<fern>"
    assert studio.request().embeddings == (file, "org/repo=<fern>")
    assert "&lt;fern&gt;" in looked(studio).words[1].words.value
    drawn = Request("a fox", embeddings=(file,), embedding_hashes=("0",), seed=1, width=64, height=64)
    studio.restore(drawn)
    assert (studio.embeddings, studio.request().embedding_hashes, studio.more) == ([file], (), {})
    looked(studio).words[0].remove.click()
    assert studio.request().embeddings is None


def test_another_model_begins_with_all_bits(studio):
    studio.options = {"bits": 4, "low_memory": True, "taesd": "auto"}
    studio.model = "sdxl"
    assert studio.options == {"taesd": "auto"}
    assert studio.controls.bits.value == ""
