"""FLUX.1 and FLUX.2 in diffusers' names to Black Forest Labs' own: what each of our parameters is made of."""

import re

import torch

# (ours, theirs): several of theirs are laid end to end along axis 0.
DOUBLE = [
    ("img_mod.lin", ["norm1.linear"]),
    ("txt_mod.lin", ["norm1_context.linear"]),
    ("img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    ("img_attn.norm.query_norm", ["attn.norm_q"]),
    ("img_attn.norm.key_norm", ["attn.norm_k"]),
    ("txt_attn.norm.query_norm", ["attn.norm_added_q"]),
    ("txt_attn.norm.key_norm", ["attn.norm_added_k"]),
    ("img_attn.proj", ["attn.to_out.0"]),
    ("txt_attn.proj", ["attn.to_add_out"]),
    ("img_mlp.0", ["ff.net.0.proj"]),
    ("img_mlp.2", ["ff.net.2"]),
    ("txt_mlp.0", ["ff_context.net.0.proj"]),
    ("txt_mlp.2", ["ff_context.net.2"]),
    *[
        (f"{our}_mlp.{n}", [f"{their}.linear_{end}"])
        for our, their in (("img", "ff"), ("txt", "ff_context"))
        for n, end in ((0, "in"), (2, "out"))
    ],
]
SINGLE = [
    ("modulation.lin", ["norm.linear"]),
    ("linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    ("linear2", ["proj_out"]),
    ("linear1", ["attn.to_qkv_mlp_proj"]),
    ("linear2", ["attn.to_out"]),
    ("norm.query_norm", ["attn.norm_q"]),
    ("norm.key_norm", ["attn.norm_k"]),
]
TOP = [
    ("img_in", ["x_embedder"]),
    ("txt_in", ["context_embedder"]),
    *[
        (f"{ours}_in.{layer}_layer", [f"time_text_embed.{theirs}_embedder.linear_{i}"])
        for ours, theirs in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text"))
        for i, layer in ((1, "in"), (2, "out"))
    ],
    *[
        (f"{kind}_in.{layer}_layer", [f"time_guidance_embed.{theirs}_embedder.linear_{i}"])
        for kind, theirs in (("time", "timestep"), ("guidance", "guidance"))
        for i, layer in ((1, "in"), (2, "out"))
    ],
    *[
        (f"{n}.lin", [f"{n}.linear"])
        for n in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    ],
    ("final_layer.adaLN_modulation.1", ["norm_out.linear"]),
    ("final_layer.linear", ["proj_out"]),
]


def from_diffusers(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Strict: every tensor of theirs is used, once."""
    left, ours = dict(theirs), {}

    def take(rows: list, to: str, prefix: str) -> None:
        for target, sources in rows:
            for end in ("weight", "bias"):
                names = [f"{prefix}{s}.{end}" for s in sources]
                if names[0] in left:
                    out = f"{to}{target}.{'scale' if '_norm' in target else end}"
                    ours[out] = torch.cat([left.pop(n) for n in names])

    for theirs_of, to, rows in (
        ("transformer_blocks", "double_blocks", DOUBLE),
        ("single_transformer_blocks", "single_blocks", SINGLE),
    ):
        for i in {int(m[1]) for k in theirs if (m := re.match(rf"{theirs_of}\.(\d+)\.", k))}:
            take(rows, f"{to}.{i}.", f"{theirs_of}.{i}.")
    take(TOP, "", "")
    assert not left, left.keys()
    for end in ("weight", "bias"):  # diffusers: scale, shift; BFL: shift, scale
        name = f"final_layer.adaLN_modulation.1.{end}"
        if name in ours:
            ours[name] = torch.cat(ours[name].chunk(2)[::-1])
    return ours
