"""Python as its users expect it: signatures, help, wrong arguments, results, warnings. On the built-in model.
References: Request's own fields and load's own parameters; Python's inspect, as IPython and help() use it."""

import inspect
import io
import re
import typing
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlxdiff
from mlxdiff import arguments, builtin, generate, images
from mlxdiff.errors import Error
from mlxdiff.request import SETTINGS, Request, Settings

QUICK = {"width": 64, "height": 64, "steps": 1}
CALLS = [mlxdiff.stream, mlxdiff.Pipeline.__call__, mlxdiff.Pipeline.stream, mlxdiff.Pipeline.resolve]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        return mlxdiff.load()


@pytest.fixture
def unwarned(monkeypatch):
    """As in a process that has warned of nothing yet."""
    monkeypatch.setattr(builtin, "_warned", set())


def meanings(doc: str) -> set[str]:
    """The names that a docstring says the meaning of: `steps: ...`, `width, height: ...`."""
    lines = re.findall(r"(?:^ *|\. )(\w+(?:, \w+)*): ", doc, re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


# --- signatures and help


def test_settings_are_requests_fields():
    request = typing.get_type_hints(Request)
    assert typing.get_type_hints(Settings) == {name: kind for name, kind in request.items() if name != "prompt"}
    assert {f.name for f in fields(Request)} == {"prompt", *SETTINGS}
    assert meanings(Request.__doc__) >= {"prompt", *SETTINGS}


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.__qualname__)
def test_every_setting_is_a_keyword_with_its_meaning(call):
    found = inspect.signature(call).parameters
    for f in fields(Request)[1:]:
        assert found[f.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert (found[f.name].default, found[f.name].annotation) == (f.default, f.type)
    assert meanings(call.__doc__) >= {*SETTINGS}


def test_load_lists_its_options():
    assert inspect.getfullargspec(mlxdiff.load).varkw == "unknown"
    own = tuple(inspect.signature(mlxdiff.load).parameters)
    assert own == (*arguments.OPTIONS, "unknown")
    assert meanings(mlxdiff.load.__doc__) >= {*arguments.OPTIONS}


@pytest.mark.parametrize("jedi", [False, True])
def test_ipython_completes_the_settings(pipe, jedi):
    completer = pytest.importorskip("IPython.core.completer")
    c = completer.IPCompleter(namespace={"pipe": pipe, "mlxdiff": mlxdiff}, use_jedi=jedi)
    for typed in ("pipe('x', st", "pipe.stream('x', st", "mlxdiff.stream('x', st"):
        with completer.provisionalcompleter():
            found = {m.text.rstrip("=") for m in c.completions(typed, len(typed))}
        assert {"steps", "strength"} <= found, typed


# --- wrong names

WRONG = [
    ({"num_inference_steps": 4}, "For num_inference_steps, use `steps`."),
    ({"generator": 1, "guidance_scale": 2}, "For generator, use `seed`. For guidance_scale, use `guidance`."),
    ({"negative_prompt": "", "num_images_per_prompt": 2}, "no setting negative_prompt or num_images_per_prompt."),
    ({"torch_dtype": "float16"}, "For torch_dtype, give `dtype` to mlxdiff.load."),
    ({"bits": 4}, "For bits, give `bits` to mlxdiff.load."),
    ({"output_type": "pil"}, "For output_type, leave it out"),
    ({"callback_on_step_end": print}, "pipe.stream"),
    ({"mask_image": None}, "For mask_image, use `mask`."),
    ({"controlnet_conditioning_scale": 0.5}, "write the number behind the picture of `controls`"),
    ({"Stpes": 4}, "For Stpes, use `steps`."),
    ({"STEPS": 4}, "For STEPS, use `steps`."),
    ({"colour": "red", "stpes": 4, "xyz": 1}, "no setting colour, stpes or xyz. For stpes, use `steps`. The names are"),
]


@pytest.mark.parametrize(("settings", "says"), WRONG, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_wrong_names_are_told_with_ours(pipe, settings, says):
    for call in (pipe, pipe.stream, pipe.resolve, mlxdiff.stream):
        with pytest.raises(Error) as e:
            call("x", **settings)
        assert says in str(e.value)
        assert e.value.fix


def test_wrong_names_come_before_the_model():
    with pytest.raises(Error, match="use `steps`"):
        mlxdiff.stream("x", "no-such-model", stpes=4)
    with pytest.raises(Error, match=r"Width must be .* 3 was given"):  # else this would ask the network for it
        mlxdiff.stream("x", "sdxl", width=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": 4}, "For quantize, use `bits`."),
        (
            {"torch_dtype": 1, "variant": "fp16"},
            "no option torch_dtype or variant. For torch_dtype, use `dtype`. For va",
        ),
        ({"use_safetensors": True}, "leave it out"),
        ({"cache_dir": "x"}, "MLXDIFF_CACHE"),
        ({"low_cpu_mem_usage": True}, "use `low_memory`"),
        ({"steps": 4}, "give `steps` to the call that draws"),
        ({"num_inference_steps": 4}, "give `steps` to the call that draws"),
        ({"prompt": "x"}, "give `prompt` to the call that draws"),
        ({"lowmemory": True}, "use `low_memory`"),
        ({"xyz": True}, "The names are model, bits"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_wrong_options_of_load(options, says):
    with pytest.raises(Error) as e:
        mlxdiff.load("no-such-model", **options)
    assert says in str(e.value)


def test_the_table_of_other_names_leads_to_ours():
    ours = {"prompt", *SETTINGS, *arguments.OPTIONS}
    assert set(arguments.THEIRS.values()) <= ours
    assert not ours & (arguments.THEIRS.keys() | arguments.NEITHER.keys())
    assert not arguments.THEIRS.keys() & arguments.NEITHER.keys()


# --- wrong types


@pytest.mark.parametrize(
    "options",
    [
        {"model": None},
        {"model": 3},
        {"bits": 4.0},
        {"bits": True},
        {"dtype": np.float16},
        {"refiner": 3},
        {"taesd": True},
        {"low_memory": 1},
        {"force": "yes"},
        {"offline": None},
        {"request": "a house"},
        {"tokenizer": 3},
        {"prediction": "x"},
        {"parts": "vae.safetensors"},
        {"parts": {"vae": 3}},
        {"progress": 3},
    ],
    ids=str,
)
def test_a_wrong_value_of_load_is_named(options):
    with pytest.raises(Error) as e:
        mlxdiff.load(**options)
    ((name, value),) = options.items()
    assert repr(value)[:60] in str(e.value) or (name, value) == ("parts", {"vae": 3})
    assert "was given" in e.value.problem or e.value.fix


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": "20"},
        {"width": 512.0},
        {"count": None},
        {"guidance": "7"},
        {"sampler": 3},
        {"schedule": ["karras"]},
        {"noise": {}},
        {"noise": None},
        {"interval": None},
        {"clip_skip": "2"},
        {"t5": None},
        {"shift": "3"},
        {"strength": "1"},
        {"image": 3},
        {"negative": 3},
    ],
    ids=str,
)
def test_a_wrong_value_of_a_setting_is_named(pipe, settings):
    with pytest.raises(Error) as e:
        pipe.resolve("x", **settings)
    assert next(iter(settings)) in str(e.value).lower()
    assert e.value.fix or "must be" in e.value.problem  # which says what to give
    with pytest.raises(Error, match="prompt is list"):
        pipe(["a house", "a boat"])


# --- results


def test_a_result_saves_its_pictures_with_their_settings(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = pipe("a red house", seed=5, **QUICK), pipe("a red house", seed=5, count=2, **QUICK)
    assert one.save() == [Path("a-red-house-5.png")]
    assert one.save() == [Path("a-red-house-5-1.png")]  # never overwrites
    assert one.save("house.jpg") == [Path("house.jpg")]
    assert two.save("new/") == [Path("new/a-red-house-5.png"), Path("new/a-red-house-6.png")]
    second = two.save(tmp_path / "house.png")[1]
    assert second == tmp_path / "house-6.png"
    request, model = images.read_settings(second)
    assert (request.seed, request.count, request.prompt, model) == (6, 1, "a red house", "storybook")
    assert Image.open(second).info["mlxdiff-recipe"] == str(pipe.description.recipe) == two.recipe
    assert np.array_equal(np.asarray(Image.open(second)), np.asarray(two.images[1]))
    with pytest.raises(Error, match=r"house\.gif"):
        one.save("house.gif")


def test_a_result_shows_its_pictures_and_has_a_short_repr(pipe):
    one, two = pipe("a red house", seed=5, **QUICK), pipe("a red house " * 9, seed=5, count=3, **QUICK)
    assert Image.open(io.BytesIO(one._repr_png_())).size == (64, 64)
    assert Image.open(io.BytesIO(two._repr_png_())).size == (128, 128)
    assert re.fullmatch(r"<Result: 1 of 'a red house' by storybook, seed 5, [\d.]+ s>", repr(one))
    assert len(repr(two)) < 110
    assert "seeds 5 to 7" in repr(two)


def test_an_empty_prompt_is_drawn_by_every_front(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    want = np.asarray(pipe("", seed=5, **QUICK).image)
    typed = ["-s", "5", "--steps", "1", "-W", "64", "-H", "64"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    for i, prompt in enumerate(([""], ["-p", ""], ["-"])):
        assert generate.main([*prompt, *typed, "-o", f"{i}.png"]) == 0
        assert np.array_equal(np.asarray(Image.open(f"{i}.png")), want)
    full = pipe("a red house", seed=5, **QUICK).save("house.png")
    assert generate.main(["", "--from-image", str(*full), "-o", "again.png"]) == 0
    assert images.read_settings(Path("again.png"))[0].prompt == ""


# --- words that the built-in model does not know


def test_unknown_words_are_told_once(pipe, unwarned, recwarn):
    warnings.simplefilter("always")  # Python's own filter would hide a second one of the same line
    for prompt in ("a red hause by the zzz", "a red hause by the zzz", "a red house", "zzz"):
        pipe(prompt, **QUICK)
    list(pipe.stream("qqq", **QUICK))
    texts = [str(w.message) for w in recwarn]
    assert [text.partition(".")[0] for text in texts] == [
        "storybook does not know: hause (house?), zzz",
        "storybook does not know: zzz",
        "storybook does not know: qqq",
    ]
    assert all(w.category is UserWarning and w.filename == __file__ for w in recwarn)
    list(pipe.run(pipe.resolve("vvv", **QUICK)))  # which the command line and the studio call
    assert len(recwarn) == 3


def test_what_is_taught_and_other_machines_warn_of_no_words(pipe, unwarned, recwarn, monkeypatch):
    net = {"unet": pipe.networks.get("unet")}
    pipe.hold(net)
    pipe("zzz", **QUICK)
    pipe.release(net)
    with monkeypatch.context() as patch:
        patch.setenv("MLX_RANK", "1")
        pipe("zzz", **QUICK)
    assert not recwarn
    pipe("zzz", **QUICK)
    assert len(recwarn) == 1


def test_the_command_line_tells_unknown_words_itself(unwarned, tmp_path, recwarn, capsys):
    typed = ["--steps", "1", "-W", "64", "-H", "64", "-o", str(tmp_path / "a.png")]
    assert generate.main(["a red hause", *typed]) == 0
    assert capsys.readouterr().err.count("does not know: hause (house?).") == 1
    assert not [w for w in recwarn if "hause" in str(w.message)]


def test_a_picture_much_smaller_than_those_of_its_training_is_told(tmp_path, capsys):
    typed = ["a red house", "--steps", "1", "-o", str(tmp_path / "a.png"), "-W", "64", "-H"]
    assert generate.main([*typed, "64"]) == 0
    assert capsys.readouterr().err.count("at 64 x 64 it draws less well.") == 1
    assert builtin.size_notice("storybook", 240, 272, 256) == builtin.size_notice("sd15", 64, 64, 512) == ""


def test_short_words_are_near_nothing():
    assert builtin.notice("storybook-flow", "a gren house") == "storybook-flow does not know: gren (green?)."
    assert builtin.notice("sd15", "a gren house") == ""
    assert builtin.notice("storybook", "the red house and a tre") == "storybook does not know: and, tre."
    assert builtin.notice("storybook", "a teal house", ["<teal>"]) == "storybook does not know: teal (<teal>?)."
    assert builtin.notice("storybook", "a <teal> house", ["<teal>"]) == ""
