"""What a file is, from tensor names and shapes alone: its family, or the name of the thing we do not read."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import Error
from .flux import FLUX
from .rules import Weight
from .sd import DROPPED, SD1, SD2, Family
from .sd3 import SD3
from .sdxl import REFINER, SDXL
from .source import Tensor

# A text encoder alone in a file has its own names, or those that it has in ComfyUI's whole checkpoints.
_WITHIN = r"^(text_encoders\.\w+\.transformer\.)?"

FAMILIES = {
    "sd1": SD1,
    "sd2": SD2,
    "sdxl": SDXL,
    "sdxl-refiner": REFINER,
    "sd3": SD3,
    "flux": FLUX,
    # Networks alone in a file: which family they serve cannot be told.
    "clip": Family([*DROPPED, (_WITHIN, "text_encoder.")], ("text_encoder",), acts={}, pads={}, pooled=True),
    "clip-g": Family([*DROPPED, (_WITHIN, "text_encoder_2.")], ("text_encoder_2",), acts={}, pads={}),
    "t5": Family([*DROPPED, (_WITHIN, "text_encoder.")], ("text_encoder",), acts={}, pads={}, t5="text_encoder"),
    "vae": Family([*DROPPED, (r"^(first_stage_model\.|vae\.)?", "vae.")], ("vae",), acts={}, pads={}),
    "taesd": Family([(r"^", "taesd.")], ("taesd",), acts={}, pads={}),
}

KNOWN = "Give a Stable Diffusion 1.x, 2.x, XL, 3 or 3.5 or a FLUX.1 checkpoint."

VARIANTS = {4: "base", 9: "inpaint", 8: "edit", 7: "upscale", 5: "depth"}  # by the U-Net's input channels

# One key is enough, and the first row that finds one names the file.
FOREIGN = [
    (
        r"\.(lora_(down|up|mid|A|B)|lora|\w+_lora\d?\.(down|up)|hada_w\d.*|lokr_.*|oft_.*|dora_scale)(\.|$)|\.lora_linear_layer\.",
        "a LoRA",
    ),
    (r"^(ip_adapter|image_proj|ip_adapter_proj_model)\.|\.ip_adapter_\w+_proj\.", "an IP-Adapter"),
    (
        r"^control_model\.|^controlnet_(cond_embedding|down_blocks|blocks|x_embedder)\.|^(input_hint_block|zero_convs)\.",
        "a ControlNet",
    ),
    (r"motion_modules\.", "an AnimateDiff motion module"),
    (r"^redux_(up|down)\.", "a FLUX Redux image embedder"),
    (r"(^|\.)distilled_guidance_layer\.", "a Chroma model"),
    (r"(^|\.)double_stream_modulation_", "a FLUX.2 model"),
    (r"(^|\.)txt_in\.individual_token_refiner\.", "a HunyuanVideo model"),
    (r"(^|\.)transformer_blocks\.\d+\.img_mod\.", "a Qwen-Image model"),
    (r"^1\.conv\.0\.", "the encoder of a TAESD, whose decoder alone is used"),  # in a decoder's file, 1 is no block
    (r"^(emb_params|string_to_param|clip_[lg])$", "a textual inversion"),
    (r"^edm_(mean|std)$|^edm_vpred\.", "an SDXL model with EDM noise (Playground 2.5, CosXL)"),
    (r"^depth_model\.|^low_scale_model\.|^noise_augmentor\.", "a depth, upscaling or unCLIP model"),
]

# The same for files whose numbers were packed by other programs.
PACKED = [
    (r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|comfy_quant)$", "a file of scaled 8-bit numbers"),
    (r"\.(quant_state\.bitsandbytes__\w+|absmax)$", "a file quantized by bitsandbytes"),
    (r"\.(qweight|wscales)$", "a file quantized by Nunchaku or GPTQ"),
    (r"\.scales$", "a file quantized with MLX"),
]

_FLUX = r"(^|\.)double_blocks\.\d|(^|\.)single_transformer_blocks\.\d"
_SD3 = r"(^|\.)joint_blocks\.\d|(^|\.)transformer_blocks\.\d+\.attn\.add_q_proj\."
_T5 = rf"{_WITHIN}encoder\.block\.\d+\.layer\.0\.SelfAttention\."
_UNET = r"^((model\.)?diffusion_model\.)?(input_blocks\.\d|down_blocks\.\d)"
_VAE = r"^(first_stage_model\.|vae\.)?decoder\.(up|up_blocks)\.\d"
_TAESD = r"^(decoder\.layers\.)?\d+\.conv\.\d+\.weight$"
_CLIP = rf"{_WITHIN}(text_model\.)?encoder\.layers\.\d+\.self_attn\.|^transformer\.resblocks\.\d"


def family(path: Path, tensors: dict[str, Tensor]) -> str:
    """The key of FAMILIES."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, n) for n in tensors)

    def shape(pattern: str) -> tuple[int, ...]:
        return next((t.shape for n, t in tensors.items() if re.search(pattern, n)), ())

    for pattern, what in FOREIGN:
        if has(pattern):
            raise Error(f"{path} is {what}, which is not supported yet.", KNOWN)
    for pattern, what in PACKED:
        if has(pattern):
            raise Error(
                f"{path} is {what}, which is not read.",
                "Use the same model in 16 bits or in plain 8-bit floats (fp8_e4m3fn), and -q to make it smaller.",
            )
    if has(_FLUX):
        return "flux"
    if has(_SD3):
        return "sd3"
    if has(_UNET):
        if has(r"(label_emb|add_embedding)\.|^conditioner\.embedders\.1\."):
            told, read = shape(r"(label_emb\.0\.0|add_embedding\.linear_1)\.weight"), shape(r"attn2\.to_k\.weight")
            # Alone, the refiner's U-Net shows itself: it reads and is told the same text vector; SDXL's reads two.
            alone = len(told) == len(read) == 2 and told[1] - read[1] == REFINER.sizes * 256
            one = not has(r"^conditioner\.embedders\.1\.")
            return "sdxl-refiner" if one and (alone or has(r"^conditioner\.embedders\.0\.model\.")) else "sdxl"
        return "sd1" if len(shape(r"\.proj_in\.weight$")) == 4 else "sd2"
    if has(_T5):
        return "t5"
    if has(_VAE):
        return "vae"
    if has(_TAESD):
        return "taesd"
    if has(_CLIP):
        large = shape(r"(final_layer_norm|ln_final)\.weight$") != (768,)
        return "clip-g" if large and has(rf"{_WITHIN}text_projection") else "clip"
    if has(r"^(vision_model|visual|visual_projection)\."):
        raise Error(f"{path} is a CLIP vision model, which is not supported yet.", KNOWN)
    raise Error(
        f"{path} is no checkpoint that is known here; its first tensor is {min(tensors, default='none')!r}.",
        KNOWN,
    )


def original(tensors: dict[str, Tensor]) -> bool:
    """Whether the names are the original authors' (LDM, OpenCLIP) and not diffusers' and transformers'."""
    marks = (
        r"^(model|first_stage_model|cond_stage_model|conditioner)\.|^input_blocks\.|\.mid\.block_1\.|resblocks\."
        r"|(^|\.)(double|joint)_blocks\."
    )
    return any(re.search(marks, n) for n in tensors)


def prediction_sd2(weights: dict[str, Weight]) -> str:
    """eps or v. SD 2.x at 512 pixels predicts eps and at 768 v, in files alike but for the numbers. ComfyUI's rule: the
    last attention's first norm has biases that spread above 0.09 where v is predicted. All zero, they were never
    trained, and diffusers' rule holds: v."""
    last = max(w for w in weights if w.endswith("transformer_blocks.0.norm1.bias"))  # up_blocks sort last
    spread = np.std(np.array(weights[last].array().astype(mx.float32)))
    return "v" if spread > 0.09 or spread == 0 else "eps"
