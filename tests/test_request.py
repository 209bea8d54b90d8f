"""Request: defaults resolved once, every value checked at the border. Reference: the rules beside each field."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mlxdiff.errors import Error
from mlxdiff.families import Defaults
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
    with pytest.raises(Error, match="no image"):
        resolve(replayed)


BAD = [
    ({"prompt": 3}, "prompt"),
    ({"negative": b"x"}, "negative"),
    ({"seed": -1}, "seed -1"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed 1.5"),
    ({"steps": 0}, "steps 0"),
    ({"steps": -3}, "steps -3"),
    ({"steps": True}, "steps True"),
    ({"steps": 10**6}, "steps"),
    ({"guidance": math.nan}, "guidance nan"),
    ({"guidance": math.inf}, "guidance inf"),
    ({"guidance": -1.0}, "guidance"),
    ({"guidance": 10**400}, "guidance 1000"),
    ({"width": 0}, "width 0"),
    ({"width": 60}, "Use 56 or 64"),
    ({"height": -8}, "height -8"),
    ({"height": 10**6}, "height"),
    ({"count": 0}, "count 0"),
    ({"sampler": "eulr"}, "eulr"),
    ({"sampler": "eulr Karras"}, "'eulr Karras'"),
    ({"sampler": ""}, "sampler ''"),
    ({"sampler": " Karras"}, "sampler ' Karras'"),
    ({"sampler": 5}, "sampler 5"),
    ({"sampler": ["euler"]}, "sampler ['euler']"),
    ({"schedule": "karas"}, "karas"),
    ({"eta": 1.0}, "eta"),  # dpmpp_2m adds no noise
    ({"eta": math.nan, "sampler": "ddim"}, "eta nan"),
    ({"rescale": 1.5}, "rescale 1.5"),
    ({"interval": (0.9, 0.1)}, "interval"),
    ({"interval": (0.1,)}, "interval"),
    ({"clip_skip": 0}, "clip_skip 0"),
    ({"refine_at": 2.0}, "refine_at"),
    ({"noise": "cuda"}, "cuda"),
    ({"skip_interval": (0.5, 0.1)}, "ends before it begins"),
    ({"skip_scale": math.inf}, "skip_scale inf"),
    ({"skip_layers": 7}, "skip_layers 7"),
    ({"strength": 0.5}, "no image"),
    ({"strength": 1.5, "image": "a.png"}, "strength 1.5"),
    ({"strength": math.nan, "image": "a.png"}, "strength nan"),
]


@pytest.mark.parametrize(("values", "says"), BAD, ids=[f"{k}" for k, _ in BAD])
def test_a_bad_value_is_named(values, says):
    with pytest.raises(Error) as e:
        resolve(Request(**({"prompt": "x"} | values)))
    assert says in str(e.value)
    assert e.value.fix
