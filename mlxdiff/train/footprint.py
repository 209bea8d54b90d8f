"""How much memory a step of a training takes, told before it begins, and before anything is fetched. The graph of the
loss and its gradients is traced with empty weights, which computes nothing, and `tape` finds what is alive at once. So
there are no figures for each family, rank or size."""

from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten, tree_map

from .. import advice, conditioning, recipe, weights
from ..description import Description
from ..errors import Error
from ..models import build
from ..tokenizers import Chunk
from . import batches, inversion, tape, texts, tune
from .inversion import WordTuning
from .tune import LoraTuning

_SAFE = 1.05  # what can be traced is less than what MLX takes: its own small arrays, and a CPU's ways of computing
_STATES = 4  # numbers for each that is trained: itself, the mean of fit, and AdamW's two


class Step(NamedTuple):
    """Bytes."""

    weights: int
    peak: int


def step(model: Description, tuning: LoraTuning | WordTuning, gpu: bool) -> Step:
    """The largest memory of a step of a training, for square pictures of its size. gpu: not on a CPU, where a
    convolution takes more."""
    of_word = isinstance(tuning, WordTuning)
    names = [model.family.denoiser, *model.text.clip * (of_word or tuning.text_encoder)]
    nets = {name: blank(model, name) for name in names}
    held = _bytes([net.parameters() for net in nets.values()])
    for name, net in nets.items():
        (inversion.attach if of_word else tune.attach)(net, model, name, tuning)
    denoiser, *encoders = nets.values()
    whole = texts.Reader(denoiser, dict(zip(names[1:], encoders, strict=True)))
    if tuning.low_memory:
        tape.mark(batches.blocks(whole))
    aim, size = batches.Objective(model), tuning.size_for(model) // model.factor
    sets = 1 if of_word or tuning.class_images is None else 2
    xs = [mx.zeros((tuning.batch, size, size, model.latent_channels)) for _ in range(sets)]

    def loss(whole: texts.Reader, xs: list[mx.array], t: mx.array, args: dict) -> mx.array:
        args = args | _encoded(model, whole, tuning.batch)
        each = [{k: v[i : i + 1] for k, v in args.items()} for i in range(tuning.batch)]
        return batches.loss(whole.net, [batches.Part(x, t, x, aim.arguments(each, x.shape[1:3]), 1.0) for x in xs])

    def run(params: dict, *inputs) -> list[mx.array]:
        whole.update(params)
        value, grads = nn.value_and_grad(whole, loss)(whole, *inputs)
        grads = grads if tuning.accumulate > 1 else opt.clip_grad_norm(grads, 1.0)[0]  # as `fit` asks for them
        return [value, *(g for _, g in tree_flatten(grads))]

    trained = _bytes(whole.trainable_parameters())
    graph = tape.traced(run, whole.parameters(), xs, mx.zeros((tuning.batch,)), batches.read(model, tuning.batch))
    most = held + _SAFE * (tape.peak(tape.again(graph) if tuning.low_memory else graph, gpu) - held)
    more = trained if tuning.accumulate > 1 else 0  # the sum of the gradients so far
    update = held + (2 * _STATES + 1) * trained  # the new ones, while the old are held
    return Step(held, int(max(most + (_STATES - 1) * trained + more, update)))


def _encoded(model: Description, whole: texts.Reader, n: int) -> dict[str, mx.array]:
    """What encoders that are trained make of n captions."""
    if not whole.encoders:
        return {}
    parts = {}
    for name, encoder in whole.encoders.items():
        blank = Chunk([0] * encoder.config.positions, [1.0] * encoder.config.positions)
        parts[name] = conditioning.read(model.text, encoder, conditioning.Words([[blank]] * n, None), 1)
    found = conditioning.join(model.text, parts, model.net.context)
    made = {"context": mx.concatenate([text.context for text in found])}
    return made | ({} if found[0].pooled is None else {"pooled": mx.concatenate([text.pooled for text in found])})


def blank(model: Description, name: str) -> nn.Module:
    """A network as it is trained over, with zeros that are never made."""
    dtype = recipe.DTYPES[recipe.component_dtype(model.family, name, model.recipe.dtype)]
    net = build.build(model.components[name])
    net.update(tree_map(lambda p: mx.zeros(p.shape, dtype), net.parameters()))
    return weights.quantized(net, recipe.quantization_plan(model.family, name, net, model.recipe.bits))


def told(model: Description, tuning: LoraTuning | WordTuning, force: bool) -> str:
    """What a step takes, for people. Raises if this machine clearly has less. force: try it all the same."""
    machine = advice.this_machine()
    need = step(model, tuning, machine.gpu)
    said = f"A step takes about {need.peak / 1e9:.1f} GB"
    if need.peak > advice.SURE * machine.memory and not force:
        fitting = [(k, step(*other, machine.gpu).peak) for k, *other in _others(model, tuning)]
        fitting = [f"{advice.spell(k)} ({n / 1e9:.1f} GB)" for k, n in fitting if n <= machine.budget]
        fix = f"What fits: {', or '.join(fitting)}." if fitting else "Train for a smaller model."
        fix = f"{fix} `force=True` tries it as it is."
        raise Error(f"{said}; this machine has {machine.memory / 1e9:.1f}.", fix)
    return f"{said}, the model's {need.weights / 1e9:.1f} among them; this machine has {machine.memory / 1e9:.1f}."


def _others(
    model: Description, tuning: LoraTuning | WordTuning
) -> list[tuple[dict, Description, LoraTuning | WordTuning]]:
    """Settings that take less, and the model and the training with them."""
    low, four = replace(tuning, low_memory=True), replace(model, recipe=replace(model.recipe, bits=4))
    less = {"low_memory": True} if not tuning.low_memory else {}
    fewer = {"bits": 4} if model.recipe.bits is None or recipe.BITS[model.recipe.bits] > 4 else {}
    four = four if fewer else model
    found = [(less, model, low)] if less else []
    found += [(less | fewer, four, low)] if fewer else []
    half = tuning.size_for(model) // 2 // model.multiple * model.multiple
    return [*found, (less | fewer | {"size": half}, four, replace(low, size=half))] if half else found


def table(model: Description, tuning: LoraTuning | WordTuning) -> str:
    """What a step takes with 16, 8 and 4 bits, and with low_memory or without, for people."""
    size, gpu = tuning.size_for(model), advice.this_machine().gpu
    what = f"a word of {tuning.vectors}" if isinstance(tuning, WordTuning) else f"rank {tuning.rank}"
    lines = [f"{model.name} at {size}x{size}, {what}, {tuning.batch} at once: a step takes about"]
    for bits in (None, 8, 4):
        how = replace(model, recipe=replace(model.recipe, bits=bits))
        plain, low = (step(how, replace(tuning, low_memory=each), gpu).peak / 1e9 for each in (False, True))
        lines.append(f"  {how.recipe!s:16}{plain:7.1f} GB, with --low-memory {low:.1f} GB")
    return "\n".join(lines)


def _bytes(tree) -> int:
    return sum(v.nbytes for _, v in tree_flatten(tree))
