"""diffusers' and transformers' names to the original authors' (LDM, OpenCLIP): the inverse of convert's tables, written
apart from them, so that one can check the other. Arrays go along: fused, transposed, unsqueezed as in the files."""

import re

import numpy as np

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet(state: dict) -> dict:
    """With as many residual blocks in every level."""
    layers = len({n.split(".")[3] for n in state if n.startswith("down_blocks.0.resnets.")})
    attends = {n.split(".")[1] for n in state if n.startswith("up_blocks.") and ".attentions." in n}
    out = {}
    for name, x in state.items():
        block, _, rest = name.partition(".resnets.")
        if rest:
            j, part, leaf = rest.split(".", 2)
            rest = f"{RESNET[part]}.{leaf}"
        else:
            block, _, rest = name.partition(".attentions.")
            j, _, rest = rest.partition(".")
        level = int(block.split(".")[1]) if "_blocks." in block else 0
        slot = 1 if ".attentions." in name else 0
        if name.startswith("mid_block."):
            new = f"middle_block.{1 if slot else 2 * int(j)}.{rest}"
        elif m := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
            new = f"input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op.{m[2]}"
        elif m := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
            new = f"output_blocks.{int(m[1]) * (layers + 1) + layers}.{2 if m[1] in attends else 1}.conv.{m[2]}"
        elif name.startswith("down_blocks."):
            new = f"input_blocks.{1 + level * (layers + 1) + int(j)}.{slot}.{rest}"
        elif name.startswith("up_blocks."):
            new = f"output_blocks.{level * (layers + 1) + int(j)}.{slot}.{rest}"
        else:
            head, leaf = name.rsplit(".", 1)
            new = f"{UNET[head]}.{leaf}"
        out[new] = x
    return out


ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def vae(state: dict) -> dict:
    levels = len({n.split(".")[2] for n in state if n.startswith("decoder.up_blocks.")})
    out = {}
    for name, x in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if m := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", new):
            new = f"{m[1]}mid.attn_1.{ATTENTION[m[2]]}.{m[3]}"
            x = x[:, :, None, None] if x.ndim == 2 else x
        out[new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")] = x
    return out


def open_clip(state: dict, spare: bool, projection: np.ndarray | None = None) -> dict:
    """`spare`: repeat the last layer, for SD 2.x files hold one that is never read."""
    state = {n.removeprefix("text_model."): x for n, x in state.items() if "position_ids" not in n}
    layers = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.layers."))
    if spare:
        last = f"encoder.layers.{layers - 1}."
        state |= {n.replace(last, f"encoder.layers.{layers}."): x + 1 for n, x in state.items() if n.startswith(last)}
    out = {}
    for name, x in state.items():
        if "q_proj" in name:
            x = np.concatenate([state[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")])
        elif "k_proj" in name or "v_proj" in name:
            continue
        new = re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", name)
        for ours, theirs in (
            ("encoder.layers", "transformer.resblocks"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("final_ln_", "ln_final"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("embeddings.token_embedding", "token_embedding"),
            ("text_projection.weight", "text_projection"),
        ):
            new = new.replace(ours, theirs)
        out[new] = x.T if new == "text_projection" else x
    if projection is not None:
        out["text_projection"] = projection
    if "text_projection" in out:
        out["logit_scale"] = np.zeros((), np.float32)
    return out


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: x for name, x in state.items()}


def sd3(state: dict) -> dict:
    """diffusers' SD3Transformer2DModel to Stability's MMDiT."""
    last = max(int(n.split(".")[1]) for n in state if n.startswith("transformer_blocks."))
    swapped = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")
    out = {}
    for name, x in state.items():
        if name.startswith(swapped):
            x = np.roll(x, len(x) // 2, axis=0)
        if m := re.search(r"(to_q|add_q_proj)\.", name):
            others = [m[1].replace("q", p) for p in "kv"]
            x = np.concatenate([x, *(state[name.replace(m[1], o)] for o in others)])
        elif re.search(r"to_[kv]\.|add_[kv]_proj\.", name):
            continue
        for theirs, new in (
            ("pos_embed.proj", "x_embedder.proj"),
            ("pos_embed.pos_embed", "pos_embed"),
            ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
            ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
            ("norm_out.linear", "final_layer.adaLN_modulation.1"),
            ("norm1_context.linear", "context_block.adaLN_modulation.1"),
            ("norm1.linear", "x_block.adaLN_modulation.1"),
            ("attn.to_add_out", "context_block.attn.proj"),
            ("attn.add_q_proj", "context_block.attn.qkv"),
            ("attn.norm_added_", "context_block.attn.ln_"),
            ("ff_context.net.0.proj", "context_block.mlp.fc1"),
            ("ff_context.net.2", "context_block.mlp.fc2"),
            (".ff.net.0.proj", ".x_block.mlp.fc1"),
            (".ff.net.2", ".x_block.mlp.fc2"),
            ("transformer_blocks", "joint_blocks"),
        ):
            name = name.replace(theirs, new)
        name = re.sub(r"(\d)\.(attn2?)\.to_out\.0", r"\1.x_block.\2.proj", name)
        name = re.sub(r"(\d)\.(attn2?)\.to_q", r"\1.x_block.\2.qkv", name)
        name = re.sub(r"(\d)\.(attn2?)\.norm_", r"\1.x_block.\2.ln_", name)
        out["final_layer.linear." + name[9:] if name.startswith("proj_out.") else name] = x
    return out
