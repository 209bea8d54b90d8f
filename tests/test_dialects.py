"""Foreign names and A1111's text. References: A1111's published text format, and the classes of diffusers."""

import time
from dataclasses import replace

import diffusers
import pytest

from mlxdiff import dialects, samplers, schedules
from mlxdiff.convert import scheduler
from mlxdiff.dialects import parameters, parse_parameters
from mlxdiff.errors import Error
from mlxdiff.request import Request

from .test_images import FULL
from .test_imports import imports, modules

# Every name that was ever understood: once here, it must stay.
NAMES = {
    "euler": ("Euler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler_ancestral": ("Euler a", "EulerAncestralDiscreteScheduler"),
    "heun": ("Heun", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "dpmpp_2m": ("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE",),
    "dpmpp_sde": ("DPM++ SDE", "DPMSolverSDEScheduler"),
    "unipc": ("UniPC", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"),
    "pndm": ("PLMS", "PNDMScheduler"),
    "ddim": ("DDIM", "DDIMScheduler"),
    "ddpm": ("DDPM", "DDPMScheduler"),
    "lcm": ("LCM", "LCMScheduler"),
}
SCHEDULES = {
    "leading": "Leading",
    "trailing": "Trailing",
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "beta": "Beta",
    "simple": "Simple",
    "lcm": "LCM",
}


def test_every_sampler_and_schedule_has_a_name():
    assert list(dialects.SAMPLERS) == list(samplers.SAMPLERS)
    assert dialects.SCHEDULES == SCHEDULES
    assert dialects.SCHEDULES.keys() == schedules.SPACINGS.keys()


@pytest.mark.parametrize("ours", NAMES)
def test_every_name_is_understood_in_any_case(ours):
    for name in (ours, *NAMES[ours]):
        for typed in (name, name.lower(), name.upper()):
            assert dialects.sampler(typed) == (ours, None)
            for schedule, theirs in SCHEDULES.items():
                assert dialects.sampler(f"{typed} {theirs}") == (ours, schedule)
                assert dialects.sampler(f"{typed} {theirs.lower()}") == (ours, schedule)


@pytest.mark.parametrize(
    "name", ["lms", "", "Karras", " Karras", "DPM++ 2M Karras Karras", "Euler  Karras", 5, None, []]
)
def test_a_name_nobody_uses_is_one_error(name):
    with pytest.raises(Error, match=r"There is no sampler .*euler.*lcm"):
        dialects.sampler(name)
    with pytest.raises(Error) as e:
        dialects.sampler("x" * 10_000)
    assert len(str(e.value)) < 300


def test_diffusers_has_the_classes_and_convert_reads_them():
    assert {c: ours for ours, names in NAMES.items() for c in names if c.endswith("Scheduler")} == dialects.DIFFUSERS
    for cls in dialects.DIFFUSERS:
        assert hasattr(diffusers, cls)
        assert cls in scheduler._CLASSES | scheduler._FLOW_CLASSES


def test_names_need_no_pictures():
    """`samplers`, `dialects` and what they import do without PIL; `mlxdiff` itself, a table of contents, need not."""
    found, seen = ["mlxdiff.samplers", "mlxdiff.dialects"], set()
    while found:
        name = found.pop()
        seen.add(name)
        if name in modules() and name != "mlxdiff":
            found += imports(name, modules()[name]) - seen
    assert "mlxdiff.schedules" in seen  # the search goes on from what it finds
    assert not any(name.split(".")[0] == "PIL" or name in ("mlxdiff.request", "mlxdiff.images") for name in seen)


# ---- A1111's text


def read(text: str) -> tuple[Request, str | None]:
    settings, model = parse_parameters(text)
    return Request(**settings), model


def test_text_as_a1111_writes_it():
    text = """a lighthouse, (stormy:1.2)
Negative prompt: people
Steps: 30, Sampler: DPM++ 2M SDE Karras, CFG scale: 7, Seed: 123, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, \
Denoising strength: 0.7, Clip skip: 2, TI hashes: "a: 1, b: 2", Version: v1.9.3"""
    request, model = read(text)
    assert (request.prompt, request.negative) == ("a lighthouse, (stormy:1.2)", "people")
    assert (request.steps, request.guidance, request.seed) == (30, 7.0, 123)
    assert (request.width, request.height, request.clip_skip) == (512, 768, 2)
    assert (request.sampler, request.schedule, model) == ("dpmpp_2m_sde", "karras", "v1-5")
    assert request.noise == "nv"  # A1111 draws on the GPU unless it says RNG: CPU


def test_our_text_reads_back():
    request, model = read(parameters(vars(FULL), "m", "float32"))
    for name in ("prompt", "negative", "seed", "steps", "guidance", "width", "height", "sampler", "schedule", "noise"):
        assert getattr(request, name) == getattr(FULL, name), name
    assert (request.clip_skip, model) == (2, "m")


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("schedule", schedules.SPACINGS)
def test_every_sampler_and_schedule_reads_back(sampler, schedule):
    text = parameters(vars(replace(FULL, sampler=sampler, schedule=schedule)), "m", "float32")
    theirs = next((n for n in NAMES[sampler] if not n.endswith("Scheduler")), sampler.upper())
    assert f"\nSteps: 20, Sampler: {theirs}, Schedule type: {SCHEDULES[schedule]}, CFG scale: 5.5, " in text
    assert (read(text)[0].sampler, read(text)[0].schedule) == (sampler, schedule)
    older = text.replace(f"{theirs}, Schedule type: ", f"{theirs} ")
    assert (read(older)[0].sampler, read(older)[0].schedule) == (sampler, schedule)


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("Sampler: DPM++ 2M SDE Heun, Schedule type: Karras", (None, "karras")),  # the sampler is none of ours
        ("Sampler: DPM++ 2M SDE Heun Karras", (None, "karras")),
        ("Sampler: Euler a, Schedule type: Automatic", ("euler_ancestral", None)),
        ("Sampler: Euler Karras, Schedule type: Beta", ("euler", "beta")),
        ("Sampler: uni_pc, Schedule type: sgm uniform", ("unipc", "sgm_uniform")),
        ("Schedule type: Karras", (None, "karras")),
        ("Sampler: , Schedule type: ", (None, None)),
    ],
)
def test_which_sampler_and_schedule_a_text_means(line, ours):
    request, _ = read(f"a house\nSteps: 3, {line}")
    assert (request.sampler, request.schedule) == ours


def test_a_prompt_alone_is_settings_too():
    assert read("just a prompt") == (Request("just a prompt", noise="nv"), None)


@pytest.mark.parametrize(
    ("line", "pairs"),
    [
        ("a: 1, b c: 2", {"a": "1", "b c": "2"}),
        ("a:1,b:2,", {"a": "1", "b": "2"}),
        ('a: "1, b: 2", c: 3', {"a": "1, b: 2", "c": "3"}),
        (r'a: "1\", b: 2", c: 3', {"a": r"1\", b: 2", "c": "3"}),  # a quote inside, as A1111 writes it
        (r'a: "1, \", c: 3', {"a": "1, \\", "c": "3"}),  # a name that ends in a backslash, as we write it
        ('a: "1" 2, b: 3', {"a": '1" 2', "b": "3"}),
        ('a: "1, b: 2', {"a": "1", "b": "2"}),
        ("a: 1: 2, b/c: 3", {"a": "1: 2", "c": "3"}),
        (":: a: 1", {"a": "1"}),
        ("a: , b:", {"a": "", "b": ""}),
        ("no pairs", {}),
    ],
)
def test_pairs(line, pairs):
    assert dialects._pairs(line) == pairs


@pytest.mark.parametrize("start", ["", 'b: "'])
@pytest.mark.parametrize("unit", ["a", "a:", 'a: "b,', 'a: "\\",', '"\\', "\\", " ", ":"])
def test_time_grows_with_the_length_alone(start, unit):
    """Four times the text takes about four times as long, not sixteen times, and a megabyte takes seconds."""

    def seconds(size: int) -> float:
        text = f"a house\nSteps: 3, {start}" + unit * (size // len(unit))
        best = float("inf")
        for _ in range(2):
            begin = time.process_time()
            read(text)
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(2**13) < 0.5  # ends the test here if time grows as the square: 32 s were seen at 40 KB
    small, large = seconds(2**18), seconds(2**20)
    assert large < 20
    assert large < 9 * max(small, 0.1)  # what takes less is not measured well


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("a:0.8", "a:0.8"), ("a", "a"), ("a:", "a"), ("a:1e-1", "a:1e-1"), ("a:0.5:lbw=X", "a:0.5"), ("a:te=1:2", "a"),
        ("a:0,5", "a:0,5"), ("a:nan", "a:nan"), ("a:0.5x", "a:0.5x"),  # refused later, not read as 0, 1 and 0.5
    ],
)  # fmt: skip
def test_a_lora_in_a_prompt_keeps_its_whole_scale(said, meant):
    assert dialects.loras(f"a house <lora:{said}>") == ("a house", [meant])
