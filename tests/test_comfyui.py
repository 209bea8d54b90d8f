"""ComfyUI's graphs. References: graphs in the form that its "Save (API format)" writes and its pictures carry."""

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from mlxdiff import comfyui, images
from mlxdiff.errors import Error

from .test_metadata import exif


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def graph(**changed) -> dict:
    """The graph that ComfyUI opens with, with a LoRA in it."""
    sampler = {"seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "euler_ancestral", "scheduler": "normal"}
    sampler |= {"denoise": 1, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    held = {
        "3": node("KSampler", **sampler),
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text="a glass bottle", clip=["10", 1]),
        "7": node("CLIPTextEncode", text="watermark", clip=["10", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
        "10": node("LoraLoader", lora_name="style.safetensors", strength_model=0.8, model=["4", 0], clip=["4", 1]),
    }
    return held | changed


def read(held: dict) -> tuple[dict, str | None]:
    settings, model = comfyui.parse(json.dumps(held))
    return {name: value for name, value in settings.items() if value is not None}, model


PLAIN = {
    "prompt": "a glass bottle",
    "negative": "watermark",
    "seed": 156680208700286,
    "steps": 20,
    "guidance": 8,
    "width": 512,
    "height": 768,
    "noise": "torch",
    "schedule": "linspace",
    "sampler": "euler_ancestral",
    "loras": ("style.safetensors:0.8",),
}


def test_the_graph_that_comfyui_opens_with():
    assert read(graph()) == (PLAIN, "v1-5.safetensors")


def test_values_that_come_over_links():
    """The seed, the prompt and the steps from nodes of their own; the text behind a node for a ControlNet."""
    held = graph()
    held["3"]["inputs"] |= {"seed": ["20", 0], "steps": ["21", 0], "positive": ["22", 0], "negative": ["22", 1]}
    held |= {"20": node("Seed", seed=5), "21": node("PrimitiveInt", value=9), "23": node("String", string="a fox")}
    held["6"]["inputs"]["text"] = ["23", 0]
    held["22"] = node("ControlNetApplyAdvanced", strength=1.0, positive=["6", 0], negative=["7", 0], image=["30", 0])
    wanted = PLAIN | {"seed": 5, "steps": 9, "prompt": "a fox"}
    assert read(held) == (wanted, "v1-5.safetensors")


def test_of_two_passes_the_first_is_read():
    held = graph()
    second = held["3"]["inputs"] | {"seed": 1, "steps": 14, "denoise": 0.5, "latent_image": ["11", 0]}
    held["11"] = node("LatentUpscale", samples=["3", 0], upscale_method="nearest-exact")
    for both in ({"2": node("KSampler", **second)} | held, held | {"99": node("KSampler", **second)}):
        assert read(both) == (PLAIN, "v1-5.safetensors")  # wherever it stands


def test_flux():
    """Guidance is an input of the text, and the negative side counts for nothing."""
    held = graph()
    held["3"]["inputs"] |= {"cfg": 1.0, "positive": ["12", 0], "negative": ["13", 0], "model": ["14", 0]}
    held |= {"12": node("FluxGuidance", guidance=3.5, conditioning=["6", 0])}
    held |= {"13": node("ConditioningZeroOut", conditioning=["6", 0]), "14": node("UNETLoader", unet_name="flux.gguf")}
    found, model = read(held)
    assert (found["guidance"], found["prompt"], "negative" in found, model) == (
        3.5,
        "a glass bottle",
        False,
        "flux.gguf",
    )


def test_flux_with_a_node_for_each_setting():
    """The graph of ComfyUI's example for FLUX.1 dev."""
    held = {
        "6": node("CLIPTextEncode", text="a cute anime girl", clip=["11", 0]),
        "11": node("DualCLIPLoader", clip_name1="t5xxl.safetensors", clip_name2="clip_l.safetensors", type="flux"),
        "12": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "13": node(
            "SamplerCustomAdvanced",
            noise=["25", 0],
            guider=["22", 0],
            sampler=["16", 0],
            sigmas=["17", 0],
            latent_image=["27", 0],
        ),
        "16": node("KSamplerSelect", sampler_name="euler"),
        "17": node("BasicScheduler", scheduler="simple", steps=20, denoise=1, model=["30", 0]),
        "22": node("BasicGuider", model=["30", 0], conditioning=["26", 0]),
        "25": node("RandomNoise", noise_seed=219670278747233),
        "26": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        "27": node("EmptySD3LatentImage", width=1024, height=768, batch_size=1),
        "30": node("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=64, height=64, model=["12", 0]),
    }
    wanted = {"prompt": "a cute anime girl", "seed": 219670278747233, "steps": 20, "guidance": 3.5, "noise": "torch"}
    wanted |= {"width": 1024, "height": 768, "sampler": "euler", "schedule": "simple"}
    assert read(held) == (wanted, "flux1-dev.safetensors")


def test_a_picture_of_comfyui_is_read_from_every_format(tmp_path):
    text, image = json.dumps(graph()), Image.new("RGB", (8, 8))
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", text)
    info.add_text("workflow", "{}")
    image.save(tmp_path / "a.png", pnginfo=info)
    image.save(tmp_path / "a.webp", exif=exif(model=f"prompt:{text}", make="workflow:{}"))
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif(description=f"Prompt: {text}"))
    for ending in ("png", "webp", "jpg"):
        request, model = images.read_settings(tmp_path / f"a.{ending}")
        assert (request.prompt, request.seed, model) == ("a glass bottle", 156680208700286, "v1-5.safetensors")


CIRCLE = graph() | {"6": node("CLIPTextEncode", text=["6", 0], clip=["5", 0]), "5": node("A", samples=["5", 0])}
WIDE = graph() | {str(i): node("A", **{str(k): [str(100 + k), 0] for k in range(100)}) for i in range(100, 200)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting"),
        ("[" * 200_000, "nested too deeply"),
        ("5", "no graph of ComfyUI"),
        ('{"3": 5}', "no graph of ComfyUI"),
        ("{}", "has no sampler"),
        ('{"3": {"class_type": "KSampler", "inputs": ["positive"]}}', "has no sampler"),
        ('{"3": {"class_type": "KSampler", "inputs": {"seed": 1}}}', "has no sampler"),
        ('{"3": {"inputs": {"latent_image": 1}}}', "has no sampler"),
    ],
    ids=lambda v: v[:30],
)
def test_what_is_no_graph_is_one_line(tmp_path, text, says):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", text)
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(Error, match=f"damaged settings: .*{says}") as e:
        images.read_settings(tmp_path / "a.png")
    assert len(str(e.value).splitlines()) == 1


def test_wrong_values_are_left_out_and_circles_end():
    broken = {"guider": ["7", 0], "latent_image": 5, "noise": [[], {}], "sigmas": None, "sampler": ["1"]}
    assert read({"1": {"inputs": broken}}) == ({"prompt": "", "noise": "torch"}, None)
    found, _ = read(CIRCLE)
    assert (found["prompt"], "width" in found) == ("", False)
    held = graph()
    held["3"]["inputs"] |= {"seed": 1.5, "steps": True, "cfg": "8", "sampler_name": ["3", 0], "scheduler": {"a": []}}
    held["10"]["inputs"]["strength_model"] = 10**400
    held["5"]["inputs"] |= {"width": "512", "height": [["5"], 0]}
    found, _ = read(held)
    assert not found.keys() & {"seed", "steps", "guidance", "sampler", "schedule", "loras", "width", "height"}
    WIDE["6"]["inputs"]["text"] = ["100", 0]
    assert read(WIDE)[0]["prompt"] == ""  # 10,000 links, each followed once


def test_the_work_grows_as_the_graph_does(monkeypatch):
    """Many samplers that all begin with the end of one long chain: each link is followed a few times in all."""

    def links(n: int) -> int:
        followed = []
        linked = comfyui._linked
        monkeypatch.setattr(comfyui, "_linked", lambda *args: followed.append(1) or linked(*args))
        chain = {str(i): node("Any", x=[str(i + 1), 0]) for i in range(n)}
        samplers = {f"s{i}": node("KSampler", positive=0, latent_image=["0", 0]) for i in range(n)}
        comfyui.parse(json.dumps(chain | samplers))
        monkeypatch.undo()
        return len(followed)

    assert links(400) < 2.1 * links(200)


def test_a_file_of_comfyui_replays_or_says_why(tmp_path: Path, capsys):
    """Its model is not here, so the default draws; its LoRA is not here either, which is said before the work."""
    from mlxdiff.generate import main as generate

    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(graph()))
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert generate(["--from-image", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 1
    assert "style.safetensors" in capsys.readouterr().err
