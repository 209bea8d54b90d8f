"""The word and the style in the package, which word.py and style.py of tests/recipes teach anew for each new built-in
model: nothing here depends on the weights. References: the header, the bare picture, diffusers with the same file."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mlxdiff import builtin, catalogue, generate
from mlxdiff.errors import Error
from mlxdiff.families import ADAPTERS, Word
from mlxdiff.store import adapters, hub

((TEAL, FILE),) = [(row, builtin.FOLDER.parent / row.file) for row in ADAPTERS.values() if isinstance(row, Word)]
PAPER = builtin.FOLDER.parent / ADAPTERS["sd1", "paper"].file
SMALL = {"seed": 1, "width": 128, "height": 128, "steps": 4, "guidance": 4.0, "sampler": "ddim"}
PROMPT = "a <teal> house in the snow at night"


def psnr(a, b) -> float:
    return -10 * np.log10(np.square(np.asarray(a, float) / 255 - np.asarray(b, float) / 255).mean())


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("listing", "download", "snapshots"):
        monkeypatch.setattr(hub, name, lambda *_: pytest.fail("asked the hub"))


def test_it_is_small_and_its_header_says_what_its_row_says(pipe):
    assert FILE.stat().st_size < 20_000
    assert adapters.look([FILE], pipe.description)[FILE].word == TEAL.word == "<teal>"
    text = FILE.read_bytes()[:4000]
    assert not any(place in text for place in (b"/home", b"/tmp", b"/work"))  # no place of the machine that made it


def test_the_style_is_small_and_names_no_place():
    assert PAPER.stat().st_size < 1_200_000
    with safe_open(PAPER, "np") as file:
        header = file.metadata()
    assert header["modelspec.title"] == "paper"
    assert not any(place in str(header) for place in ("/home", "/tmp", "/work", "mlxdiff"))


def test_the_style_is_a_lora_that_leaves_the_settings_as_they_are(pipe, tmp_path, capsys):
    """Known by its name, for storybook alone, and nothing is told of settings. Above 0 it is another picture."""
    bare, both = pipe.resolve("a house"), pipe.resolve("a house", loras=["paper"])
    assert both.loras == ("paper:1",)
    assert (both.steps, both.guidance, both.sampler) == (bare.steps, bare.guidance, bare.sampler)
    few = pipe.resolve("a house", loras=["paper", "quick"])
    assert (few.steps, few.guidance) == (4, 1.0)
    typed = ["a red house", "-W", "64", "-H", "64", "--steps", "1", "--dtype", "float32", "--offline"]
    assert generate.main([*typed, "--lora", "paper", "-o", str(tmp_path / "a.png")]) == 0
    assert "made for" not in capsys.readouterr().err
    assert generate.main([*typed, "-m", "sd15", "--lora", "paper", "-o", str(tmp_path / "b.png")]) != 0
    assert "made for storybook: it does not fit sd15" in capsys.readouterr().err
    assert catalogue.main(["storybook", "--adapters"]) == 0
    fast, told = capsys.readouterr().out.split("These LoRAs bring settings")[::-1]
    assert "paper" in told
    assert "paper" not in fast


def test_diffusers_draws_the_same_with_the_style(pipe):
    """In float32 from the same float16 file: above 40 dB. Without it, it is another picture."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    pytest.importorskip("peft")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(builtin.FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(PAPER.parent, weight_name=PAPER.name)
    g = torch.Generator().manual_seed(1)
    said = PROMPT.replace("<teal>", "red")
    want = theirs(said, 128, 128, 4, guidance_scale=4.0, generator=g, output_type="np").images[0] * 255
    assert psnr(pipe(said, loras=["paper"], **SMALL).image, want) > 40
    assert psnr(pipe(said, **SMALL).image, want) < 30


def test_diffusers_draws_the_same_with_it(pipe):
    """In float32 from the same file: above 40 dB. With the word it began as it is another picture."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(builtin.FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.load_textual_inversion(FILE.parent, weight_name=FILE.name)
    g = torch.Generator().manual_seed(1)
    want = theirs(PROMPT, 128, 128, 4, guidance_scale=4.0, generator=g, output_type="np").images[0] * 255
    assert psnr(pipe(PROMPT, embeddings=["teal"], **SMALL).image, want) > 40
    assert psnr(pipe(PROMPT.replace("<teal>", "blue"), **SMALL).image, want) < 30


def test_the_word_is_known_by_name_and_leaves_the_settings_as_they_are(pipe, tmp_path, capsys):
    bare, both = pipe.resolve("a house"), pipe.resolve("a <teal> house", embeddings=["teal"])
    assert both.embeddings == ("teal",)
    assert (both.steps, both.guidance, both.sampler) == (bare.steps, bare.guidance, bare.sampler)
    with pytest.raises(Error, match=r"There is no embedding 'tael'. Did you mean teal"):
        pipe.resolve("a house", embeddings=["tael"])
    typed = ["-W", "64", "-H", "64", "--steps", "1", "--dtype", "float32", "--offline", "--embedding", "teal"]
    assert generate.main(["a <teal> house", *typed, "-o", str(tmp_path / "a.png")]) == 0
    told = capsys.readouterr().err
    assert "<teal>: 1 token, for text_encoder\n" in told
    assert "does not know" not in told
    assert generate.main(["a house", "-m", "sd15", *typed, "-o", str(tmp_path / "b.png")]) != 0
    assert "made for storybook: it does not fit sd15" in capsys.readouterr().err


def test_the_command_lists_it_with_its_word(capsys):
    assert catalogue.main(["storybook", "--adapters"]) == 0
    assert f"{'teal':27} {'<teal>':20} --embedding teal\n" in capsys.readouterr().out


def test_a_lora_says_which_word_it_wants(pipe, tmp_path, capsys):
    """By its header, as trainers write it; a word that it knows is not told as unknown."""
    lora = tmp_path / "ink.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    full = load_file(builtin.FOLDER / "unet" / "diffusion_pytorch_model.safetensors")[
        "mid_block.attentions.0.proj_in.weight"
    ]
    up, down = np.full((full.shape[0], 1), 0.01, np.float32), np.ones((1, full.shape[1]), np.float32)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    save_file(tensors, lora, {"modelspec.trigger_phrase": "woodcut"})
    typed = ["-W", "64", "-H", "64", "--steps", "1", "--dtype", "float32", "--offline", "--lora", str(lora)]
    assert generate.main(["a red house", *typed, "-o", str(tmp_path / "a.png")]) == 0
    assert "ink was trained with the word woodcut: put it into the prompt.\n" in capsys.readouterr().err
    assert generate.main(["a red house, woodcut", *typed, "-o", str(tmp_path / "b.png")]) == 0
    told = capsys.readouterr().err
    assert "trained with" not in told
    assert "does not know" not in told
