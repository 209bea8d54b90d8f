"""A sibling of storybook with another network: a transformer of two streams in Stable Diffusion 3's layout, trained as
a rectified flow, on the same latents and words. Torch on CPU cores; after `render` and `encode` of storybook_torch:

    python -m tests.recipes.flow_torch train RUN --half --minutes 17 --decay 1 --rate 0.015
    python -m tests.recipes.flow_torch train RUN --compile --minutes 25 --decay 0.3 --rate 0.012
    python -m tests.recipes.flow_torch train RUN --compile --minutes 21 --decay 0.1 --rate 0.012
    python -m tests.recipes.flow_torch export RUN FOLDER
    python -m tests.recipes.flow_torch measure RUN FOLDER

`train` saves every four minutes and goes on from there when it is started again. It begins with latents of half the
width and height, a quarter of the positions at a quarter of the cost, where it learns what a scene is.

The folder has the autoencoder of the model that is named by --start, and its text encoder twice, in the places of SD3's
two CLIPs; there is no T5. Where T5 is left out, SD3 reads 256 tokens of zeros instead. They stay equal in every layer,
so `train` reads one of them, whose share in the attention is that of 256."""

import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from tests.recipes import cpu
from tests.recipes import storybook_torch as st

LEFT_OUT = 256  # tokens of T5
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # which diffusers wants to be told
WIDTH = 128  # of the text encoder
LEANING = 0.4  # to high noise, where the words are decided


def network() -> SD3Transformer2DModel:
    """3.5 million parameters, 6.9 MB in float16. Position embeddings for pictures of up to 384 pixels a side."""
    net = SD3Transformer2DModel(
        sample_size=st.GRID,
        patch_size=2,
        in_channels=st.LATENTS,
        out_channels=st.LATENTS,
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=64,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )
    for block in net.transformer_blocks:  # each begins as the identity (Peebles and Xie 2023)
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    return net


def halve(net) -> None:
    """A patch of the smaller latents lies where four patches of the whole ones lie: its position is their mean."""
    side = st.GRID // 2
    where = net.pos_embed.cropped_pos_embed(st.GRID, st.GRID).view(1, side, side, -1).permute(0, 3, 1, 2)
    where = F.avg_pool2d(where, 2).flatten(2).transpose(1, 2)
    net.pos_embed.cropped_pos_embed = lambda height, width: where


def attention(q, k, v, attn_mask=None, is_causal=False, **how):
    """The last token counts LEFT_OUT times. The text encoder's attention is causal: it stays as it was."""
    if attn_mask is not None or is_causal:
        return cpu.attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **how)
    B, H, N, d = q.shape
    q, k, v = (t.reshape(B * H, -1, d) for t in (q * d**-0.5, k, v))
    times = torch.zeros(k.shape[1], dtype=q.dtype)
    times[-1] = math.log(LEFT_OUT)
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) + times, -1), v).view(B, H, N, d)


@torch.no_grad()
def read(text, ids):
    """What the network reads of captions: (B, 41, 256), the last token standing for T5's, and (B, 256)."""
    out = text(ids, output_hidden_states=True)
    context, pooled = out.hidden_states[-2], out.pooler_output
    return F.pad(torch.cat([context, context], -1), (0, 0, 0, 1)), torch.cat([pooled, pooled], -1)


def train(args, rank: int) -> None:
    """The noise's share is the logistic function of a normal number around LEANING, stratified over the batch (Esser et
    al. 2024). The mean of four latents has half their noise: so do smaller latents, at the same time."""
    F.scaled_dot_product_attention = attention
    net, text = network(), st.known_text(args.start).requires_grad_(False)
    if args.half:
        halve(net)
    asked = torch.compile(net) if args.compile else net

    def loss(x0, ids, g):
        u = (torch.arange(st.BATCH) + torch.rand(1, generator=g)) / st.BATCH
        sigma = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)) + LEANING)
        sigma = sigma[torch.randperm(st.BATCH, generator=g)]
        share = sigma.view(-1, 1, 1, 1)
        if args.half:
            x0, share = F.avg_pool2d(x0, 2), share / (2 - share)
        noise = torch.randn(x0.shape, generator=g)
        context, pooled = read(text, ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu.BFLOAT16):
            v = asked((1 - share) * x0 + share * noise, context, pooled, 1000 * sigma).sample
        return F.mse_loss(v.float(), noise - x0)

    st.learn(args, rank, {"transformer": net}, loss)


def export(args) -> None:
    """The public folder in float16. Of the last weights: their rate has fallen to nothing, and after so few steps the
    averaged ones still remember the smaller latents."""
    net = network()
    net.load_state_dict(torch.load(args.run / "transformer.pt")["transformer"])
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(args.start / "vae"))  # which notes no path in exports
    vae.load_state_dict(load_file(args.start / "vae" / "diffusion_pytorch_model.safetensors"))
    vae.register_to_config(shift_factor=0.0)
    known = st.known_text(args.start)
    known.config.projection_dim = WIDTH
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in known.state_dict().items()}
    texts = [CLIPTextModelWithProjection(known.config) for _ in range(2)]
    for text in texts:
        text.text_model.load_state_dict(tensors)
        text.text_projection.weight.data = torch.eye(WIDTH)
    tokenizer = CLIPTokenizer.from_pretrained(args.start / "tokenizer")
    pipeline = StableDiffusion3Pipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae,
        text_encoder=texts[0],
        tokenizer=tokenizer,
        text_encoder_2=texts[1],
        tokenizer_2=tokenizer,
        **WITHOUT_T5,
    )
    pipeline.to(torch.float16).save_pretrained(args.folder)
    for name in ("tokenizer", "tokenizer_2"):  # CLIP's own two files, whatever the library wrote
        shutil.rmtree(args.folder / name)
        shutil.copytree(args.start / "tokenizer", args.folder / name)


def measure(args) -> None:
    """As `storybook_torch measure`, with Euler's method in 28 steps."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.folder, torch_dtype=torch.float32, **WITHOUT_T5)
    st.measure(args, pipeline, 28)


COMMANDS = {"train": lambda args: cpu.run(train, args, args.ranks), "export": export, "measure": measure}


def main() -> None:
    parser = st.parser(__doc__, COMMANDS, minutes=25.0)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--ranks", type=int, default=st.RANKS, help="processes")
    parser.add_argument("--half", action="store_true", help="train on latents of half the width and height")
    parser.add_argument("--compile", action="store_true", help="1.8 times as fast; takes a C++ compiler and a minute")
    args = parser.parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
