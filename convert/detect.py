"""What a file is, from the names and shapes of its tensors: its layout, or the name of something that is not read."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import Error
from .component import KNOWN
from .ip_adapter import FACE_ID, FACE_ID_FIX
from .registry import MODULES
from .rules import Shapes, Weight
from .source import Tensor

WORD = "a textual inversion"

# One such key is enough, and the first row that has one names the file.
FOREIGN = [
    (r"^ip_adapter\.\d+\.to_\w+_lora\.|^image_proj\.perceiver_resampler\.", FACE_ID),
    (
        r"\.(lora_(down|up|mid|A|B)|lora|\w+_lora\d?\.(down|up)|hada_w\d.*|lokr_.*|oft_.*|dora_scale)(\.|$)|\.lora_linear_layer\.",
        "a LoRA",
    ),
    (r"^control_(layers|all_x_embedder)\.", "a ControlNet"),
    (r"motion_modules\.", "an AnimateDiff motion module"),
    (r"(^|\.)distilled_guidance_layer\.", "a Chroma model"),
    (r"(^|\.)siglip_embedder\.", "a Z-Image Omni model, which also reads pictures"),
    (r"(^|\.)time_caption_embed\.", "a Lumina-Image 2 model"),
    (r"(^|\.)txt_in\.individual_token_refiner\.", "a HunyuanVideo model"),
    (r"(^|\.)transformer_blocks\.\d+\.img_mod\.", "a Qwen-Image model"),
    (r"^1\.conv\.0\.", "the encoder of a TAESD, whose decoder alone is used"),  # in a decoder's file, 1 is no block
    (r"^(emb_params|string_to_param|clip_[lg])$", WORD),
    (r"^edm_(mean|std)$|^edm_vpred\.", "an SDXL model with EDM noise (Playground 2.5, CosXL)"),
    (r"^depth_model\.|^low_scale_model\.|^noise_augmentor\.", "a depth, upscaling or unCLIP model"),
]

# Upscalers of other architectures than ESRGAN.
UPSCALERS = [
    (r"(^|\.)layers\.0\.residual_group\.overlap_attn\.|^relative_position_index_OCA$", "a HAT"),
    (r"(^|\.)layers\.0\.residual_group\.blocks\.0\.", "a SwinIR"),
    (r"(^|\.)layers\.0\.blocks\.\d+\.attn\.attns\.\d\.", "a DAT"),
    (r"^(params(_ema)?\.)?body\.0\.weight$", "a compact Real-ESRGAN (SRVGG)"),
    (r"(^|\.)block_1\.c1_r\.(sk|eval_conv)\.", "a SPAN"),
    (r"(^|\.)feats\.1\.(channe_mixer|channel_mixer|lk)\.", "a PLKSR"),
    (r"\.RDB\d\.conv1x1\.", "an ESRGAN+"),
]

USE = {
    "a LoRA": "Name the model that it changes, and give the file as `loras=[FILE]`.",
    WORD: "Name the model that draws, and give the file as `embeddings=[FILE]`.",
    FACE_ID: FACE_ID_FIX,
}

# The same for files whose numbers other programs have packed.
PACKED = [
    (r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|comfy_quant)$", "a file of scaled 8-bit numbers"),
    (r"\.(quant_state\.bitsandbytes__\w+|absmax)$", "a file quantized by bitsandbytes"),
    (r"\.(qweight|wscales)$", "a file quantized by Nunchaku or GPTQ"),
    (r"\.scales$", "a file quantized with MLX"),
]


def layout(path: Path, tensors: dict[str, Tensor]) -> tuple[str, bool]:
    """The key of LAYOUTS, and whether the names are the original authors' (LDM, OpenCLIP, ...)."""
    keys = Shapes({name: tensor.shape for name, tensor in tensors.items()})
    for pattern, what in FOREIGN:
        if keys.has(pattern):
            why = "no model by itself" if what in USE and what != FACE_ID else "not supported yet"
            raise Error(f"{path} is {what}, which is {why}.", USE.get(what, KNOWN))
    for pattern, what in UPSCALERS:
        if keys.has(pattern):
            raise Error(
                f"{path} is {what} upscaler, which is not supported.",
                "Use one of the ESRGAN family, such as RealESRGAN_x4plus.",
            )
    for pattern, what in PACKED:
        if keys.has(pattern):
            raise Error(
                f"{path} is {what}, which is not read.",
                "Use the same model in 16 bits or in plain 8-bit floats (fp8_e4m3fn), and `bits=4` to make it smaller.",
            )
    for module in MODULES.values():
        name = module.recognise(keys)
        if name is not None:
            return name, keys.has(module.ORIGINAL)
    if keys.has(r"^(vision_model|visual|visual_projection)\."):
        raise Error(f"{path} is a vision model with other names, which is not supported yet.", KNOWN)
    if keys.has(r"(^|\.)cap_embedder\.0\."):  # Z-Image, which has such a layer too, is recognised by then
        raise Error(f"{path} is a Lumina-Image 2 model, which is not supported yet.", KNOWN)
    shapes = [tensor.shape for tensor in tensors.values()]
    if len(shapes) == 1 and len(shapes[0]) in (1, 2) and shapes[0][-1] >= 64:  # diffusers calls it as the word
        raise Error(f"{path} is {WORD}, which is no model by itself.", USE[WORD])
    raise Error(
        f"{path} is no checkpoint that is known here; its first tensor is {min(tensors, default='none')!r}.",
        KNOWN,
    )


def prediction_sd2(weights: dict[str, Weight]) -> str:
    """eps or v. SD 2.x predicts eps at 512 pixels and v at 768, and only the numbers in its files differ. ComfyUI's
    rule: v if the biases of the last attention's first norm have a standard deviation above 0.09. If they are all zero,
    they were never trained, and diffusers' rule holds: v."""
    last = max(w for w in weights if w.endswith("transformer_blocks.0.norm1.bias"))  # up_blocks sort last
    spread = np.std(np.array(weights[last].array().astype(mx.float32)))
    return "v" if spread > 0.09 or spread == 0 else "eps"
