"""In which order MLX computes a graph, and how much memory its arrays then take at once. Nothing is computed.

MLX walks back from what is asked for, with few operations open at a time, and computes in the opposite order: what only
one later operation reads, such as the gradient of a weight, comes as late as it can, and what it is made of is held
until then. MLX also begins operations long before the first of them ends, and what they read is held meanwhile."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..models import ways

# These make another view of their first input. Of what they compute, none of the others is a view.
_VIEWS = {"Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten", "Reshape"}
_VIEWS |= {"Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View", "AsStrided"}
_COPIES = {"Reshape", "Flatten", "Unflatten"}  # of an input whose axes are not in order
_IN_PLACE = {"Add", "AsType", "Divide", "Erf", "Exp", "Log", "Maximum", "Minimum", "Multiply", "Negative", "Power"}
_IN_PLACE |= {"Rsqrt", "Select", "Sigmoid", "Softmax", "Sqrt", "Square", "Subtract", "Tanh", "Compiled"}
_OPEN = 20  # operations at most while MLX walks back (MLX_BFS_MAX_WIDTH)
_AHEAD = 10  # tasks that MLX begins before the first of them ends
_PARTS = 10  # of a task on a CPU: an operation is one part to be computed, and one to be forgotten
_READ, _OPS = 50 * 2**20, 50  # of a task on a GPU, which is a command buffer: bytes that it reads, or operations
_FIRST = 1000.5  # of the numbers that mark where blocks begin and end: no network computes with such ones


class Op(NamedTuple):
    kind: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass
class Graph:
    inputs: list[str]
    constants: dict[str, mx.array]
    outputs: list[str]
    ops: list[Op]
    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]  # bytes


def traced(run: Callable, *inputs) -> Graph:
    """The graph of the arrays run(*inputs)."""
    flat = tree_flatten(list(inputs))
    names, records = [name for name, _ in flat], []
    call = lambda *arrays: run(*tree_unflatten(list(zip(names, arrays, strict=True))))  # noqa: E731
    with ways.exportable():
        mx.export_function(records.append, call, *(array for _, array in flat))
    of = {r["type"]: r for r in records if r["type"] != "primitive"}
    steps = [r for r in records if r["type"] == "primitive"]
    constants = dict(of["constants"]["constants"]) if "constants" in of else {}
    made = [*of["inputs"]["inputs"], *(output for r in steps for output in r["outputs"])]
    made += [(name, value.shape, value.dtype) for name, value in constants.items()]
    ops = [Op(r["name"], *(tuple(name for name, *_ in r[key]) for key in ("inputs", "outputs"))) for r in steps]
    inputs, outputs = ([name for name, *_ in of[key][key]] for key in ("inputs", "outputs"))
    shapes = {name: shape for name, shape, _ in made}
    return Graph(inputs, constants, outputs, ops, shapes, {n: math.prod(s) * dtype.size for n, s, dtype in made})


# ---- blocks that are computed again for their gradients: MLX can export no graph of theirs


def mark(blocks: Iterable[nn.Module]) -> None:
    """Let a graph show where each call of a block begins and ends."""
    calls = iter(range(10**6))
    for block in blocks:
        block.__class__ = _marked(type(block))
        block._calls = calls


@cache
def _marked(kind: type[nn.Module]) -> type[nn.Module]:
    class Marked(kind):
        def __call__(self, *args, **named):
            number = _FIRST + 2 * next(self._calls)
            args, named = _after([list(args), named], number)
            return _after([super().__call__(*args, **named)], number + 1)[0]

    return Marked


def _after(tree: list, number: float) -> list:
    arrays = iter(mx.depends([v for _, v in tree_flatten(tree) if isinstance(v, mx.array)], [mx.array(number)]))
    return tree_map(lambda v: next(arrays) if isinstance(v, mx.array) else v, tree)


def again(graph: Graph) -> Graph:
    """The graph in which the gradients of marked blocks read copies of what these compute, made once the blocks have
    ended, as `batches.recompute` has it."""
    makes = {name: i for i, op in enumerate(graph.ops) for name in op.makes}
    marks = {n: int(v.item() - _FIRST) for n, v in graph.constants.items() if v.shape == () and v.item() >= _FIRST}
    begins, ends = {}, {}
    for i, op in enumerate(graph.ops):
        number = next((marks[name] for name in op.reads if name in marks), None) if op.kind == "Depends" else None
        if number is not None:
            (ends if number % 2 else begins).setdefault(number // 2, []).append(i)
    forward, copies, to, shapes, sizes = set(), [], {}, dict(graph.shapes), dict(graph.sizes)
    for number, last in ends.items():
        first, inside = set(begins.get(number, ())), set()
        todo = [name for i in last for name in graph.ops[i].reads]
        while todo:
            i = makes.get(todo.pop())
            if i is not None and i not in inside:
                inside.add(i)
                todo += [] if i in first else graph.ops[i].reads
        forward |= inside | set(last)
        own = {name: f"{name} again {number}" for i in inside for name in graph.ops[i].makes}
        over = tuple(name for i in last for name in graph.ops[i].makes)
        for i in sorted(inside):
            op = graph.ops[i]
            reads = tuple(own.get(name, name) for name in op.reads if name not in marks)
            copies.append(Op(op.kind, reads + over * (i in first), tuple(own[name] for name in op.makes)))
        to |= own
        for of in (shapes, sizes):
            of |= {new: of[old] for old, new in own.items()}
    rest = [op if i in forward else op._replace(reads=tuple(to.get(n, n) for n in op.reads))
            for i, op in enumerate(graph.ops)]  # fmt: skip
    return Graph(graph.inputs, graph.constants, graph.outputs, rest + copies, shapes, sizes)


# ---- the order, and what is alive


def ordered(graph: Graph) -> list[Op]:
    """The operations as MLX computes them."""
    makes = {name: i for i, op in enumerate(graph.ops) for name in op.makes}
    inputs = [[makes[name] for name in op.reads if name in makes] for op in graph.ops]
    return [graph.ops[i] for i in order(inputs, [makes[name] for name in graph.outputs if name in makes])]


def order(inputs: list[list[int]], asked: list[int]) -> list[int]:
    """The operations that lead to those that are asked for, in the order of MLX's eval: from the end, breadth first,
    but down to the inputs where _OPEN operations wait. inputs: the operations that each reads from."""
    readers, seen, todo = Counter(), set(), [asked]
    while todo:
        for i in todo.pop():
            readers[i] += 1
            if i not in seen:
                seen.add(i)
                todo.append(inputs[i])
    backwards, at, put_off = [], 0, [(asked, 0)]
    while at < len(backwards) or put_off:
        if at < len(backwards):
            now, first = inputs[backwards[at]], 0
            at += 1
        else:
            now, first = put_off.pop()
        for k, i in list(enumerate(now))[first:]:
            if len(backwards) - at >= _OPEN:
                put_off.append((now, k))
                break
            readers[i] -= 1
            if readers[i] == 0:
                backwards.append(i)
    return backwards[::-1]


def peak(graph: Graph, gpu: bool) -> int:
    """The largest sum of the buffers that are alive at once, in bytes."""
    ops = ordered(graph)
    buffer, last = _buffers(graph, ops)
    size, inputs = graph.sizes, set(graph.inputs)
    kept = inputs | set(graph.constants) | {buffer[name] for name in graph.outputs}
    tasks, held, read_last = _tasks(graph, ops, gpu), set(inputs), {}
    turned = {name for op in ops if op.kind == "Transpose" for name in op.makes}
    most = alive = sum(size[b] for b in inputs)
    ending, ended = [], 0  # (task, bytes) in order, and how many of these are over
    for i, op in enumerate(ops):
        reads = {buffer[name] for name in op.reads}
        over = {b for b in reads if last[b] == i and b not in kept}
        # A buffer that a task which has not ended still reads is not written over.
        free = {b for b in over if tasks[i] - read_last.get(b, -_AHEAD - 1) > _AHEAD} if op.kind in _IN_PLACE else ()
        for b in (buffer[name] for name in op.makes):
            if b in held:
                continue
            held.add(b)
            place = next((o for o in free if size[o] == size[b] and o in over), None)
            if place is None or b in kept:
                alive += size[b]
            else:
                over.discard(place)
                held.discard(place)
            if b not in last and b not in kept:
                over.add(b)
        beside, copies = (0, 0) if gpu else _of_convolution(graph, op, turned)
        alive += beside
        most = max(most, alive + copies)  # those of two convolutions at once were not seen
        over &= held
        held -= over
        read_last |= dict.fromkeys(reads, tasks[i])
        ending.append((tasks[i], beside + sum(size[b] for b in over)))
        while ended < len(ending) and tasks[i] - ending[ended][0] > _AHEAD:
            alive -= ending[ended][1]
            ended += 1
    return most


def _buffers(graph: Graph, ops: list[Op]) -> tuple[dict[str, str], dict[str, int]]:
    """The buffer of each array, which has the name of the first array in it, and the last operation that reads each
    buffer."""
    buffer = {name: name for name in (*graph.inputs, *graph.constants)}
    in_order, last = dict.fromkeys(buffer, True), {}
    for i, op in enumerate(ops):
        for k, name in enumerate(op.makes):
            buffer[name], in_order[name] = name, True
            if op.kind in _VIEWS and op.reads and (in_order[op.reads[0]] or op.kind not in _COPIES):
                source = op.reads[k] if op.kind in ("CustomTransforms", "Depends") else op.reads[0]
                buffer[name], in_order[name] = buffer[source], in_order[source] and op.kind != "Transpose"
        last |= dict.fromkeys((buffer[name] for name in op.reads), i)
    return buffer, last


def _tasks(graph: Graph, ops: list[Op], gpu: bool) -> list[int]:
    """The number of the task in which each operation is computed."""
    numbers, parts, number, read, count = [], 0, 0, 0, 0
    for op in ops:
        parts += 1 if op.kind in _VIEWS else 2
        numbers.append(number if gpu else parts // _PARTS)
        read, count = read + sum(graph.sizes[name] for name in {*op.reads}), count + 1
        if read > _READ or count >= _OPS:
            number, read, count = number + 1, 0, 0
    return numbers


def _of_convolution(graph: Graph, op: Op, turned: set[str]) -> tuple[int, int]:
    """Bytes that a convolution takes beside its output on a CPU, which computes it in float32: its input, once for each
    number of the kernel; and copies of its kernel, if that is in 16 bits or turned, as for the gradient of an input."""
    if op.kind != "Convolution":
        return 0, 0
    (*_, c), (o, kh, kw, _) = (graph.shapes[name] for name in op.reads[:2])
    n, h, w, _ = graph.shapes[op.makes[0]]
    copies = 2 if op.reads[1] in turned else graph.sizes[op.reads[1]] < 4 * o * kh * kw * c
    return 4 * n * h * w * kh * kw * c, 4 * copies * o * kh * kw * c
