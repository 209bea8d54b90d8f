"""IP-Adapters: the authors' files for Stable Diffusion, and XLabs' for FLUX.1."""

import re

from ..errors import Error
from ..models.build import MOST_LAYERS
from ..models.ip_adapter import Config
from .layout import Layout
from .rules import Lacking, Row, Shapes
from .settings import Settings


def _layer(found: re.Match) -> str:
    """The authors number the layers of a U-Net that read text 1, 3, 5 and so on: those between read the picture."""
    n = int(found[1])
    return f"layers.{n // 2}." if n % 2 else found[0]


TABLE: list[Row] = [
    (r"^ip_adapter\.([1-9][0-9]{0,4})\.", _layer),
    (r"^ip_adapter_proj_model\.", "image_proj."),
    (r"^double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.", r"layers.\1.to_\2_ip."),
]
USE = "Name the model that draws, and give the file with a picture: `references=[(FILE, PICTURE)]`."
LAYOUTS = {"ip-adapter": Layout("an IP-Adapter", [(r"^", "ip_adapter.")], {"ip_adapter": "ip_adapter"}, use=USE)}
CLASSES = ()
ORIGINAL = r"^(ip_adapter|image_proj|ip_adapter_proj_model)\.|\.ip_adapter_\w+_proj\."
FACE_ID = "an IP-Adapter FaceID, which reads faces by insightface"
FACE_ID_FIX = "Use an IP-Adapter for faces that reads the picture itself: plus-face or full-face."
_WIDTH = 64  # of a head, in every resampler in use


def recognise(keys: Shapes) -> str | None:
    return "ip-adapter" if keys.has(ORIGINAL) else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return TABLE


def config(shapes: Shapes, like: Config | None) -> Config:
    """The names in the projection show its kind."""
    layers = shapes.count("layers")
    if layers > MOST_LAYERS:
        raise Error(f"{shapes.file} has {layers:,} layers, more than {MOST_LAYERS:,}.", "Use a sound copy of it.")
    kind, inner = "plain", {"width": None, "heads": None, "layers": 0, "hidden": None}
    if "image_proj.latents" in shapes:
        kind, first = "plus", "image_proj.layers.0"
        inner = {
            "width": shapes.size("image_proj.latents", 2),
            "heads": max(1, shapes.size(f"{first}.0.to_q.weight", 0) // _WIDTH),
            "layers": shapes.count("image_proj.layers"),
            "hidden": shapes.size(f"{first}.1.1.weight", 0),
        }
        image, context = shapes.size("image_proj.proj_in.weight", 1), shapes.size("image_proj.proj_out.weight", 0)
        tokens = shapes.size("image_proj.latents", 1)
    elif "image_proj.proj.3.weight" in shapes:
        kind, inner["hidden"] = "full", shapes.size("image_proj.proj.0.weight", 0)
        image, context = shapes.size("image_proj.proj.0.weight", 1), shapes.size("image_proj.proj.3.weight", 0)
        tokens = None
    elif "image_proj.proj.0.weight" in shapes:
        raise Error(f"{shapes.file} is {FACE_ID}, which is not supported yet.", FACE_ID_FIX)
    else:
        image, context = shapes.size("image_proj.proj.weight", 1), shapes.size("image_proj.norm.weight", 0)
        tokens = max(1, shapes.size("image_proj.proj.weight", 0) // context)
    widths = tuple(shapes.size(f"layers.{i}.to_k_ip.weight", 0) for i in range(layers))
    if not widths:
        raise Lacking("layers.0.to_k_ip.weight")
    if kind == "plain" and "layers.0.to_k_ip.bias" in shapes:
        kind = "xlabs"
    return Config(kind=kind, image=image, context=context, tokens=tokens, **inner, widths=widths)


def from_json(s: Settings, cls: str) -> Config:
    raise AssertionError("no config.json describes an IP-Adapter")


def divided(config: Config) -> list[tuple[int, int, str]]:
    return []
