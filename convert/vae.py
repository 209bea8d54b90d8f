"""The VAE (AutoencoderKL, and FLUX.2's): the original names, and diffusers' with newer and older attention names."""

import re

from ..families.published import VAE
from ..models.vae import Config
from .layout import DROPPED, Layout
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"^(loss|model_ema)\.", None),  # the discriminator, and counters of an average, whose weights are the file's
    (r"^bn\.num_batches_tracked$", None),  # a counter
    (r"^(encoder|decoder)\.((post_)?quant_conv)\.", r"\2."),  # where FLUX.2's own file has them
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.(q|query)\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.(k|key)\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.(v|value)\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
]
LAYOUTS = {"vae": Layout("a VAE", [*DROPPED, (r"^(first_stage_model\.|vae\.)?", "vae.")], {"vae": "vae"}, {"vae": VAE})}
CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2")
_BN_EPS = 1e-4  # of FLUX.2's batch norm, which no shape shows
ORIGINAL = r"^(first_stage_model\.|vae\.)?decoder\.up\.\d"


def recognise(keys: Shapes) -> str | None:
    return "vae" if keys.has(rf"{ORIGINAL}|^(first_stage_model\.|vae\.)?decoder\.up_blocks\.\d") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    """The original counts the decoder's levels from the finest, diffusers from the coarsest."""
    levels = len({m[1] for n in names if (m := re.match(r"decoder\.up\.(\d+)\.", n))})
    rows = list(TABLE)
    for i, ours in enumerate(reversed(range(levels))):
        rows.append((rf"^decoder\.up\.{i}\.block\.", f"decoder.up_blocks.{ours}.resnets."))
        rows.append((rf"^decoder\.up\.{i}\.upsample\.", f"decoder.up_blocks.{ours}.upsamplers.0."))
    return rows


def config(shapes: Shapes, like: Config) -> Config:
    """No shape shows the groups, the scale and the shift."""
    levels = max(1, shapes.count("encoder.down_blocks"))
    channels, decoder = (_channels(shapes, part, levels) for part in ("encoder.down_blocks", "decoder.up_blocks"))
    return Config(
        in_channels=shapes.size("encoder.conv_in.weight", 1),
        out_channels=shapes.size("decoder.conv_out.weight", 0),
        latent_channels=shapes.size("decoder.conv_in.weight", 1),
        channels=channels,
        layers=shapes.count("encoder.down_blocks.0.resnets"),
        groups=like.groups,
        scale=1.0 if "bn.running_mean" in shapes else like.scale,
        shift=like.shift,
        quant_conv="quant_conv.weight" in shapes,
        post_quant_conv="post_quant_conv.weight" in shapes,
        mid_attention="decoder.mid_block.attentions.0.to_q.weight" in shapes,
        decoder_channels=None if decoder[::-1] == channels else decoder[::-1],
        bn_eps=_BN_EPS if "bn.running_mean" in shapes else None,
    )


def _channels(shapes: Shapes, blocks: str, levels: int) -> tuple[int, ...]:
    return tuple(shapes.size(f"{blocks}.{i}.resnets.0.conv1.weight", 0) for i in range(levels))


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    batch_norm = cls == "AutoencoderKLFlux2"
    channels = s.wholes("block_out_channels", [128, 256, 512, 512] if batch_norm else [64])
    decoder = None
    if batch_norm:
        s.one("patch_size", [2, 2], [[2, 2]])
        if s.get("decoder_block_out_channels", None) is not None:
            decoder = s.wholes("decoder_block_out_channels", [], len(channels))
    s.one("act_fn", "silu", ["silu"])
    s.one(
        "down_block_types", ["DownEncoderBlock2D"] * (4 if batch_norm else 1), [["DownEncoderBlock2D"] * len(channels)]
    )
    s.one("up_block_types", ["UpDecoderBlock2D"] * (4 if batch_norm else 1), [["UpDecoderBlock2D"] * len(channels)])
    s.one("latents_mean", None, [None])
    s.one("latents_std", None, [None])
    return Config(
        in_channels=s.whole("in_channels", 3),
        out_channels=s.whole("out_channels", 3),
        latent_channels=s.whole("latent_channels", 32 if batch_norm else 4),
        channels=channels,
        layers=s.whole("layers_per_block", 2 if batch_norm else 1, MOST_LAYERS),
        groups=s.whole("norm_num_groups", 32),
        scale=1.0 if batch_norm else s.positive("scaling_factor", 0.18215),
        shift=0.0 if s.get("shift_factor", None) is None else s.number("shift_factor", 0.0),
        quant_conv=s.flag("use_quant_conv", True),
        post_quant_conv=s.flag("use_post_quant_conv", True),
        mid_attention=s.flag("mid_block_add_attention", True),
        decoder_channels=None if decoder == channels else decoder,
        bn_eps=s.positive("batch_norm_eps", _BN_EPS) if batch_norm else None,
    )


def divided(config: Config) -> list[tuple[int, int, str]]:
    return [(width, config.groups, "norm groups") for width in (*config.channels, *(config.decoder_channels or ()))]
