"""The adapters in the package, which tests/recipes/style.py trains anew with each new built-in model: nothing here
depends on the weights. References: the headers, the bare picture, and diffusers with the same files."""

import numpy as np
import pytest

from mlxdiff import builtin, catalogue, generate
from mlxdiff.convert import lora_header
from mlxdiff.errors import Error
from mlxdiff.families import ADAPTERS, Lora, Word
from mlxdiff.store import adapters, hub

OURS = {n: r for (_, n), r in ADAPTERS.items() if r.repo is None and n in ("woodcut", "teal")}
SMALL = {"seed": 1, "width": 128, "height": 128, "steps": 4, "guidance": 4.0, "sampler": "ddim"}
PROMPT = "a <teal> house in the snow at night, woodcut"


def psnr(a, b) -> float:
    return -10 * np.log10(np.square(np.asarray(a, float) / 255 - np.asarray(b, float) / 255).mean())


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("listing", "download", "snapshots"):
        monkeypatch.setattr(hub, name, lambda *_: pytest.fail("asked the hub"))


def test_they_are_small_and_whole_and_their_headers_say_what_the_rows_say(pipe):
    place = builtin.FOLDER.parent
    assert {name: type(row) for name, row in OURS.items()} == {"woodcut": Lora, "teal": Word}
    assert all((place / row.file).stat().st_size < 2_000_000 for row in OURS.values())
    assert (place / OURS["teal"].file).stat().st_size < 20_000
    looks = adapters.look([place / row.file for row in OURS.values()], pipe.description)
    style, word = (looks[place / OURS[name].file] for name in ("woodcut", "teal"))
    assert isinstance(style, lora_header.Look)
    n = sum(style.layers.values())
    assert str(style).startswith(f"{n} of {n} layers (unet {n})")
    assert style.words == OURS["woodcut"].words == ("woodcut",)
    assert word.word == OURS["teal"].word == "<teal>"
    text = b"".join((place / row.file).read_bytes()[:4000] for row in OURS.values())
    assert b"woodcut/pictures" in text  # the trainer notes its settings, and no place of the machine that made it
    assert b"/home" not in text
    assert b"/tmp" not in text
    assert b"/work" not in text


def test_diffusers_draws_the_same_with_both(pipe):
    """In float32 from the same files: above 40 dB. With either of them left out it is another picture."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    pytest.importorskip("peft")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(builtin.FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(builtin.FOLDER.parent, weight_name=OURS["woodcut"].file)
    theirs.load_textual_inversion(builtin.FOLDER.parent, weight_name=OURS["teal"].file)
    g = torch.Generator().manual_seed(1)
    want = theirs(PROMPT, 128, 128, 4, guidance_scale=4.0, generator=g, output_type="np").images[0] * 255
    assert psnr(pipe(PROMPT, loras=["woodcut"], embeddings=["teal"], **SMALL).image, want) > 40
    assert psnr(pipe(PROMPT, embeddings=["teal"], **SMALL).image, want) < 30
    red = pipe(PROMPT.replace("<teal>", "red"), loras=["woodcut"], **SMALL).image
    assert psnr(red, want) < 30


def test_a_lora_says_which_word_it_wants(pipe, tmp_path, capsys):
    """By its header, so also a file of one's own; a word that it knows is not told as unknown."""
    typed = ["-W", "64", "-H", "64", "--steps", "1", "--dtype", "float32", "--offline"]
    for k, name in enumerate(("woodcut", str(builtin.FOLDER.parent / "woodcut.safetensors"))):
        assert generate.main(["a red house", *typed, "--lora", name, "-o", str(tmp_path / f"a{k}.png")]) == 0
        assert "woodcut was trained with the word woodcut: put it into the prompt.\n" in capsys.readouterr().err
        both = ["a <teal> house, woodcut", *typed, "--lora", name, "--embedding", "teal"]
        assert generate.main([*both, "-o", str(tmp_path / f"b{k}.png")]) == 0
        told = capsys.readouterr().err
        assert "trained with" not in told
        assert "does not know" not in told
        assert "<teal>: 1 token, for text_encoder\n" in told


def test_they_leave_the_settings_as_they_are(pipe):
    bare = pipe.resolve("a house")
    both = pipe.resolve("a <teal> house <lora:woodcut:0.5>", embeddings=["teal"])
    assert (both.loras, both.embeddings) == (("woodcut:0.5",), ("teal",))
    assert (both.steps, both.guidance, both.sampler) == (bare.steps, bare.guidance, bare.sampler)
    with pytest.raises(Error, match=r"There is no embedding 'tael'. Did you mean teal"):
        pipe.resolve("a house", embeddings=["tael"])
    with pytest.raises(Error, match=r"woodcut is a LoRA \(style LoRA\), not an embedding. Give it as `loras="):
        pipe.resolve("a house", embeddings=["woodcut"])


def test_the_command_lists_them_with_their_words(capsys):
    assert catalogue.main(["storybook", "--adapters"]) == 0
    told = capsys.readouterr().out
    assert "count where the prompt has their word" in told
    for name, word, flag in (("woodcut", "woodcut", "--lora"), ("teal", "<teal>", "--embedding")):
        assert f"{name:27} {word:20} {flag} {name}\n" in told
