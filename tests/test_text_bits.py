"""How T5 and Qwen3 are stored: `text_bits`. Reference: the rule itself, for machines that are made up."""

import mlx.core as mx
import pytest

from mlxdiff import generate, recipe
from mlxdiff.advice import named
from mlxdiff.errors import Error
from mlxdiff.families import FAMILIES
from mlxdiff.memory import peaks
from mlxdiff.recipe import WHOLE, Recipe, component_bits

LARGE = {
    "sd3": ("text_encoder_3",),
    "flux": ("text_encoder_2",),
    "flux2": ("text_encoder",),
    "zimage": ("text_encoder",),
}


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(16)`: a GPU with 16 GB."""

    def with_memory(gigabytes: int) -> None:
        monkeypatch.setattr(recipe.mx, "default_device", lambda: mx.Device(mx.gpu))
        monkeypatch.setattr(recipe.mx, "device_info", lambda: {"memory_size": gigabytes * 2**30})

    return with_memory


def test_the_large_text_encoders_of_each_family():
    assert {name: recipe.large_text(family) for name, family in FAMILIES.items() if recipe.large_text(family)} == LARGE


@pytest.mark.parametrize(("gigabytes", "bits"), [(16, 8), (24, 8), (32, None), (64, None)])
def test_a_gpu_with_less_than_32_gb_reads_prompts_in_8_bits(gpu, gigabytes, bits):
    gpu(gigabytes)
    assert recipe.recipe().text_bits == bits
    assert recipe.recipe(family=FAMILIES["flux"]).text_bits == bits
    assert recipe.recipe(family=FAMILIES["sdxl"]).text_bits is None  # CLIP is small
    assert recipe.recipe(4).text_bits is None  # as all else
    assert recipe.recipe(4, text_bits=8).text_bits == 8
    assert recipe.recipe(text_bits=WHOLE).text_bits == WHOLE


def test_a_cpu_keeps_all_bits(monkeypatch):
    monkeypatch.setattr(recipe.mx, "default_device", lambda: mx.Device(mx.cpu))
    assert recipe.recipe().text_bits is None


def test_which_bits_a_component_has():
    flux = FAMILIES["flux"]

    def bits(how: Recipe) -> list:
        return [component_bits(flux, name, how) for name in ("transformer", "text_encoder", "text_encoder_2")]

    assert bits(Recipe("float16", None)) == [None, None, None]
    assert bits(Recipe("float16", None, 8)) == [None, None, 8]
    assert bits(Recipe("float16", 4)) == [4, 4, 4]
    assert bits(Recipe("float16", 4, 8)) == [4, 4, 8]
    assert bits(Recipe("float16", 4, WHOLE)) == [4, 4, None]
    assert [str(Recipe("float16", *of)) for of in ((None,), (None, 8), (4, WHOLE))] == [
        "float16",
        "float16-text8",
        "float16-4bit-text16",
    ]


def test_half_the_memory_to_read_a_prompt():
    """SD3 medium's peak is T5; 8 bits are a little more than half of 16, by their scales and what stays whole."""
    whole, eight = (peaks(named("sd3-medium", Recipe("bfloat16", None, bits)), gpu=True) for bits in (None, 8))
    assert 0.5 < eight.encode / whole.encode < 0.6
    assert eight[1:] == whole[1:]
    assert named("sd15", Recipe("float16", None, 8)).model.recipe == Recipe("float16", None)


def test_wrong_bits_are_refused(capsys):
    with pytest.raises(Error, match="cannot have `text_bits` 7"):
        recipe.recipe(text_bits=7)
    with pytest.raises(SystemExit):
        generate.main(["a fox", "--text-bits", "7"])
    assert "--text-bits" in capsys.readouterr().err


def test_the_command_leaves_the_dtype_to_the_model(monkeypatch):
    """A GPU that suits bfloat16 must not draw with a U-Net in it: the command passes on what was typed, no default."""
    asked = {}

    def load(model, **options):
        asked.update(options)
        raise Error("Nothing is drawn.", "")

    monkeypatch.setattr(generate, "load", load)
    generate.main(["a fox", "--model", "sdxl"])
    assert (asked["dtype"], asked["text_bits"]) == (None, None)
    generate.main(["a fox", "--model", "sdxl", "--dtype", "bfloat16", "--text-bits", "4"])
    assert (asked["dtype"], asked["text_bits"]) == ("bfloat16", 4)


def test_machines_that_share_a_run_store_weights_alike(gpu):
    """Whatever the memory of each: the first one's choice is sent in words that no machine takes for its default."""
    args = generate.parser().parse_args(["a fox", "--dtype", "float16"])
    gpu(64)
    how = generate._same_everywhere(args, "flux-dev")
    gpu(16)
    assert how == {"dtype": "float16", "text_bits": WHOLE}
    assert recipe.recipe(**how) == Recipe("float16", None, WHOLE)
    assert generate._same_everywhere(args, "flux-dev")["text_bits"] == 8
