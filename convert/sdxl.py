"""Stable Diffusion XL and its refiner in one file."""

from .sd import DROPPED, UNET, VAE, Family

SDXL = Family(
    table=[
        *DROPPED,
        UNET,
        VAE,
        (r"^conditioner\.embedders\.0\.transformer\.", "text_encoder."),
        (r"^conditioner\.embedders\.1\.model\.(transformer\.(?=text_model\.))?", "text_encoder_2."),
    ],
    components=("text_encoder", "text_encoder_2", "unet", "vae"),
    acts={"text_encoder": "quick_gelu", "text_encoder_2": "gelu"},
    pads={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
    scale=0.13025,
    sizes=6,  # height, width, crop top and left, target height and width
    zero_negative=True,
)

REFINER = Family(
    table=[*DROPPED, UNET, VAE, (r"^conditioner\.embedders\.0\.model\.", "text_encoder_2.")],
    components=("text_encoder_2", "unet", "vae"),
    acts={"text_encoder_2": "gelu"},
    pads={"tokenizer_2": "!"},
    scale=0.13025,
    sizes=5,  # height, width, crop top and left, aesthetic score
)
