"""FLUX's control LoRAs against diffusers: with one, FLUX.1 dev reads a control picture (pictures: 40 dB as for whole
pipelines). The file has the names, the biases and the norms of those that Black Forest Labs published."""

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline
from safetensors.torch import save_file

import mlxdiff
from mlxdiff import Request, convert
from mlxdiff.errors import Error
from mlxdiff.store import hub

from . import bfl, tiny
from .test_controlnet import picture
from .test_lora import low_rank, spellings_of_flux
from .test_pipelines import DB, PROMPT, SEED, SIZE, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")


def control_lora(transformer) -> dict[str, torch.Tensor]:
    """A change of every layer, with a bias, and other norms; in diffusers' names."""
    g, state = torch.Generator().manual_seed(5), low_rank(transformer, "transformer.", 1)
    inputs = "transformer.x_embedder.lora_A.weight"
    state[inputs] = torch.randn(4, 128, generator=g) * state[inputs].std()
    for name in [name for name in state if name.endswith("lora_B.weight")]:
        state[name.replace("weight", "bias")] = 0.1 * torch.randn(state[name].shape[0], generator=g)
    norms = {name: w for name, w in transformer.state_dict().items() if ".norm_" in name and w.ndim == 1}
    norms = {name: w for name, w in norms.items() if "linear" not in name}
    return state | {f"transformer.{n}": 0.5 + torch.rand(w.shape, generator=g) for n, w in norms.items()}


def as_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In the original names."""
    pairs = {n: w for n, w in state.items() if n.endswith(("lora_A.weight", "lora_B.weight"))}
    rest = {n.removeprefix("transformer.").replace(".lora_B.", "."): w for n, w in state.items() if n not in pairs}
    named = bfl.from_diffusers(rest)
    named = {n.replace(".bias", ".lora_B.bias"): w for n, w in named.items()}
    return spellings_of_flux(pairs)["BFL"] | named


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple:
    """(diffusers pipeline with the LoRA, our pipeline, the LoRA's file)"""
    root = tmp_path_factory.mktemp("control-lora")
    theirs = tiny.flux(root / "words")
    theirs.vae.encoder.conv_out.weight.data.mul_(8)
    theirs.save_pretrained(root / "model")
    state = control_lora(theirs.transformer)
    published = as_published(state)
    assert any(name.endswith("query_norm.scale") for name in published)
    assert published["img_in.lora_A.weight"].shape == (4, 128)
    save_file({n: w.contiguous() for n, w in published.items()}, root / "depth-lora.safetensors")
    parts = {n: p for n, p in theirs.components.items() if n not in ("image_encoder", "feature_extractor")}
    pipe = FluxControlPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(state, adapter_name="depth")
    return pipe, mlxdiff.load(root / "model", dtype="float32"), root / "depth-lora.safetensors"


def drawn(pipe, *loras: str, **settings) -> np.ndarray:
    return np.asarray(pipe(PROMPT, seed=SEED, loras=loras, **({"steps": 2, "guidance": 10.0} | SIZE | settings)).image)


def test_a_control_lora_draws_as_in_diffusers(model):
    theirs, ours, file = model

    def want(scale: float, shown: int) -> np.ndarray:
        theirs.set_adapters(["depth"], [scale])
        return oracle(theirs, control_image=picture(shown), num_inference_steps=2, guidance_scale=10.0)

    whole, half = want(1.0, 1), want(0.7, 1)
    assert psnr(drawn(ours, str(file), controls=[picture(1)]), whole) > DB
    assert psnr(drawn(ours, f"{file}:0.7", controls=[picture(1)]), half) > DB
    assert psnr(whole, half) < DB - 10
    assert psnr(whole, want(1.0, 2)) < DB - 10  # it looks at its picture
    ours.low_memory = True
    try:
        assert psnr(drawn(ours, str(file), controls=[picture(1)]), whole) > DB
    finally:
        ours.low_memory = False
    bare = drawn(ours)  # without the LoRA it is the model that it was
    with pytest.raises(Error, match="itself reads no control picture"):
        drawn(ours, controls=[picture(1)])
    with pytest.raises(Error, match="reads one control picture; none was given"):
        drawn(ours, str(file))
    assert psnr(drawn(ours), bare) > 100
    assert (ours.resolve("x", loras=[str(file)], controls=[picture(1)]).guidance, ours.resolve("x").guidance) == (
        10,
        3.5,
    )


def test_a_request_with_one_passes_the_check_before_a_model_is_fetched(model, monkeypatch):
    _, ours, file = model
    folder, asked = file.parent / "model", {"loras": (str(file),), "controls": [picture(1)]}
    assert mlxdiff.load(folder, dtype="float32", request=Request("x", **asked)).description == ours.description
    assert mlxdiff.load(folder, dtype="float32", request=Request("x", controls=[picture(1)]), loras=[str(file)])
    with pytest.raises(Error, match="itself reads no control picture"):
        mlxdiff.load(folder, dtype="float32", request=Request("x", controls=[picture(1)]))

    def listing(*_):
        raise Error("asked the hub", "")

    monkeypatch.setattr(hub, "listing", listing)
    bare = Request("x", controls=[picture(1)])
    absent = Request("x <lora:org/depth-lora/depth.safetensors:1>", controls=[picture(1)])
    for settings, says in (
        (absent, "asked the hub|is not on this machine"),
        (bare, "itself reads no control"),
    ):
        with pytest.raises(Error, match=says):
            mlxdiff.load("flux-dev", dtype="float32", request=settings, force=True)


def test_a_converted_model_holds_the_lora(model, tmp_path):
    _, ours, file = model
    plain, source = drawn(ours, str(file), controls=[picture(1)]), ours.description.net
    convert.save(convert.open(file.parent / "model"), tmp_path / "depth", dtype="float32", loras=[(file, 1.0)])
    made = mlxdiff.load(tmp_path / "depth")
    assert (made.description.variant, made.description.net.in_channels) == ("control", source.in_channels + 64)
    assert psnr(drawn(made, controls=[picture(1)]), plain) > 60  # the same sums in another order
