"""Tiny random pipelines of diffusers and transformers, saved as they save themselves: the oracles of this folder.
Widths, heads and layer counts are odd on purpose; every random weight is large enough that a mistake shows."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import mlxdiff
from tests import clip_vocab, qwen_vocab, t5_vocab

from .oracle import randomize


def saved(root: Path, kinds: dict) -> dict:
    """name -> (diffusers pipeline, our pipeline), for name -> what makes the first with its vocabularies in a
    folder."""
    pairs = {}
    for name, make in kinds.items():
        theirs = make(root / f"{name}-words")
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(root / name)
        pairs[name] = theirs, mlxdiff.load(root / name, dtype="float32")
    return pairs


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stir(module: torch.nn.Module, seed: int, listen: float = 1.0) -> torch.nn.Module:
    """Biases and norm weights away from 0 and 1, where a swapped or dropped one would go unseen; text that counts
    (`listen` scales cross-attention): with fresh weights another prompt would change the picture by 40 dB only."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
        elif isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
            parameter.data *= 4
        elif "attn2" in name:
            parameter.data *= listen
    return module.eval()


def tokenizer(folder: Path, pad: str | None = None) -> CLIPTokenizer:
    clip_vocab.write(folder, clip_vocab.trained(150))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, **({} if pad is None else {"pad_token": pad}))


def text_encoder(tok: CLIPTokenizer, seed: int, width: int, act: str = "quick_gelu", projection: int | None = None):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tok), hidden_size=width, intermediate_size=2 * width + 8, num_hidden_layers=3,
        num_attention_heads=width // 16, hidden_act=act, projection_dim=projection or width,
        bos_token_id=len(tok) - 2, eos_token_id=len(tok) - 1, pad_token_id=1,
    )  # fmt: skip
    return stir((CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), seed)


def unet(seed: int, listen: float, **config) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return stir(UNet2DConditionModel(norm_num_groups=8, layers_per_block=1, sample_size=8, **config), seed, listen)


def vae(seed: int, scale: float = 0.18215, channels: int = 4, **config) -> AutoencoderKL:
    torch.manual_seed(seed)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 24),
    }
    blocks |= {"norm_num_groups": 4, "latent_channels": channels, "scaling_factor": scale, "sample_size": 32}
    return stir(AutoencoderKL(**blocks, **config), seed)


CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (24, 40),
}
BARE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def sd1(folder: Path) -> StableDiffusionPipeline:
    tok = tokenizer(folder / "words")
    net = unet(1, 5, cross_attention_dim=48, attention_head_dim=(3, 5), **CROSS)  # in SD 1.x files this counts heads
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(vae(2), text_encoder(tok, 3, 48), tok, net, scheduler, **BARE)


def sd2(folder: Path) -> StableDiffusionPipeline:
    tok = tokenizer(folder / "words", pad="!")
    net = unet(4, 4, cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True, **CROSS)
    scheduler = DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    return StableDiffusionPipeline(vae(5), text_encoder(tok, 6, 32, "gelu"), tok, net, scheduler, **BARE)


def sdxl(folder: Path) -> StableDiffusionXLPipeline:
    tok, tok2 = tokenizer(folder / "words"), tokenizer(folder / "words2", pad="!")
    net = unet(
        7, 1, cross_attention_dim=80, attention_head_dim=(3, 5), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(24, 40),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae(8, 0.13025), text_encoder(tok, 9, 32), text_encoder(tok2, 10, 48, "gelu", 40), tok, tok2, net,
        EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1), add_watermarker=False,
    )  # fmt: skip


