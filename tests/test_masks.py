"""Drawing a part of a picture anew, or more around it. References: the picture itself outside the mask, closed forms
for what becomes of a mask; diffusers for whole pictures (tests/parity/test_inpainting.py)."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageDraw

import mlxdiff
import mlxdiff.__main__
from mlxdiff import advice, description, guidance, images, memory, pictures, samplers, store
from mlxdiff.errors import Error
from mlxdiff.memory import Workload, peaks
from mlxdiff.recipe import recipe
from mlxdiff.request import Request

SIZE = (64, 64)
QUICK = {"seed": 3, "steps": 4, "width": 64, "height": 64}
PROMPT = "a red house under a full moon"


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    small = np.random.default_rng(1).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def mask(box: tuple[int, int, int, int] = (10, 12, 41, 43), size: tuple[int, int] = SIZE) -> Image.Image:
    """White in the box, whose right and bottom are in it."""
    drawn = Image.new("L", size)
    ImageDraw.Draw(drawn).rectangle(box, fill=255)
    return drawn


def differs(a: Image.Image, b: Image.Image) -> np.ndarray:
    """(H, W)"""
    return (np.asarray(a) != np.asarray(b)).any(-1)


@pytest.fixture(scope="module")
def pipe() -> mlxdiff.Pipeline:
    return mlxdiff.load("storybook", dtype="float32")


# ---- pictures of the built-in model


@pytest.mark.parametrize(
    "sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "unipc", "pndm", "ddim"]
)
def test_what_is_masked_changes_and_nothing_else_does(pipe, sampler):
    drawn = pipe(PROMPT, image=picture(), mask=mask(), sampler=sampler, strength=0.8, **QUICK).image
    changed, inside = differs(drawn, picture()), np.asarray(mask()) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.9


def test_without_pasting_the_rest_is_the_vaes_and_no_prompt_moves_it(pipe):
    """The same latents outside, and a decoder that looks a few latents far."""
    far = np.asarray(mask((0, 0, 57, 57))) == 0
    draw = lambda prompt: pipe(prompt, image=picture(), mask=mask((0, 0, 7, 7)), keep=False, **QUICK).image  # noqa: E731
    one, other = draw(PROMPT), draw("a green cactus in the desert at night")
    assert differs(one, picture())[far].any()
    apart = np.abs(np.asarray(one, int) - np.asarray(other, int))
    # 0.05 and 1.8: the decoder's attention sees the whole picture, and there is one latent to draw.
    assert apart[far].mean() < 0.1 * apart[:8, :8].mean()
    assert apart[:8, :8].mean() > 1


def test_a_soft_edge(pipe):
    """Beyond the blur's reach nothing changes; within it the picture mixes, more and more."""
    drawn = pipe(PROMPT, image=picture(), mask=mask((32, 0, 63, 63)), mask_blur=3, strength=1.0, **QUICK).image
    soft = np.asarray(mask((32, 0, 63, 63)).filter(pictures.ImageFilter.GaussianBlur(3)))
    assert 0 < soft[0, 28] < 255
    changed = differs(drawn, picture())
    assert not changed[soft == 0].any()
    assert changed[(soft > 0) & (soft < 128)].any()


def test_a_crop_changes_what_is_masked_of_the_whole_picture(pipe):
    """Of a large picture: the part around the mask is drawn at the model's size."""
    whole, hole = picture((300, 200)), mask((200, 90, 239, 129), (300, 200))
    drawn = pipe(PROMPT, image=whole, mask=hole, mask_crop=16, seed=3, steps=2, strength=1.0).image
    assert drawn.size == (300, 200)
    inside = np.asarray(hole) > 0
    assert not differs(drawn, whole)[~inside].any()
    assert differs(drawn, whole)[inside].mean() > 0.9
    loose = pipe(PROMPT, image=whole, mask=hole, mask_crop=16, keep=False, seed=3, steps=2, strength=1.0)
    assert differs(loose.image, whole)[85:90, 195:240].any()  # the padding is drawn too


