"""FLUX.2 against diffusers' Flux2Transformer2DModel with the same random weights, at odd head counts, depths, axes and
sizes; its schedule against the scheduler as the pipeline runs it."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from mlx.utils import tree_flatten

from mlxdiff import schedules
from mlxdiff.families import FAMILIES
from mlxdiff.models import flux2

from ..checkpoints import manifest
from .bfl import from_diffusers
from .oracle import error, give, nchw, nhwc, quieten, randomize

KLEIN = flux2.Config(
    in_channels=20,
    out_channels=20,
    context=26,
    width=60,
    heads=3,
    hidden=180,
    double=2,
    single=3,
    axes=(4, 6, 8, 2),
    theta=2000.0,
    guidance=False,
)
CASES = {
    "klein": KLEIN,
    "dev": replace(KLEIN, guidance=True, width=80, hidden=240, heads=5, axes=(2, 8, 2, 4), double=3, single=1),
    "double": replace(KLEIN, width=24, hidden=72, heads=1, axes=(6, 6, 6, 6), double=1, single=0),
    "single": replace(KLEIN, width=56, hidden=168, heads=7, axes=(2, 2, 2, 2), double=0, single=1),
}
REFERENCES = {"none": (), "one": ((3, 4),), "two": ((2, 5), (7, 1))}


def pair(config: flux2.Config, seed: int):
    theirs = Flux2Transformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.double,
        num_single_layers=config.single,
        attention_head_dim=config.width // config.heads,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        guidance_embeds=config.guidance,
        axes_dims_rope=config.axes,
    )
    return randomize(theirs, seed), flux2.Flux2(config)


def inputs(config: flux2.Config, seed: int, size=(5, 7), references=()) -> tuple[np.ndarray, np.ndarray, list]:
    """x (2, c, h, w), the text and the references (1, c, h_k, w_k)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, config.in_channels, *size), np.float32)
    text = rng.standard_normal((2, 11, config.context), np.float32)
    return x, text, [rng.standard_normal((1, config.in_channels, *s), np.float32) for s in references]


def ours_of(net, x: np.ndarray, t: float, text: np.ndarray, refs: list, ts: list | None, guidance=None) -> np.ndarray:
    given = {} if guidance is None else {"guidance": mx.array(guidance)}
    cond = net.prepare(ts, mx.array(text), x.shape[2:], references=[nhwc(r) for r in refs], **given)
    return nchw(net(nhwc(x), t, **cond))


def reference(theirs, x: np.ndarray, t: float, text: np.ndarray, refs: list, guidance=None) -> np.ndarray:
    """As diffusers' pipeline calls it, with its own packing and ids."""
    x, text, pipe = torch.tensor(x), torch.tensor(text), Flux2KleinPipeline
    tokens, ids = pipe._pack_latents(x), pipe._prepare_latent_ids(x)
    if refs:
        latents = [torch.tensor(r) for r in refs]
        beside = torch.cat([pipe._pack_latents(z) for z in latents], dim=1)
        tokens = torch.cat([tokens, beside.expand(len(x), -1, -1)], dim=1)
        ids = torch.cat([ids, pipe._prepare_image_ids(latents).expand(len(x), -1, -1)], dim=1)
    out = theirs(
        hidden_states=tokens,
        timestep=torch.full((len(x),), t),
        guidance=None if guidance is None else torch.tensor(guidance),
        encoder_hidden_states=text,
        txt_ids=pipe._prepare_text_ids(text),
        img_ids=ids,
    ).sample
    h, w = x.shape[2:]
    return pipe._unpack_latents_with_ids(out[:, : h * w], pipe._prepare_latent_ids(x), h, w).numpy()


# Float32 sums in another order, and a wave of 1000 * guidance: float32 knows its angle to 4000 * 2^-24 = 2e-4.
@pytest.mark.parametrize("references", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_flux2_equals_diffusers(config, references):
    theirs, ours = pair(config, 0)
    give(theirs, ours, rename=from_diffusers)
    x, text, refs = inputs(config, 1, references=references)
    guidance = np.array([4.0, 2.25], np.float32) if config.guidance else None
    want = reference(theirs, x, 0.7125, text, refs, guidance)
    out = ours_of(ours, x, 0.7125, text, refs, [1.0, 0.7125], guidance)
    assert error(out, want) < (1e-4 if config.guidance else 2e-5)
    if not refs:
        return
    assert error(ours_of(ours, x, 0.7125, text, [], [0.7125], guidance), want) > 1e-2  # it listens to references
    if len(refs) == 2:  # and to their order
        assert error(ours_of(ours, x, 0.7125, text, refs[::-1], [0.7125], guidance), want) > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (6, 3)])
def test_any_size_equals_diffusers(size):
    theirs, ours = pair(KLEIN, 2)
    give(theirs, ours, rename=from_diffusers)
    x, text, _ = inputs(KLEIN, 3, size)
    assert error(ours_of(ours, x, 1.0, text, [], [1.0]), reference(theirs, x, 1.0, text, [])) < 2e-5


def test_eps_of_norms_is_the_reference():
    """1e-6 everywhere. Loud weights would hide a wrong one."""
    theirs, ours = pair(KLEIN, 4)
    give(quieten(theirs, 0.03), ours, rename=from_diffusers)
    x, text, _ = inputs(KLEIN, 5)
    assert error(ours_of(ours, 0.01 * x, 0.5, text, [], [0.5]), reference(theirs, 0.01 * x, 0.5, text, [])) < 1e-4


def test_times_made_beforehand_equal_times_made_in_the_call():
    """Also one time per sample, and after the weights of the modulations are gone."""
    _, ours = pair(CASES["dev"], 6)
    x, text, _ = inputs(CASES["dev"], 7)
    guidance = np.array([4.0, 2.25], np.float32)
    called = ours_of(ours, x, 0.25, text, [], None, guidance)
    cond = ours.prepare(None, mx.array(text), x.shape[2:], guidance=mx.array(guidance))
    assert error(nchw(ours(nhwc(x), mx.array([0.25, 0.25]), **cond)), called) < 1e-6
    cond = ours.prepare([1.0, 0.25], mx.array(text), x.shape[2:], guidance=mx.array(guidance))
    ours.release_modulation()
    assert error(nchw(ours(nhwc(x), 0.25, **cond)), called) < 1e-6


def test_every_parameter_of_klein_is_the_published_one():
    config = flux2.Config(128, 128, 7680, 3072, 24, 9216, 5, 20, (32,) * 4, 2000.0, False)
    ours = {k: tuple(v.shape) for k, v in tree_flatten(flux2.Flux2(config).parameters())}
    assert ours == {k: tuple(v) for k, v in manifest("flux2_klein_4b")["tensors"].items()}


@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50, 200])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (33, 21), (64, 64), (64, 68), (90, 60)])  # 4300 tokens lie between
def test_the_schedule_is_that_of_the_pipeline(steps, h, w):
    """The scheduler as Flux2KleinPipeline runs it. Its own shifts, which the published file has, are not used."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = compute_empirical_mu(h * w, steps)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = schedules.flow(FAMILIES["flux2"].schedule, h * w, steps)
    np.testing.assert_allclose(schedules.sigmas(ours, "trailing", steps), theirs.sigmas.numpy(), atol=2e-7)  # float32