def refiner(folder: Path, base: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    net = unet(
        11, 1, cross_attention_dim=48, attention_head_dim=(3, 5), use_linear_projection=True,
        transformer_layers_per_block=2, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 5 * 8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(24, 40),
    )  # fmt: skip
    return StableDiffusionXLImg2ImgPipeline(
        base.vae, None, base.text_encoder_2, None, base.tokenizer_2, net, EulerDiscreteScheduler(
            **BETAS, timestep_spacing="leading", steps_offset=1
        ), requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip


# ---- rectified flow: transformers, VAEs of 16 channels, T5

PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False}


def t5_tokenizer(folder: Path) -> T5Tokenizer:
    t5_vocab.write(folder)
    return T5Tokenizer.from_pretrained(folder)


def t5(tok: T5Tokenizer, seed: int, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tok), d_model=width, d_kv=12, d_ff=2 * width, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return louder(randomize(T5EncoderModel(config), seed), 3, (".q.", "shared"))


def louder(module: torch.nn.Module, factor: float, names: tuple[str, ...]) -> torch.nn.Module:
    """Some weights larger: the few words among hundreds of padding tokens would else change the picture by 40 dB."""
    for name, parameter in module.named_parameters():
        if any(n in name for n in names):
            parameter.mul_(factor)
    return module


def sd3(folder: Path, kind: str = "medium", dim: int = 12, width: int = 88) -> StableDiffusion3Pipeline:
    """medium: plain, as SD 3; "3.5": dual attention and query and key norms. dim: of a head. width: of the text."""
    words, words2, words3 = tokenizer(folder / "1"), tokenizer(folder / "2", pad="!"), t5_tokenizer(folder / "3")
    new = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} if kind == "3.5" else {}
    net = SD3Transformer2DModel(
        sample_size=16, in_channels=16, num_layers=3, attention_head_dim=dim, num_attention_heads=3,
        joint_attention_dim=width, caption_projection_dim=3 * dim, pooled_projection_dim=64, pos_embed_max_size=9,
        **new,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        randomize(net, 21), FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(22, 1.5305, 16, shift_factor=0.0609, **PLAIN),
        text_encoder(words, 23, 32, projection=24), words, text_encoder(words2, 24, 48, "gelu", 40), words2,
        t5(words3, 25, width), words3,
    )  # fmt: skip


def flux(folder: Path, kind: str = "dev", axes: tuple = (4, 6, 10), width: int = 36) -> FluxPipeline:
    words, words2 = tokenizer(folder / "1"), t5_tokenizer(folder / "2")
    net = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=sum(axes), num_attention_heads=3,
        joint_attention_dim=width, pooled_projection_dim=32, guidance_embeds=kind == "dev", axes_dims_rope=axes,
    )  # fmt: skip
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if kind == "dev" else {"shift": 1.0}
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(**shift), vae(31, 0.3611, 16, shift_factor=0.1159, **PLAIN),
        text_encoder(words, 32, 32), words, t5(words2, 33, width), words2,
        louder(randomize(net, 34), 4, ("context_embedder.weight",)),
    )  # fmt: skip


# ---- Qwen3

# Of the published template, what it does with one message of a user.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    tok = Qwen2Tokenizer.from_pretrained(qwen_vocab.write(folder))
    tok.chat_template = TEMPLATE
    return tok


def qwen3(tok: Qwen2Tokenizer, seed: int, width: int, layers: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(tok), hidden_size=width, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, intermediate_size=2 * width + 4, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    return randomize(Qwen3Model(config), seed)


def zimage(folder: Path, kind: str = "turbo", axes: tuple = (4, 6, 6), width: int = 36) -> ZImagePipeline:
    words = qwen_tokenizer(folder / "words")
    net = ZImageTransformer2DModel(
        dim=3 * sum(axes), n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=width,
        axes_dims=list(axes), axes_lens=[1024, 64, 64],
    )  # fmt: skip
    net = louder(randomize(net, 44), 3, ("attention_norm2", "final_layer.2-1.linear"))
    for token in (net.x_pad_token, net.cap_pad_token):
        torch.nn.init.normal_(token)
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0 if kind == "turbo" else 6.0),
        vae(41, 0.3611, 16, shift_factor=0.1159, **PLAIN), qwen3(words, 42, width, 3), words, net,
    )  # fmt: skip
