"""How much memory a step of a training takes, told before it begins, and before anything is fetched. The graph of the
loss and its gradients is traced with empty weights, which computes nothing, and walked in its order: a buffer lives
from the operation that makes it to the last that reads it. So there are no figures for each family, rank or size."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .. import advice, conditioning, recipe, weights
from ..description import Description
from ..errors import Error
from ..models import build, ways
from ..tokenizers import Chunk
from . import batches, inversion, texts, tune
from .inversion import WordTuning
from .tune import LoraTuning

# Of an input, these make another view, and of what they compute, none of the others is the input's buffer.
_VIEWS = {"Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten", "Reshape"}
_VIEWS |= {"Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View", "AsStrided"}
_COPIES = {"Reshape", "Flatten", "Unflatten"}  # of an input whose axes are not in order
_ITSELF = {"Add", "AsType", "Divide", "Erf", "Exp", "Log", "Maximum", "Minimum", "Multiply", "Negative", "Power"}
_ITSELF |= {"Rsqrt", "Select", "Sigmoid", "Softmax", "Sqrt", "Square", "Subtract", "Tanh", "Compiled"}  # take its place
_LAG = 10  # operations that MLX begins before the first of them ends
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
    calls = _without_blocks(whole) if tuning.low_memory else []
    aim, size = batches.Objective(model), tuning.size_for(model) // model.factor
    x = mx.zeros((tuning.batch, size, size, model.latent_channels))
    sets = 1 if of_word or tuning.class_images is None else 2

    def loss(whole: texts.Reader, x: mx.array, t: mx.array, args: dict) -> mx.array:
        args = args | _encoded(model, whole, tuning.batch)
        each = [{k: v[i : i + 1] for k, v in args.items()} for i in range(tuning.batch)]
        part = batches.Part(x, t, x, aim.arguments(each, x.shape[1:3]), 1.0)
        return batches.loss(whole.net, [part] * sets)

    def run(params: dict, *inputs) -> list[mx.array]:
        whole.update(params)
        value, grads = nn.value_and_grad(whole, loss)(whole, *inputs)
        return [value, *(g for _, g in tree_flatten(grads))]

    trained = _bytes(whole.trainable_parameters())
    passing = walked(run, whole.parameters(), x, mx.zeros((tuning.batch,)), batches.read(model, tuning.batch), gpu=gpu)
    passing += max((_of_block(*call, gpu) for call in {key: call for key, *call in calls}.values()), default=0)
    more = trained if tuning.accumulate > 1 else 0  # the sum of the gradients so far
    update = held + (2 * _STATES + 1) * trained  # the new ones, while the old are held
    return Step(held, max(passing + (_STATES - 1) * trained + more, update))


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


def _without_blocks(net: nn.Module) -> list[tuple]:
    """Let the blocks of a network, which compute again what their gradients need, keep only what they read. Returns a
    list that gets each call of one: what its memory depends on, then the block, its arguments and its outputs."""
    calls = []

    def stand_in(kind: type[nn.Module]) -> type[nn.Module]:
        class StandIn(kind):
            def __call__(self, *args, **named):
                out = super().__call__(*args, **named)  # for its shapes: nothing reads it, so it is not in the graph
                key = kind, *(v.shape for _, v in tree_flatten([self.parameters(), args, named]) if _is(v))
                whole = tree_map(lambda v: mx.zeros(v.shape, v.dtype) if _is(v) else v, [args, named, out])
                calls.append((key, kind, self, *whole))
                read = sum((mx.square(v).sum() for _, v in tree_flatten(list(args)) if _is(v)), mx.array(0.0))
                return tree_map(lambda v: mx.zeros(v.shape, v.dtype) + read.astype(v.dtype), out)

        return StandIn

    for block in batches.blocks(net):
        block.__class__ = stand_in(type(block))
    return calls


def _of_block(kind: type[nn.Module], block: nn.Module, args: tuple, named: dict, out, gpu: bool) -> int:
    """Bytes of what a block takes beside its weights and what it reads, while its gradients are computed."""
    arrays = [v for _, v in tree_flatten([args, named]) if _is(v)]

    def run(params: dict, arrays: list[mx.array], grads: list[mx.array]) -> list[mx.array]:
        def forward(trained: dict, *arrays: mx.array) -> mx.array:
            block.update(trained)
            left = iter(arrays)
            some, others = tree_map(lambda v: next(left) if _is(v) else v, [args, named])
            outs = tree_flatten(kind.__call__(block, *some, **others))
            return sum((o * g).sum() for (_, o), g in zip(outs, grads, strict=True))

        block.update(params)
        found = mx.grad(forward, argnums=(0, *range(1, 1 + len(arrays))))(block.trainable_parameters(), *arrays)
        return [v for _, v in tree_flatten(list(found))]

    grads = [v for _, v in tree_flatten(out)]
    empty = tree_map(lambda v: mx.zeros(v.shape, v.dtype), block.parameters())
    return walked(run, empty, arrays, grads, gpu=gpu) - _bytes(empty) - _bytes(arrays)


def _is(value) -> bool:
    return isinstance(value, mx.array)


def blank(model: Description, name: str) -> nn.Module:
    """A network as it is trained over, with zeros that are never made."""
    dtype = recipe.DTYPES[recipe.component_dtype(model.family, name, model.recipe.dtype)]
    net = build.build(model.components[name])
    net.update(tree_map(lambda p: mx.zeros(p.shape, dtype), net.parameters()))
    return weights.quantized(net, recipe.quantization_plan(model.family, name, net, model.recipe.bits))


def walked(run: Callable, *inputs, gpu: bool) -> int:
    """The largest sum of the buffers that are alive at once while the arrays of run(*inputs) are computed."""
    flat = tree_flatten(list(inputs))
    names, records = [name for name, _ in flat], []
    call = lambda *arrays: run(*tree_unflatten(list(zip(names, arrays, strict=True))))  # noqa: E731
    with ways.exportable():
        mx.export_function(records.append, call, *(array for _, array in flat))
    listed = {r["type"]: r for r in records if r["type"] in ("inputs", "outputs")}
    steps = [r for r in records if r["type"] == "primitive"]
    buffer, ordered, size, last = {}, {}, {}, {}  # array -> its buffer; whether its axes are; buffer -> bytes; last use

    def made(name: str, shape: tuple, dtype: mx.Dtype) -> None:
        buffer[name], ordered[name], size[name] = name, True, math.prod(shape) * dtype.size

    for array in listed["inputs"]["inputs"]:
        made(*array)
    for r in records:
        for name, value in r.get("constants", ()) if r["type"] == "constants" else ():
            made(name, value.shape, value.dtype)
    kept = set(buffer.values())
    for i, r in enumerate(steps):
        read = [name for name, *_ in r["inputs"]]
        for k, (name, shape, dtype) in enumerate(r["outputs"]):
            made(name, shape, dtype)
            if r["name"] in _VIEWS and read and (ordered[read[0]] or r["name"] not in _COPIES):
                source = read[k] if r["name"] in ("CustomTransforms", "Depends") and k < len(read) else read[0]
                buffer[name] = buffer[source]
                ordered[name] = ordered[source] and r["name"] != "Transpose"
        for name in read:
            last[buffer[name]] = i
    kept |= {buffer[name] for name, *_ in listed["outputs"]["outputs"]}
    held = kept & {name for name, *_ in listed["inputs"]["inputs"]}
    most = alive = sum(size[b] for b in held)
    ending = []
    for i, r in enumerate(steps):
        over = {buffer[name] for name, *_ in r["inputs"]}
        over = {b for b in over if last[b] == i and b not in kept}
        for name, *_ in r["outputs"]:
            b = buffer[name]
            if b in held:
                continue
            held.add(b)
            place = next((o for o in over if size[o] == size[b]), None) if r["name"] in _ITSELF else None
            if place is not None and b not in kept:
                over.discard(place)  # it is the same memory
                held.discard(place)
            else:
                alive += size[b]
            if b not in last and b not in kept:
                over.add(b)
        beside = 0 if gpu else _unfolded(r)
        alive += beside
        most = max(most, alive)
        over &= held
        held -= over
        ending.append(beside + sum(size[b] for b in over))
        alive -= ending[-1 - _LAG] if len(ending) > _LAG else 0
    return most


def _unfolded(r: dict) -> int:
    """Bytes that a convolution takes beside its output on a CPU: its input, once for each number of the kernel."""
    if r["name"] != "Convolution":
        return 0
    (_, (*_, c), dtype), (_, (_, kh, kw, _), _) = r["inputs"][:2]
    _, (n, h, w, _), _ = r["outputs"][0]
    return n * h * w * kh * kw * c * dtype.size


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