def test_outpainting(pipe):
    result = pipe(PROMPT, image=picture(), outpaint=(32, 0, 16, 8), seed=3, steps=2)
    assert (result.image.size, result.request.strength) == ((112, 72), 0.8)
    assert np.array_equal(np.asarray(result.image)[:64, 32:96], np.asarray(picture()))
    assert np.asarray(result.image)[:, :32].std() > 0
    both = pipe(PROMPT, image=picture(), outpaint=(32, 0, 0, 0), mask=mask((0, 0, 15, 63)), seed=3, steps=2).image
    inside = np.pad(np.asarray(mask((0, 0, 15, 63))), ((0, 0), (32, 0)), constant_values=255) > 0
    padded = Image.fromarray(np.pad(np.asarray(picture()), ((0, 0), (32, 0), (0, 0))))
    assert np.array_equal(np.asarray(both)[~inside], np.asarray(padded)[~inside])
    assert differs(both, padded)[inside].mean() > 0.9


def test_the_size_with_what_is_added():
    """An edge that is given holds what is added to it; the other follows."""
    sized = lambda **given: (r := Request("x", **given).sized((300, 200), 128**2, 8)) and (r.width, r.height)  # noqa: E731
    assert sized() == (160, 104)
    assert sized(outpaint=(64, 0, 8, 16)) == (160 + 72, 104 + 16)
    assert sized(outpaint=(64, 0, 8, 16), width=232) == (232, 120)  # 160 x 104 of it the picture's, as 300 x 200 rounds
    with pytest.raises(Error, match="leaves no place for the image in width 72"):
        sized(outpaint=(64, 0, 8, 0), width=72)


def test_batch_low_memory_and_replay(pipe, tmp_path):
    picture().save(tmp_path / "a.png")
    mask().save(tmp_path / "hole.png")
    files = {"image": tmp_path / "a.png", "mask": str(tmp_path / "hole.png")}
    settings = QUICK | files | {"sampler": "euler_ancestral"}
    batch = pipe(PROMPT, count=2, **settings)
    alone = pipe(PROMPT, **settings | {"seed": 4})
    assert np.abs(np.asarray(batch.images[1], int) - np.asarray(alone.image, int)).max() <= 1
    small = mlxdiff.load("storybook", dtype="float32", low_memory=True)(PROMPT, **settings | {"seed": 4})
    assert np.abs(np.asarray(small.image, int) - np.asarray(alone.image, int)).max() <= 1
    request, _ = images.read_settings(alone.save(tmp_path / "out.png")[0])
    assert np.array_equal(np.asarray(pipe(request).image), np.asarray(alone.image))
    other = pipe.resolve(request, mask=mask((0, 0, 31, 31)))  # another mask that is meant
    assert other.mask_hash != request.mask_hash
    mask((0, 0, 31, 31)).save(tmp_path / "hole.png")
    with pytest.raises(Error, match="The mask is not the one that these settings name"):
        pipe.resolve(request)
    shown, _ = images.read_settings(pipe(other).save(tmp_path / "b.png")[0])
    assert shown.mask is None
    with pytest.raises(Error, match="These settings need a mask, and none was given"):
        pipe.resolve(shown)


def test_through_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cut = picture().convert("RGBA")
    cut.putalpha(Image.eval(mask(), lambda v: 255 - v))
    cut.save("cut.png")
    typed = ["generate", PROMPT, "-s", "3", "--steps", "2", "-i", "cut.png", "--mask", "alpha", "--mask-blur", "2"]
    assert mlxdiff.__main__.main([*typed, "-o", "a.png"]) == 0
    changed = differs(Image.open("a.png"), Image.open("cut.png").convert("RGB"))
    assert changed[12:44, 10:42].mean() > 0.9
    assert not changed[:, 60:].any()
    assert mlxdiff.__main__.main(["generate", "--from-image", "a.png", "-o", "b.png"]) == 0
    assert not differs(Image.open("a.png"), Image.open("b.png")).any()
    wider = ["generate", PROMPT, "-s", "3", "--steps", "2", "-i", "a.png", "--outpaint", "16", "0", "8", "0"]
    assert mlxdiff.__main__.main([*wider, "-o", "c.png"]) == 0
    assert Image.open("c.png").size == (88, 64)
    assert not differs(Image.open("c.png").crop((16, 0, 80, 64)), Image.open("a.png")).any()
    capsys.readouterr()


# ---- closed forms


def test_the_sampler_sees_the_picture_outside():
    """x0 outside is z in every call, x there is z with the run's noise at each sigma below the first, and the end is
    z."""
    hole, z, noise = mx.array([[[[1.0], [0.0]]]]), mx.full((1, 1, 2, 1), 3.0), mx.full((1, 1, 2, 1), -1.0)
    seen = []

    def denoise(x, sigma):
        seen.append((sigma, x[0, 0, 1, 0].item()))
        return mx.full(x.shape, 7.0)

    masked = guidance.masked(denoise, hole, z, lambda s: z + s * noise, first=4.0)
    *_, (x, x0) = samplers.heun(masked, 100 + 4.0 * noise, [4.0, 2.0, 1.0, 0.0])
    assert seen == [(4.0, 96.0), (2.0, 1.0), (2.0, 1.0), (1.0, 2.0), (1.0, 2.0)]
    assert x.reshape(-1).tolist() == x0.reshape(-1).tolist() == [7.0, 3.0]


