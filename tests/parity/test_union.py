"""The union ControlNet of SDXL against diffusers on the same random weights: residuals (1e-4, float32 in another
order) and pictures (40 dB as for whole pipelines)."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

import mlxdiff
from mlxdiff import convert
from mlxdiff.errors import Error
from mlxdiff.models.controlnet import MODES

from . import tiny
from .oracle import error, nchw, nhwc, randomize
from .test_controlnet import CFG, HINT, drawn, picture
from .test_pipelines import DB, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")


def union(net, seed: int, tasks: int = 6) -> ControlNetUnionModel:
    """For a U-Net. Its layers that begin as zeros count, and so does what each kind of picture adds."""
    width = net.config.block_out_channels[0]
    names = ("block_out_channels", "down_block_types", "cross_attention_dim", "attention_head_dim", "norm_num_groups")
    names += ("layers_per_block", "use_linear_projection", "transformer_layers_per_block", "addition_embed_type")
    names += ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    made = ControlNetUnionModel(
        **{name: net.config[name] for name in names}, conditioning_embedding_out_channels=HINT,
        num_control_type=tasks, num_trans_channel=width, num_proj_channel=width, num_trans_head=4,
    )  # fmt: skip
    made = randomize(made, seed)
    torch.nn.init.normal_(made.task_embedding, std=2)
    return tiny.louder(made, 4, ("cond_embedding.blocks", "cond_embedding.conv_in.weight"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple:
    """(diffusers pipeline without control, our pipeline, the union, its folder); of shapes that show their heads and
    groups, since no config.json does."""
    root = tmp_path_factory.mktemp("union")
    theirs = tiny.sdxl(root / "words")
    torch.manual_seed(7)
    net = UNet2DConditionModel(
        norm_num_groups=32, layers_per_block=1, sample_size=8, cross_attention_dim=80, attention_head_dim=(1, 1),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=40 + 6 * 256, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(32, 64),
    )  # fmt: skip
    theirs.register_modules(unet=tiny.stir(net, 7))
    theirs.save_pretrained(root / "model")
    made = union(net, 1)
    made.save_pretrained(root / "union")
    return theirs, mlxdiff.load(root / "model", dtype="float32"), made, root / "union"


def guided(theirs, net, **settings) -> np.ndarray:
    pipe = StableDiffusionXLControlNetUnionPipeline(**theirs.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return oracle(pipe, **(CFG | settings))


@pytest.mark.parametrize("tasks", [[3], [1, 4]])
def test_residuals_equal_diffusers(model, tasks):
    _, _, theirs, folder = model
    (ours,) = convert.read(folder, mx.float32).values()
    g = np.random.default_rng(1)
    x, pixels = g.standard_normal((1, 4, 6, 10), np.float32), g.random((2, 1, 3, 24, 40), np.float32)
    cond = {"context": g.standard_normal((1, 7, 80), np.float32), "pooled": g.standard_normal((1, 40), np.float32)}
    cond["time_ids"] = g.integers(0, 1024, (1, 6)).astype(np.float32)
    pictures, scales = pixels[: len(tasks)], [0.7, 1.2][: len(tasks)]
    down, mid = theirs(
        torch.tensor(x), torch.tensor(481.0), torch.tensor(cond["context"]), [torch.tensor(p) for p in pictures],
        torch.tensor([[float(i in tasks) for i in range(6)]]), tasks, scales, return_dict=False,
        added_cond_kwargs={"text_embeds": torch.tensor(cond["pooled"]), "time_ids": torch.tensor(cond["time_ids"])},
    )  # fmt: skip
    one = len(tasks) == 1
    hint = ours.hints([nhwc(p) for p in pictures], tasks, [1.0] if one else scales)
    told = ours.prepare(None, **{k: mx.array(v) for k, v in cond.items()}, emphasis=ours.emphasis(tasks))
    for a, b in zip(ours(nhwc(x), 481.0, **told, hint=hint), [*down, mid], strict=True):
        assert error(nchw(a) * (scales[0] if one else 1), b.numpy()) < 1e-4


def test_one_picture_and_two_draw_as_in_diffusers(model):
    theirs, ours, net, folder = model
    one = guided(theirs, net, control_image=[picture(1)], control_mode=[3], controlnet_conditioning_scale=0.7)
    assert psnr(drawn(ours, (f"{folder}:canny", picture(1), 0.7)), one) > DB
    assert psnr(drawn(ours), one) < DB - 10
    assert psnr(drawn(ours, (f"{folder}:depth", picture(1), 0.7)), one) < DB - 5  # the kind counts
    two = guided(theirs, net, control_image=[picture(1), picture(2)], control_mode=[3, 0],
                 controlnet_conditioning_scale=[0.7, 1.2])  # fmt: skip
    controls = [(f"{folder}:lineart", picture(1), 0.7), (f"{folder}:openpose", picture(2), 1.2)]
    assert psnr(drawn(ours, *controls), two) > DB
    assert psnr(one, two) < DB - 10


def test_the_masked_start_image_guides(model, tmp_path):
    """The union of eight kinds inpaints: what the mask marks is black."""
    theirs, ours, _, _ = model
    net = union(theirs.unet, 2, tasks=8)
    net.save_pretrained(tmp_path / "promax")
    hole = Image.new("L", (40, 24))
    hole.paste(255, (10, 4, 31, 19))
    shown = picture(4)
    shown.paste((0, 0, 0), mask=hole)
    pipe = StableDiffusionXLControlNetUnionInpaintPipeline(**theirs.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    given = {"image": picture(4), "mask_image": hole, "strength": 1.0, "original_size": (24, 40)}
    want = oracle(pipe, **given, control_image=[shown], control_mode=[7], **CFG)
    masked = {"image": picture(4), "mask": hole, "keep": False}
    assert psnr(drawn(ours, (f"{tmp_path / 'promax'}:inpaint", "masked"), **masked), want) > DB
    other = drawn(ours, (f"{tmp_path / 'promax'}:inpaint", picture(4)), **masked, strength=1.0)
    assert psnr(other, want) < DB - 10
    with pytest.raises(Error, match=r"promax was not made to inpaint"):
        drawn(ours, (f"{tmp_path / 'promax'}:tile", "masked"), **masked)


def test_a_batch_and_low_memory_draw_the_same(model):
    """In diffusers the pictures of a batch mix."""
    _, ours, _, folder = model
    control = (f"{folder}:canny", picture(1))
    whole = drawn(ours, control)
    settings = {"steps": 2, "guidance": 5.0, "negative": "blurry moon", "width": 40, "height": 24}
    batch = ours("a red fox in the snow, highly detailed", seed=10, count=2, controls=[control], **settings).images
    assert psnr(np.asarray(batch[1]), whole) > 50
    ours.low_memory = True
    try:
        assert psnr(drawn(ours, control), whole) > 50
    finally:
        ours.low_memory = False


def test_the_kind_of_picture_must_be_known(model):
    _, ours, _, folder = model
    for name, says in (
        (str(folder), "which kind of picture it reads; no kind was given. Name one of openpose, depth, "),
        (f"{folder}:tile", "'tile' was given"),  # only eight kinds have it
        (f"{folder}:9", "'9' was given"),
    ):
        with pytest.raises(Error, match=says):
            drawn(ours, (name, picture(1)))
    assert MODES.index("tile") == 6
