"""Tiny random adapters for reference pictures, under the published names, and vision models for them."""

from pathlib import Path

import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from .oracle import randomize
from .tiny import louder

State = dict[str, dict[str, torch.Tensor]]  # as diffusers takes it: image_proj and ip_adapter


def eyes(width: int = 32, projection: int = 20, size: int = 32) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        image_size=size, patch_size=8, hidden_size=width, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=50, hidden_act="gelu", projection_dim=projection,
    )  # fmt: skip
    return randomize(CLIPVisionModelWithProjection(config), 71)


def saved(folder: Path, state: State, encoder: CLIPVisionModelWithProjection | None = None) -> Path:
    """A file as published, with its vision model beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "adapter.safetensors"
    save_file({f"{part}.{k}": x.contiguous() for part, named in state.items() for k, x in named.items()}, file)
    if encoder is not None:
        encoder.save_pretrained(folder / "image_encoder")
    return file


class Random:
    def __init__(self, seed: int):
        self.g = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(shape, generator=self.g) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)

    def norm(self, name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + self(width), f"{name}.bias": self(width)}

    def linear(self, name: str, out: int, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self(out, width), f"{name}.bias": self(out)}


def widths(unet) -> list[int]:
    """Of the layers that read text, in diffusers' order: down, up, middle."""
    return [
        unet.get_submodule(n.removesuffix(".processor")).to_k.out_features for n in unet.attn_processors if "attn2" in n
    ]


def keys_values(unet, r: Random) -> dict[str, torch.Tensor]:
    context = unet.config.cross_attention_dim
    return {
        f"{2 * i + 1}.to_{p}_ip.weight": r(width, context, size=2.0)
        for i, width in enumerate(widths(unet))
        for p in "kv"
    }


def plain(unet, seed: int, reads: int = 20) -> State:
    r, context = Random(seed), unet.config.cross_attention_dim
    proj = r.linear("proj", 4 * context, reads) | r.norm("norm", context)
    return {"image_proj": proj, "ip_adapter": keys_values(unet, r)}


def full(unet, seed: int, reads: int = 32) -> State:
    r, context = Random(seed), unet.config.cross_attention_dim
    proj = r.linear("proj.0", reads, reads) | r.linear("proj.2", context, reads) | r.norm("proj.3", context)
    return {"image_proj": proj, "ip_adapter": keys_values(unet, r)}


def plus(unet, seed: int, reads: int = 32, width: int = 40, heads: int = 2, tokens: int = 5) -> State:
    r, context, inner = Random(seed), unet.config.cross_attention_dim, 64 * heads
    proj = {"latents": 3 * r(1, tokens, width)} | r.linear("proj_in", width, reads)
    proj |= r.linear("proj_out", context, width) | r.norm("norm_out", context)
    for i in range(4):
        attend, mlp = f"layers.{i}.0", f"layers.{i}.1"
        proj |= r.norm(f"{attend}.norm1", width) | r.norm(f"{attend}.norm2", width) | r.norm(f"{mlp}.0", width)
        proj |= {f"{attend}.to_q.weight": r(inner, width), f"{attend}.to_kv.weight": r(2 * inner, width)}
        proj |= {f"{attend}.to_out.weight": r(width, inner)}
        proj |= {f"{mlp}.1.weight": r(4 * width, width), f"{mlp}.3.weight": r(width, 4 * width)}
    return {"image_proj": proj, "ip_adapter": keys_values(unet, r)}


def xlabs(transformer, seed: int, reads: int = 20, tokens: int = 4) -> State:
    """For FLUX.1, in the names that diffusers makes of XLabs'."""
    r, context, width = Random(seed), transformer.config.joint_attention_dim, transformer.inner_dim
    proj = r.linear("proj", tokens * context, reads) | r.norm("norm", context)
    blocks = range(transformer.config.num_layers)
    named = {n: x for i in blocks for p in "kv" for n, x in r.linear(f"{i}.to_{p}_ip", width, context).items()}
    return {"image_proj": proj, "ip_adapter": {n: 2 * x for n, x in named.items()}}


def saved_by_xlabs(folder: Path, state: State, encoder: CLIPVisionModelWithProjection) -> Path:
    proj = {f"ip_adapter_proj_model.{n}": x for n, x in state["image_proj"].items()}
    spelt = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj.{}"
    names = [(n.split("."), x) for n, x in state["ip_adapter"].items()]
    named = {spelt.format(i, to[3], leaf): x for (i, to, leaf), x in names}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(proj | named, folder / "ip_adapter.safetensors")
    encoder.save_pretrained(folder / "image_encoder")
    return folder / "ip_adapter.safetensors"


def siglip(size: int = 128) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        image_size=size, patch_size=8, hidden_size=30, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=44, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    return randomize(SiglipVisionModel(config), 73)


def redux(context: int) -> ReduxImageEncoder:
    made = randomize(ReduxImageEncoder(redux_dim=30, txt_in_features=context), 74)
    return louder(made, 8, ("redux_down",))  # else hundreds of tokens of text would drown those of the picture