def test_a_network_reads_what_is_beside_its_latents():
    """Neither scaled nor noised, in both halves of a guided step."""
    schedule, seen = description.published("sd15", recipe(None, "float32")), []
    levels = schedule.noise_levels(schedule.fill(Request("x")))

    def net(x, t):
        seen.append(np.array(x))
        return x[..., :4]

    beside = mx.array(np.random.default_rng(2).normal(size=(1, 2, 2, 5)).astype(np.float32))
    options = {"beside": beside, "both": {}, "scale": 3.0, "dtype": mx.float32}
    denoise = guidance.denoiser(net, levels, "eps", {}, **options)
    x = mx.ones((1, 2, 2, 4))
    assert denoise(x, 3.0).shape == x.shape
    assert seen[0].shape == (2, 2, 2, 9)
    assert np.array_equal(seen[0][..., 4:], np.concatenate([np.array(beside)] * 2))
    assert np.allclose(seen[0][..., :4], 10**-0.5)


def test_a_mask_as_latents_and_as_tiles():
    """Of a latent the first pixel, and all of its pixels row by row; grey counts from one half on."""
    grey = np.zeros((16, 24), np.uint8)
    grey[8:, 8:16] = 128
    grey[0, 1] = 255
    grey[:8, 16:] = 127
    canvas = pictures.Canvas(picture((24, 16)), Image.fromarray(grey))
    assert canvas.latents(8)[0, ..., 0].tolist() == [[0, 0, 0], [0, 1, 0]]
    tiles = canvas.tiles(8)
    assert tiles.shape == (1, 2, 3, 64)
    assert tiles.sum(-1)[0].tolist() == [[1, 0, 0], [0, 64, 0]]
    assert tiles[0, 0, 0, 1] == 1
    masked = canvas.pixels["masked"]
    assert (masked[8:, 8:16] == 0).all()
    assert np.array_equal(masked[:, :1], images.to_pixels(picture((24, 16)))[:, :1])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_mask_of_any_kind_is_the_same_mask(tmp_path, mode):
    """Strokes on a transparent ground too, whose ground is black."""
    drawn = mask().convert("RGBA" if mode == "LA" else "L" if mode == "I;16" else mode)
    if mode == "I;16":
        drawn = Image.fromarray(np.asarray(mask()).astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        drawn = Image.new("RGBA", SIZE, "white")
        drawn.putalpha(mask())
        drawn = drawn.convert(mode)
    drawn.save(tmp_path / "hole.png")
    taken = pictures.read(Request("x", image=picture(), mask=tmp_path / "hole.png"))
    assert np.array_equal(np.asarray(taken.mask), np.asarray(mask()))


@pytest.mark.parametrize("name", ["flux-fill", "flux-depth", "sdxl-inpaint"])
def test_what_the_vae_encodes_is_counted(name):
    """Also where the pictures are not named yet; then the VAE stays, and with low_memory it does not."""
    model = description.published(name, recipe(None, "float16"))
    bare, vae = Workload(model, model.fill(Request("x"))), memory._weights(model, "vae").held
    named = Workload(model, model.fill(Request("x", image="a.png", mask="b.png"), [(1024, 1024)]))
    assert peaks(bare, gpu=True) == peaks(named, gpu=True)
    plain = replace(model, family=replace(model.family, variants={model.variant: replace(model.row, reads=())}))
    assert peaks(bare, True).denoise - peaks(replace(bare, model=plain), True).denoise == vae
    low = peaks(bare.but(low_memory=True), True), peaks(replace(bare, model=plain).but(low_memory=True), True)
    assert low[0].denoise == low[1].denoise


@pytest.mark.parametrize(
    ("box", "size", "pad", "want"),
    [
        ((50, 20, 65, 29), (40, 24), 1, (48, 19, 68, 31)),  # widened to both sides
        ((90, 20, 99, 29), (40, 20), 0, (80, 20, 100, 30)),  # shifted inside
        ((0, 0, 9, 29), (20, 20), 5, (0, 0, 35, 35)),
        ((10, 10, 89, 49), (64, 64), 0, (10, 0, 90, 60)),  # as far as the picture goes
        ((0, 0, 99, 59), (64, 64), 8, (0, 0, 100, 60)),
    ],
)
def test_the_box_of_a_crop(box, size, pad, want):
    assert pictures.crop_box(mask(box, (100, 60)), size, pad) == want


@pytest.mark.parametrize("how", [{"mask_crop": 3}, {}])
def test_a_control_lies_where_the_picture_lies(how):
    """The picture itself as a control reaches its network as the start image does, also at another size than that."""
    taken = pictures.Taken([picture((100, 60))], mask((50, 20, 65, 29), (100, 60)))
    request = Request("x", image=taken.images[0], mask=taken.mask, width=64, height=64, **how)
    laid = pictures.canvas(request, taken).image
    assert np.array_equal(np.asarray(pictures.control(request, taken, taken.images[0])), np.asarray(laid))
    larger = pictures.control(request, taken, picture((300, 180)))
    assert np.abs(np.asarray(larger, int) - np.asarray(laid, int)).mean() < 2  # of smooth colours


DRAWS = {
    "nothing": ("sd15", {}, ("noise",)),
    "a picture": ("sd15", {"image": "a"}, ("image", "noise")),
    "a mask": ("sd15", {"image": "a", "mask": "m", "strength": 1.0}, ("image", "noise", "masked")),
    "9 channels at 1": ("sd15-inpaint", {"image": "a", "mask": "m", "strength": 1.0}, ("noise", "masked")),
    "9 channels below": ("sdxl-inpaint", {"image": "a", "mask": "m", "strength": 0.9}, ("image", "noise", "masked")),
    "Fill": ("flux-fill", {"image": "a", "outpaint": (8, 0, 0, 0), "strength": 1.0}, ("image", "noise", "masked")),
    "an edit": ("flux-kontext", {"image": "a"}, ("noise",)),
    "a control": ("flux-depth", {}, ("control", "noise")),
    "a control and a mask": (
        "flux-canny",
        {"image": "a", "mask": "m", "strength": 1.0},
        ("masked", "control", "image", "noise"),
    ),
}


@pytest.mark.parametrize("case", DRAWS)
def test_the_order_of_a_seeds_draws(case):
    """As diffusers' pipelines draw."""
    name, settings, want = DRAWS[case]
    assert pictures.draws(description.published(name, recipe(None, "float32")).row, Request("x", **settings)) == want


# ---- what cannot be drawn is one line, before the work and before a download


@pytest.fixture
def no_network(monkeypatch):
    def reached(*_, **__):
        raise AssertionError("The network was asked.")

    monkeypatch.setattr(store, "_from_hub", reached)
    monkeypatch.setattr(advice, "this_machine", lambda: advice.Machine(10**12, 10**12, False))


START, HOLE = {"image": picture()}, {"image": picture(), "mask": mask()}
BAD = {
    "a mask of nothing": ({"mask": mask()}, "A mask needs a start image"),
    "more around nothing": ({"outpaint": (8, 0, 0, 0)}, "outpaint needs a start image"),
    "another shape": (START | {"mask": mask(size=(64, 32))}, "another shape than its picture: 64 x 32 and 64 x 64"),
    "all black": (START | {"mask": Image.new("L", SIZE)}, "black, or too thin"),
    "a thin line": (START | {"mask": mask((3, 0, 4, 63))}, "black, or too thin"),
    "black, cropped": (START | {"mask": Image.new("L", SIZE), "mask_crop": 4}, "black, or too thin"),
    "no picture at all": (START | {"mask": 5}, "The mask is int, not a picture"),
    "not there": (START | {"mask": "nowhere.png"}, "no picture at nowhere.png"),
    "of 32 bits": (START | {"mask": Image.new("F", SIZE, 1.0)}, "more than 16 bits"),
    "opaque": (START | {"mask": "alpha"}, "no transparent part"),
    "negative": (START | {"outpaint": (8, 0, -8, 0)}, "Outpaint must be a whole number from 0"),
    "no multiple": (START | {"outpaint": (8, 0, 9, 0)}, "adds 9 pixels, which is not a multiple of 8"),
    "too wide": (START | {"outpaint": (16384, 0, 0, 0)}, "Width must be a whole number"),
    "one side": (START | {"outpaint": 8}, "outpaint 8 is not four numbers"),
    "three sides": (START | {"outpaint": (8, 8, 8)}, "is not four numbers"),
    "no place": (START | {"outpaint": (64, 0, 0, 0), "width": 64}, "no place for the image in width 64"),
    "blur of nothing": (START | {"mask_blur": 2}, "mask_blur has no meaning without a mask"),
    "crop of nothing": (START | {"mask_crop": 2}, "mask_crop has no meaning without a mask"),
    "kept from nothing": (START | {"keep": False}, "keep has no meaning without a mask"),
    "a crop and more": (HOLE | {"mask_crop": 4, "outpaint": (8, 0, 0, 0)}, "draws a part, outpaint adds"),
    "blur below 0": (HOLE | {"mask_blur": -1}, "mask_blur must be a number from 0"),
    "half a pixel": (HOLE | {"mask_crop": 0.5}, "mask_crop must be a whole number"),
    "keep maybe": (HOLE | {"keep": "yes"}, "keep 'yes' is neither true nor false"),
    "strength 0": (HOLE | {"strength": 0.0}, "leaves no step"),
}
NAMED = {
    "nothing to fill": ("flux-fill", {}, "flux-fill draws a part of a picture anew: it needs a picture and a mask"),
    "no mask": ("sd15-inpaint", START, "sd15-inpaint draws a part of a picture anew"),
    "all white": ("sdxl-inpaint", START | {"mask": Image.new("L", SIZE, 255)}, "would see nothing of the picture"),
    "an edit": ("flux-kontext", HOLE, "flux-kontext edits: it takes no mask"),
    "more around an edit": ("flux2-klein", START | {"outpaint": (16, 0, 0, 0)}, "flux2-klein edits: it takes no mask"),
    "no control": ("flux-depth", {}, "flux-depth reads one control picture; none was given"),
    "two controls": ("flux-canny", {"controls": [picture()] * 2}, "reads one control picture; 2 were given"),
    "a scale": ("flux-depth", {"controls": [(picture(), 0.5)]}, "reads its control picture as it is"),
    "a control for none": ("flux-dev", {"controls": [picture()]}, "flux-dev itself reads no control picture"),
    "black": ("sdxl", START | {"mask": Image.new("L", SIZE)}, "black, or too thin"),
    "a size": ("flux-fill", HOLE | {"outpaint": (8, 0, 0, 0)}, "adds 8 pixels, which is not a multiple of 16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_masks(pipe, case):
    settings, says = BAD[case]
    with pytest.raises(Error, match=says) as e:
        pipe.resolve(PROMPT, **settings)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("case", NAMED)
def test_bad_masks_before_the_network_is_asked(no_network, case):
    name, settings, says = NAMED[case]
    with pytest.raises(Error, match=says):
        mlxdiff.load(name, request=Request(PROMPT, **settings))


def test_what_is_right_goes_on_to_the_network(no_network):
    for name in ("flux-fill", "sd15-inpaint", "sd15", "z-image"):
        with pytest.raises(AssertionError, match="network was asked"):
            mlxdiff.load(name, request=Request(PROMPT, **HOLE))


def test_a_model_for_inpainting_has_no_refiner_and_is_none():
    plain, inpaint = (description.published(name, recipe(None, "float32")) for name in ("sdxl", "sdxl-inpaint"))
    for one, other in ((plain, inpaint), (inpaint, plain)):
        with pytest.raises(Error, match="reads pictures beside the latents"):
            one.check_refiner(other)


def test_the_command_line_spells_the_fix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    for typed, says in (
        (["--mask", "a.png"], "Give it as -i FILE"),
        (["-i", "a.png", "--no-keep"], "Leave --no-keep out, or add a mask"),
        (["-i", "a.png", "--mask", "alpha"], "Give a mask as --mask FILE"),
    ):
        assert mlxdiff.__main__.main(["generate", PROMPT, *typed]) == 1
        said = capsys.readouterr().err
        assert says in said
        assert len(said.splitlines()) == 1


def test_the_defaults_of_strength(pipe):
    full = lambda name, **how: description.published(name, recipe(None, "float32")).fill(Request("x", **how))  # noqa: E731
    begins = {"image": "a.png", "mask": "b.png"}
    assert [full(name, **begins).strength for name in ("sd15", "sd15-inpaint", "flux-fill")] == [0.6, 1.0, 1.0]
    assert replace(full("flux-fill", **begins), mask=None).guidance == 30
    assert pipe.resolve(PROMPT, **HOLE).strength == 0.6
