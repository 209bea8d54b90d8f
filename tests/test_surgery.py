"""A U-Net with one part changed, against the same network changed in another way: other inputs, or other weights. The
tolerance is float32's: sums in another order."""

import math

import mlx.core as mx
import pytest

import mlxdiff
from mlxdiff import surgery
from mlxdiff.errors import Error


@pytest.fixture(scope="module")
def parts():
    """The network, some x, and the conditions of two prompts."""
    pipe = mlxdiff.load("storybook", dtype="float32")
    net = surgery.unet(pipe)
    contexts = [text.context for text in pipe.read(["a red house", "a blue boat"], pipe.resolve(""), t5=False)]
    x = mx.random.normal((1, 16, 16, net.config.in_channels), key=mx.random.key(1))
    return net, x, contexts, [net.prepare([400.0], context) for context in contexts]


def close(a: mx.array, b: mx.array) -> bool:
    return float(mx.abs(a - b).max()) < 1e-4 * float(mx.abs(b).max())


def test_a_part_is_as_it_was_afterwards(parts):
    net, x, (_, other), (cond, _) = parts
    right = net(x, 400.0, **cond)
    for changed in (
        surgery.cut(net, {0}),
        surgery.misled(net, 200),
        surgery.muted(net, ["middle"]),
        surgery.reading(net, ["up 2"], other),
    ):
        with changed:
            assert not close(net(x, 400.0, **cond), right)
        assert (net(x, 400.0, **cond) == right).all()
    with pytest.raises(ZeroDivisionError), surgery.cut(net, {0}), surgery.muted(net, ["middle"]):
        _ = 1 / 0
    assert (net(x, 400.0, **cond) == right).all()


def test_a_skip_that_is_cut_is_a_skip_with_its_own_negative_added(parts):
    """A ControlNet adds to the skips: here each one's negative, and nothing to the middle."""
    net, x, _, (cond, _) = parts
    shifts = net.shifts_at(400.0, cond["times"], None, None)
    middle, skips = net.down(net.conv_in(x), shifts, iter(cond["kv"]))
    assert len(surgery.skips(net)) == len(skips)
    sides = [skip.shape[1] for skip in skips]
    assert [int(math.log2(sides[0] / side)) + 1 for side in sides] == surgery.skips(net)  # the levels, by their maps
    for chosen in ({2}, range(len(skips))):
        added = [-skip if i in chosen else 0 * skip for i, skip in enumerate(skips)]
        expected = net(x, 400.0, **cond, residuals=[*added, 0 * middle])
        with surgery.cut(net, chosen):
            assert close(net(x, 400.0, **cond), expected)


def test_a_lie_about_the_time_is_the_network_at_that_time(parts):
    net, x, _, (cond, _) = parts
    for by, told in ((150, 550.0), (-900, 0.0), (900, 999.0)):
        expected = net(x, told, **cond)
        with surgery.misled(net, by):
            assert close(net(x, 400.0, **cond), expected)


def test_a_muted_block_is_one_whose_attention_adds_nothing(parts):
    """proj_out with weights of 0."""
    net, x, _, (cond, _) = parts
    for name in ("down 2", "middle", "up 1"):
        with surgery.muted(net, [name]):
            found = net(x, 400.0, **cond)
        kept = [(a.proj_out.weight, a.proj_out.bias, a) for a in surgery.blocks(net)[name].attentions]
        for weight, bias, a in kept:
            a.proj_out.weight, a.proj_out.bias = 0 * weight, 0 * bias
        try:
            assert close(found, net(x, 400.0, **cond))
        finally:
            for weight, bias, a in kept:
                a.proj_out.weight, a.proj_out.bias = weight, bias


def test_blocks_read_another_prompt(parts):
    """All of them: the network with the other prompt's conditions. Of two samples only the second reads it."""
    net, x, contexts, conds = parts
    expected = net(x, 400.0, **conds[1])
    with surgery.reading(net, surgery.blocks(net), contexts[1]):
        assert close(net(x, 400.0, **conds[0]), expected)
        both = net.prepare([400.0], mx.concatenate([contexts[0]] * 2))
        first, second = mx.split(net(mx.concatenate([x, x]), 400.0, **both), 2)
    assert close(first, net(x, 400.0, **conds[0]))
    assert close(second, expected)


def test_blocks_are_named_in_the_order_in_which_they_run(parts):
    net = parts[0]
    levels = range(1, len(net.config.channels) + 1)
    down, up = [f"down {i}" for i in levels], [f"up {i}" for i in reversed(levels)]
    assert list(surgery.blocks(net)) == [*down, "middle", *up]
    reads = {f"down {i}": n for i, n in enumerate(net.config.depth, 1)} | {"middle": (1,)}
    reads |= dict(zip(up, net.config.up_depth, strict=True))
    assert surgery.readers(net) == [name for name in reads if reads[name]]


def test_another_denoiser_is_refused():
    class Pipe:
        name, refiner = "flux", None

        class description:
            class family:
                denoiser = "flux"

    with pytest.raises(Error, match="flux does not draw with one U-Net"):
        surgery.unet(Pipe())
