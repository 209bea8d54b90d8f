"""ControlNets of FLUX.1: diffusers' names, and XLabs' original ones, which are Black Forest Labs' and some more."""

from dataclasses import fields

from ..families.flux import MODELS
from ..models import flux as denoiser
from ..models.flux_controlnet import Config
from . import controlnet, flux
from .layout import Layout
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

_HINT: list[Row] = [
    (rf"^input_hint_block\.{n}\.", f"input_hint_block.{name}.")
    for n, name in [(0, "conv_in"), *((n, f"blocks.{i}") for i, n in enumerate(controlnet.HINT)), (14, "conv_out")]
]
TABLE: list[Row] = [*_HINT, (r"^pos_embed_input\.", "controlnet_x_embedder."), *flux.TABLE]
_BASE = vars(MODELS["flux-dev"].networks["transformer"])
LAYOUTS = {
    "flux_controlnet": Layout(
        "a FLUX ControlNet",
        [(r"^", "flux_controlnet.")],
        {"flux_controlnet": "flux_controlnet"},
        {"flux_controlnet": Config(**_BASE, tasks=0, hint=())},
        use=controlnet.LAYOUTS["controlnet"].use,
    )
}
CLASSES = ("FluxControlNetModel",)
ORIGINAL = r"^pos_embed_input\."


def recognise(keys: Shapes) -> str | None:
    guides = keys.has(r"^controlnet_blocks\.\d") and not keys.has(r"^pos_embed(_input)?\.proj\.")
    return "flux_controlnet" if guides and keys.has(r"^(vector_in|time_text_embed\.text_embedder)\.") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return TABLE


def config(shapes: Shapes, like: Config) -> Config:
    patch = shapes.size("img_in.weight", 1)
    values = vars(flux.config(Shapes(shapes | {"final_layer.linear.weight": (patch,)}), like))
    hint, mode = "input_hint_block", "controlnet_mode_embedder.weight"
    read = f"{hint}.conv_in.weight" in shapes
    return Config(
        **{f.name: values[f.name] for f in fields(denoiser.Config)},
        tasks=shapes.size(mode, 0) if mode in shapes else 0,
        hint=controlnet.widths(shapes, hint) if read else (),
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    tasks, channels = s.get("num_mode", None), s.get("conditioning_embedding_channels", None)
    s.one("patch_size", 1, [1] if channels is None else [2])  # of the pixels' convolutions; latents come packed
    values = vars(flux.read(s))
    if channels is not None:
        s.one("conditioning_embedding_channels", None, [values["in_channels"] // 4])
    return Config(
        **values,
        tasks=0 if tasks is None else s.whole("num_mode", 0, MOST_LAYERS),
        hint=() if channels is None else (16, 16, 16, 16),
    )


def divided(config: Config) -> list[tuple[int, int, str]]:
    return flux.divided(config)
