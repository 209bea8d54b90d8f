"""Parts that several families share as published: text encoders, VAEs, the U-Net, and training schedules."""

from dataclasses import replace

from ..models import clip, qwen3, t5, unet, vae, vision
from ..models.build import Config
from .base import EMBEDDED, Beside, Careful, Defaults, Fast, Variant

CLIP_L = clip.Config(
    vocab=49408,
    positions=77,
    width=768,
    layers=12,
    heads=12,
    hidden=3072,
    act="quick_gelu",
    projection=None,
    eos=49407,
    eps=1e-5,
)
CLIP_STORYBOOK = replace(CLIP_L, vocab=1048, positions=40, width=128, layers=3, heads=4, hidden=512, eos=1047)
CLIP_H = replace(CLIP_L, width=1024, layers=23, heads=16, hidden=4096, act="gelu")
CLIP_G = replace(CLIP_H, width=1280, layers=32, heads=20, hidden=5120, projection=1280)
T5_XXL = t5.Config(
    vocab=32128,
    width=4096,
    layers=24,
    heads=64,
    head_dim=64,
    hidden=10240,
    buckets=32,
    max_distance=128,
    eps=1e-6,
)
CLIP_VIT_H = vision.Config(  # of IP-Adapters
    size=224,
    patch=14,
    width=1280,
    layers=32,
    heads=16,
    hidden=5120,
    act="gelu",
    projection=1024,
    class_token=True,
    eps=1e-5,
)
CLIP_VIT_BIGG = replace(CLIP_VIT_H, width=1664, layers=48, hidden=8192, projection=1280)
CLIP_VIT_L = replace(CLIP_VIT_H, width=1024, layers=24, hidden=4096, act="quick_gelu", projection=768)
SIGLIP = vision.Config(  # of Redux
    size=384,
    patch=14,
    width=1152,
    layers=27,
    heads=16,
    hidden=4304,
    act="gelu_tanh",
    projection=None,
    class_token=False,
    eps=1e-6,
)
VISION = {"CLIP ViT-H": CLIP_VIT_H, "CLIP ViT-bigG": CLIP_VIT_BIGG, "CLIP ViT-L": CLIP_VIT_L, "SigLIP so400m": SIGLIP}
QWEN3_4B = qwen3.Config(  # whole: a family says which of its layers are read
    vocab=151936,
    width=2560,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=9728,
    theta=1e6,
    eps=1e-6,
    taps=(36,),
)
QWEN3_8B = replace(QWEN3_4B, width=4096, hidden=12288)
VAE = vae.Config(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    channels=(128, 256, 512, 512),
    layers=2,
    groups=32,
    scale=0.18215,
    shift=0.0,
    quant_conv=True,
    post_quant_conv=True,
    mid_attention=True,
)
VAE_STORYBOOK = replace(VAE, latent_channels=8, channels=(16, 32, 64, 96), layers=1, groups=8)
VAE_FLOW = replace(VAE, latent_channels=16, quant_conv=False, post_quant_conv=False)
VAE_FLUX = replace(VAE_FLOW, scale=0.3611, shift=0.1159)  # FLUX.1's file, which Z-Image has too
PREVIEW_FLUX = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
    (-0.0329, -0.0718, -0.0851),
)

UNET = unet.Config(  # SD 1.x
    in_channels=4,
    out_channels=4,
    channels=(320, 640, 1280, 1280),
    layers=(2, 2, 2, 2),
    depth=((1, 1), (1, 1), (1, 1), ()),
    up_depth=((), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    mid_depth=1,
    heads=(8, 8, 8, 8),
    context=768,
    groups=32,
    eps=1e-5,
    linear_projection=False,
    time_cond=None,
    added_time=None,
    added=None,
    flip_sin_to_cos=True,
    freq_shift=0,
)
UNET_CAREFUL = Careful(
    whole=("time_embedding", "add_embedding", "time_emb_proj", "controlnet_down_blocks", "controlnet_mid_block")
)


def ip_adapter(file: str, size: float, tokens: int, net: unet.Config) -> Beside:
    """One of the IP-Adapters that their authors published; all that have a name here read what CLIP ViT-H gives."""
    place = {"repo": "h94/IP-Adapter", "file": f"{file}.safetensors"}
    return Beside("IP-Adapter", **place, licence="Apache 2.0", size=size, net=net, encoder=1.26, tokens=tokens)


def lcm(repo: str, size: float, net: unet.Config) -> Fast:
    """The LCM LoRA of a model (Luo et al. 2023)."""
    place = {"repo": f"latent-consistency/{repo}", "file": "pytorch_lora_weights.safetensors", "size": size}
    how = {"net": net, "guidance": 1.0, "sampler": "lcm", "schedule": "lcm"}
    return Fast("LCM LoRA", **place, licence="CreativeML OpenRAIL++-M", **how)


def hyper(file: str, size: float, net: Config, steps: int, **how: float | str) -> Fast:
    """One of the Hyper-SD LoRAs (Ren et al. 2024). Their authors declare no licence. how: if it is not DDIM without
    guidance."""
    place = {"repo": "ByteDance/Hyper-SD", "file": f"Hyper-{file}.safetensors", "size": size}
    how = {"sampler": "ddim"} | how
    return Fast("Hyper LoRA", **place, licence="none declared", net=net, steps=steps, **how)


def unet_activations(net: unet.Config, latents: int, tokens: int, gpu: bool) -> float:
    """Measured numbers per latent and channel of the first level: see `memory`. On a GPU they count the maps that wait
    for the way up, and the widest convolution with its norm and Winograd's two maps."""
    return (25 if gpu else 105) * net.channels[0] * latents


def unet_variants(defaults: Defaults) -> dict[str, Variant]:
    """The variants that differ in the U-Net's input channels, and the consistency model, which has a guidance input."""
    fast = replace(defaults, steps=4, guidance=8.0, sampler="lcm", schedule="lcm")
    return {
        "base": Variant(),
        "lcm": Variant(guidance=EMBEDDED, defaults=fast),
        "inpaint": Variant(beside=5, reads=("mask", "masked"), starts_at_1=False),
        "edit": Variant(beside=4, needs=("a picture to edit",), converts=False),
        "upscale": Variant(beside=3, needs=("a small picture",), converts=False),
        "depth": Variant(beside=1, needs=("a depth map",), converts=False),
    }


# The layers of transformers of two streams that a LoRA changes, as in diffusers' training scripts.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

# From the Stable Diffusion authors' v1-inference.yaml; spacing and offset are from the published diffusers folders.
DISCRETE = {
    "betas": "scaled_linear",
    "start": 0.00085,
    "end": 0.012,
    "steps": 1000,
    "zero_snr": False,
    "spacing": "leading",
    "offset": 1,
    "final_alpha_one": False,
    "sampler": None,
}
# Rectified flow as in SD3. spacing and ends come from diffusers' pipeline for the family, since no file has them.
FLOW = {"steps": 1000, "shift": 3.0, "dynamic": None, "spacing": "linspace", "ends": "linspace", "sampler": "euler"}
# A shift that grows with the picture, with diffusers' defaults: log shift is linear in the number of tokens.
DYNAMIC = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
# The same as Black Forest Labs measured it for FLUX.2: log shift is linear in the number of tokens, with one line for
# 10 steps and one for 200, and linear in the steps between and beyond them. With more than `tokens` the line of 200
# holds.
EMPIRICAL = {
    "slope_10": 8.73809524e-05,
    "shift_10": 1.89833333,
    "slope_200": 0.00016927,
    "shift_200": 0.45666666,
    "tokens": 4300,
}
