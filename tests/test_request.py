"""Request: defaults resolved once, every value checked at the border. Reference: the rules beside each field."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mlxdiff.errors import Error
from mlxdiff.families import Defaults
from mlxdiff.guides import Guide, steps_on
from mlxdiff.request import Request

DEFAULTS = Defaults(size=512, steps=25, guidance=7.5, sampler=None, schedule=None)


def resolve(request: Request, defaults: Defaults = DEFAULTS) -> Request:
    return request.resolve(defaults, ("dpmpp_2m", "karras"), "leading", clip_skip=1, multiple=8)


def test_defaults_fill_what_is_open_and_only_that():
    full = resolve(Request("a house", guidance=0.0, seed=0, width=40))
    assert (full.guidance, full.seed, full.width) == (0.0, 0, 40)  # zero is a value
    assert (full.steps, full.height, full.sampler, full.schedule) == (25, 512, "dpmpp_2m", "karras")
    assert full.negative is None
    assert resolve(full) == full  # nothing left to resolve


def test_a_chosen_sampler_takes_the_checkpoints_spacing():
    assert resolve(Request("x", sampler="ddim")).schedule == "leading"
    assert resolve(Request("x", schedule="exponential")).sampler == "dpmpp_2m"
    turbo = replace(DEFAULTS, sampler="euler_ancestral", schedule="trailing")
    assert resolve(Request("x"), turbo).schedule == "trailing"


def test_a1111_names_are_understood():
    assert resolve(Request("x", sampler="Euler a")).sampler == "euler_ancestral"
    older = resolve(Request("x", sampler="DPM++ 2M Karras"))  # with the schedule behind the sampler
    assert (older.sampler, older.schedule) == ("dpmpp_2m", "karras")
    assert resolve(Request("x", sampler="DPM++ 2M Karras", schedule="beta")).schedule == "beta"


def test_a_fresh_seed_is_drawn_each_time():
    assert len({resolve(Request("x")).seed for _ in range(8)}) == 8  # 8 equal 32-bit draws: once in 1e60


def test_json_round_trip():
    request = resolve(Request("später 🏠", negative="", interval=(0.2, 0.9), skip_layers=(7, 8), image="a.png"))
    assert Request.from_json(request.to_json()) == request
    assert Request.from_json(replace(request, image=Path("a.png")).to_json()) == request
    with pytest.raises(Error, match="'future'"):
        Request.from_json('{"prompt": "x", "future": 1}')


@pytest.mark.parametrize(
    ("given", "image", "drawn"),
    [
        ({}, (256, 160), (256, 160)),
        ({}, (259, 165), (256, 168)),  # to the nearest multiple
        ({}, (4000, 1000), (1024, 256)),  # no more pixels than 512 x 512, the shape kept
        ({}, (3, 9000), (8, 9000)),
        ({"width": 128}, (4000, 1000), (128, 32)),
        ({"height": 1000}, (400, 100), (4000, 1000)),
        ({"width": 64, "height": 96}, (4000, 1000), (64, 96)),
    ],
)
def test_edges_for_an_image(given, image, drawn):
    request = Request("x", image="a.png", **given).sized(image, 512**2, 8)
    assert (request.width, request.height) == drawn
    assert request.sized(image, 512**2, 8) == request


def test_an_image_has_a_strength_and_a_strength_an_image():
    assert resolve(Request("x", image="a.png")).strength == 0.6
    assert resolve(Request("x")).strength is None
    shown = Image.new("RGB", (8, 8))
    replayed = Request.from_json(replace(resolve(Request("x", image=shown)), image_hash="1f").to_json())
    assert (replayed.image, replayed.image_hash) == (None, "1f")
    with pytest.raises(Error, match="need a start image"):
        resolve(replayed)


def test_several_images_have_one_spelling_for_each_number():
    shown = Image.new("RGB", (8, 8))
    assert Request("x", image=[]) == Request("x", image=()) == Request("x")
    assert Request("x", image=["a.png"], image_hash=["1f"]) == Request("x", image="a.png", image_hash="1f")
    two = Request("x", image=["a.png", Path("b.png")], image_hash=("1f", "2e"))
    assert two == Request("x", image=("a.png", Path("b.png")), image_hash=["1f", "2e"])
    assert (two.pictures, two.hashes) == (("a.png", Path("b.png")), ("1f", "2e"))
    assert Request("x", image=shown).pictures == (shown,)
    assert (Request("x").pictures, Request("x").hashes) == ((), ())
    again = Request.from_json(two.to_json())
    assert again == replace(two, image=("a.png", "b.png"))
    replayed = Request.from_json(replace(two, image=["a.png", shown]).to_json())  # no file holds the second
    assert (replayed.image, replayed.hashes) == (None, ("1f", "2e"))


def test_a_guide_may_be_written_as_its_words():
    shown = Image.new("RGB", (8, 8))
    written = [
        ("edges.png", Guide("edges.png")),
        (shown, Guide(shown)),
        (("edges.png", 0.5), Guide("edges.png", scale=0.5)),
        (("canny", "edges.png"), Guide("edges.png", "canny")),
        (["canny", "edges.png", "0.7"], Guide("edges.png", "canny", 0.7)),  # as on the command line
        (("edges.png", "0.7", "0", "0.5"), Guide("edges.png", scale=0.7, interval=(0, 0.5))),
        (("canny", shown, 1, 0.2, 1), Guide(shown, "canny", 1, (0.2, 1))),
        (("7", "8"), Guide("7", scale=8)),  # one word at least is no number
        (Guide("a", mode="tile"), Guide("a", mode="tile")),
        (("org/repo:canny", "edges.png"), Guide("edges.png", "org/repo", mode="canny")),
        (("C:\\net", "edges.png"), Guide("edges.png", "C:\\net")),
    ]
    given, wanted = zip(*written, strict=True)
    assert Request("x", controls=given).controls == wanted
    assert Request("x", references=[("style.png", 0.5)]).references == (Guide("style.png", scale=0.5),)
    assert Request("x", controls=[]) == Request("x")


def test_guides_keep_what_json_can_hold():
    shown = Image.new("RGB", (8, 8))
    request = Request("x", controls=[Guide(Path("a.png"), hash="1f"), Guide(shown, "canny", hash="2e")])
    again = Request.from_json(request.to_json())
    assert again.controls == (Guide("a.png", hash="1f"), Guide(None, "canny", hash="2e"))
    with pytest.raises(Error, match="need the picture of a control"):
        resolve(again)
    for text in (
        '[{"image": 5}]',
        '[{"scale": 1}]',
        '[{"image": "a", "x": 1}]',
        '["a"]',
        '[{"image": "a", "scale": "1"}]',
    ):
        with pytest.raises(ValueError, match="controls is"):
            Request.from_json(f'{{"prompt": "x", "controls": [{text}]}}')


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 1000])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.2, 0.8), (0.5, 1.0), (0.31, 0.32)])
def test_a_guide_is_on_in_the_steps_of_diffusers(steps, interval):
    """Reference: the condition of StableDiffusionControlNetPipeline, for each step."""
    keeps = [1.0 - float(i / steps < interval[0] or (i + 1) / steps > interval[1]) for i in range(steps)]
    assert [float(i in steps_on(interval, steps)) for i in range(steps)] == keeps


BAD = [
    ({"controls": "edges.png"}, "controls is str, not a list. Give a list"),
    ({"controls": ("canny", "edges.png")}, "is one control, not a list. Put brackets around it, as in `controls=[("),
    ({"references": ("ip-adapter", "a.png", 0.5)}, "references is one reference, not a list"),
    ({"controls": [("edges.png", "canny")]}, "The first word of a control names its network; it is edges.png. Give"),
    ({"controls": [("a", "b", "c")]}, "'a b c' is no control. Give [MODEL] IMAGE [SCALE [FROM TO]]"),
    ({"controls": [("a", 1, 0)]}, "'a 1.0 0.0' is no control"),
    ({"controls": [5]}, "'5' is no control"),
    ({"controls": [()]}, "'' is no control"),
    ({"controls": [("a", 11)]}, "Control scale must be a number from 0 to 10; 11.0 was given"),
    ({"controls": [("a", "nan")]}, "Control scale must be a number from 0 to 10; nan was given"),
    ({"controls": [("a", 1, 0.9, 0.1)]}, "control interval 0.9 to 0.1 ends before it begins"),
    ({"controls": [("a", 1, 0, 2)]}, "Control interval must be a number from 0 to 1; 2.0 was given"),
    ({"controls": [Guide("a", mode=3)]}, "The mode of a control is int, not text"),
    ({"controls": [Guide("a", model=3)]}, "The model of a control is int, not a name or a path"),
    ({"references": [("a", 1, 0)]}, "'a 1.0 0.0' is no reference. Give [MODEL] IMAGE [SCALE [FROM TO]]"),
    ({"guess": 1, "controls": ["a"]}, "guess 1 is neither true nor false"),
    ({"guess": True}, "guess is for controls, and there is none"),
    ({"prompt": 3}, "prompt"),
    ({"negative": b"x"}, "negative"),
    ({"seed": -1}, "Seed must be a whole number from 0 to 9223372036854775807; -1 was given"),
    ({"seed": 2**64}, "Seed must be a whole number from 0 to 9223372036854775807; 18446744073709551616 was given"),
    ({"seed": 1.5}, "Seed must be a whole number from 0 to 9223372036854775807; 1.5 was given"),
    ({"steps": 0}, "Steps must be a whole number from 1 to 1000; 0 was given"),
    ({"steps": -3}, "Steps must be a whole number from 1 to 1000; -3 was given"),
    ({"steps": True}, "Steps must be a whole number from 1 to 1000; True was given"),
    ({"steps": 10**6}, "Steps must be"),
    ({"guidance": math.nan}, "Guidance must be a number from 0 to 100; nan was given"),
    ({"guidance": math.inf}, "Guidance must be a number from 0 to 100; inf was given"),
    ({"guidance": -1.0}, "Guidance must be"),
    ({"guidance": 10**400}, "Guidance must be a number from 0 to 100; 1000"),
    ({"width": 0}, "Width must be a whole number from 8 to 16384; 0 was given"),
    ({"width": 60}, "Use 56 or 64"),
    ({"height": -8}, "Height must be a whole number from 8 to 16384; -8 was given"),
    ({"height": 10**6}, "Height must be"),
    ({"count": 0}, "Count must be a whole number from 1 to 1000; 0 was given"),
    ({"sampler": "eulr"}, "eulr"),
    ({"sampler": "eulr Karras"}, "'eulr Karras'"),
    ({"sampler": ""}, "sampler ''"),
    ({"sampler": " Karras"}, "sampler ' Karras'"),
    ({"sampler": 5}, "The sampler is int, not text"),
    ({"sampler": ["euler"]}, "The sampler is list, not text"),
    ({"schedule": "karas"}, "karas"),
    ({"eta": 1.0}, "eta"),  # dpmpp_2m adds no noise
    ({"eta": math.nan, "sampler": "ddim"}, "Eta must be a number from 0 to 10; nan was given"),
    ({"rescale": 1.5}, "Rescale must be a number from 0 to 1; 1.5 was given"),
    ({"interval": (0.9, 0.1)}, "interval"),
    ({"interval": (0.1,)}, "interval"),
    ({"clip_skip": 0}, "clip_skip must be a whole number from 1 to 12; 0 was given"),
    ({"refine_at": 2.0}, "refine_at"),
    ({"noise": "cuda"}, "cuda"),
    ({"noise": "torhc"}, "Did you mean torch?"),
    ({"true_cfg": 100.5}, "true_cfg must be a number from 0 to 100; 100.5 was given"),
    ({"loras": "style.safetensors"}, "is not a list"),
    ({"loras": ("style.safetensors:11",)}, "LoRA scale must be a number from -10 to 10; 11.0 was given"),
    ({"loras": (5,)}, "The LoRA is int, not text"),
    ({"skip_interval": (0.5, 0.1)}, "ends before it begins"),
    ({"skip_scale": math.inf}, "skip_scale must be a number from 0 to 100; inf was given"),
    ({"skip_layers": 7}, "skip_layers 7"),
    ({"strength": 0.5}, "needs a start image"),
    ({"strength": 1.5, "image": "a.png"}, "Strength must be a number from 0 to 1; 1.5 was given"),
    ({"strength": math.nan, "image": "a.png"}, "Strength must be a number from 0 to 1; nan was given"),
]


@pytest.mark.parametrize(("values", "says"), BAD, ids=[f"{k}" for k, _ in BAD])
def test_a_bad_value_is_named(values, says):
    with pytest.raises(Error) as e:
        resolve(Request(**({"prompt": "x"} | values)))
    assert says in str(e.value)
    assert e.value.fix or "must be" in e.value.problem  # a range that is told says what to do
