"""`mlxdiff bench --graph NAME`: what one step of a named model, and its decoder, ask of a Mac's GPU, counted from their
graphs. Nothing is computed and no file is read: the graphs are made of shapes.

The rules are those of MLX's Metal backend, read in its source (0.32): which operations only change how memory is read,
when one copies its input first, how many kernels it launches, in which order a graph runs. The figures are lower
bounds: for some shapes an operation launches more kernels, and a GPU holds buffers until its commands have ended."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .. import __version__, conditioning, memory
from ..conditioning import Text
from ..models import layers, ways
from ..networks import dtype_of
from ..pipeline import Pipeline
from ..recipe import Recipe, component_dtype
from ..request import Request
from ..train.tape import order

LARGE = 4096  # numbers; a smaller array costs a launch, but no memory worth counting
_TIME = 0.5  # any time would do


class Array(NamedTuple):
    id: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


class Node(NamedTuple):
    name: str
    inputs: list[Array]
    outputs: list[Array]
    arguments: list


class Graph(NamedTuple):
    nodes: list[Node]  # in the order in which MLX runs them
    returned: list[Array]
    waits: int  # how often Python waits for a value while the graph is made


class _Marks:
    """Stands for the parts of a network that are one kernel on a GPU and several on a CPU. Each becomes one node: MLX's
    own `depends`, of the inputs and of a number that says which part it is."""

    def __init__(self):
        self.names: list[str] = []
        self.waits = 0

    def node(self, name: str, inputs: Sequence, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        self.names.append(name)
        arrays = [a for a in inputs if isinstance(a, mx.array)]
        return mx.depends([mx.zeros(shape, dtype)], [*arrays, mx.array(len(self.names) - 1, mx.int64)])[0]

    def chain(self, chain: Callable, *arrays) -> mx.array:
        out = chain(*arrays)  # only its shape and dtype are read
        return self.node(chain.__name__, arrays, out.shape, out.dtype)

    def norm(self, name: str) -> Callable:
        return lambda x, *rest, **named: self.node(name, [x, *rest, *named.values()], x.shape, x.dtype)

    def attention(self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask=None) -> mx.array:
        dtype = mx.result_type(mx.result_type(q.dtype, k.dtype), v.dtype)
        q, k, v = (a if a.dtype == dtype else a.astype(dtype) for a in (q, k, v))
        if q.shape[-1] in layers.FUSED:
            return self.node("Attention", [q, k, v, mask], (*q.shape[:3], v.shape[-1]), dtype)
        return mx.softmax((q * mx.array(scale, dtype)) @ k.swapaxes(-1, -2), axis=-1, precise=True) @ v

    def wait(self, function: Callable) -> Callable:
        def counted(*args):
            self.waits += 1
            return function(*args)

        return counted


@contextmanager
def _as_on_a_gpu(marks: _Marks) -> Iterator[None]:
    replaced = [
        (mx, "default_device", lambda: mx.Device(mx.gpu)),
        (mx.fast, "layer_norm", marks.norm("LayerNorm")),
        (mx.fast, "rms_norm", marks.norm("RMSNorm")),
        (mx.fast, "scaled_dot_product_attention", marks.attention),
        (ways, "run_chain", marks.chain),
        *((mx, name, marks.wait(getattr(mx, name))) for name in ("eval", "async_eval", "synchronize")),
        *((mx.array, name, marks.wait(getattr(mx.array, name))) for name in ("item", "tolist")),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    mx.disable_compile()  # the exporter reads no compiled chain
    try:
        for owner, name, function in replaced:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
        mx.enable_compile()


def graph(f: Callable, tree) -> Graph:
    """The graph of f(tree), an array. tree: arrays, of which only shapes and dtypes are read, and other values."""
    held: list[mx.array] = []
    tree_map(lambda v: held.append(v) if isinstance(v, mx.array) else None, tree)

    def called(*values: mx.array) -> list[mx.array]:
        given = iter(values)
        return [f(tree_map(lambda v: next(given) if isinstance(v, mx.array) else v, tree))]

    records, marks = [], _Marks()
    with _as_on_a_gpu(marks):
        mx.export_function(records.append, called, *(mx.zeros(v.shape, v.dtype) for v in held))
    known = {name: a for r in records if r["type"] == "constants" for name, a in r["constants"]}
    returned = [Array(*a) for r in records if r["type"] == "outputs" for a in r["outputs"]]
    nodes = []
    for r in (r for r in records if r["type"] == "primitive"):
        name, inputs, outputs = r["name"], *([Array(*a) for a in r[key]] for key in ("inputs", "outputs"))
        if name == "Depends" and inputs[-1].id in known and inputs[-1].dtype == mx.int64:
            name, inputs = marks.names[known[inputs[-1].id].item()], inputs[1:-1]
        nodes.append(Node(name, inputs, outputs, r.get("arguments", [])))
    return Graph(_ordered(nodes, returned), returned, marks.waits)


def _ordered(nodes: list[Node], returned: list[Array]) -> list[Node]:
    """The nodes that lead to what is returned, as MLX runs them."""
    maker = {a.id: i for i, node in enumerate(nodes) for a in node.outputs}
    inputs = [[maker[a.id] for a in node.inputs if a.id in maker] for node in nodes]
    return [nodes[i] for i in order(inputs, [maker[a.id] for a in returned])]


# ---- memory: views, copies, what is held


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return all(n == 1 or s == d for n, s, d in zip(shape, strides, _dense(shape), strict=True))


def _whole(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these strides visit every number of a block of memory once, in any order."""
    size = 1
    for s, n in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if s != size:
            return False
        size *= n
    return True


def reshaped(shape: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of a reshape; None if it must copy."""
    runs: list[tuple[int, int]] = []  # axes that follow on each other, as one: its length and the stride of its last
    for n, s in zip(shape, strides, strict=True):
        if n > 1:
            follows = bool(runs) and runs[-1][1] == n * s
            runs[-1:] = [(runs[-1][0] * n, s)] if follows else [*runs[-1:], (n, s)]
    made, left, step = [], 1, 1
    for n in reversed(new):
        if n > 1 and left == 1:
            left, step = runs.pop()
        if n > 1 and left % n:
            return None
        made.append(step)
        left, step = (left // n, step * n) if n > 1 else (left, step)
    return tuple(reversed(made))


def _view(node: Node, strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of the output of an operation that only changes how its input is read; None if it must copy."""
    source, out, args = node.inputs[0], node.outputs[0], node.arguments
    match node.name:
        case "Transpose":
            return tuple(strides[i] for i in args[0])
        case "ExpandDims":
            wider = list(strides)
            for axis in sorted(i % len(out.shape) for i in args[0]):
                wider.insert(axis, 1)
            return tuple(wider)
        case "Squeeze":
            dropped = {i % len(source.shape) for i in args[0]}
            return tuple(s for i, s in enumerate(strides) if i not in dropped)
        case "Slice":
            return tuple(s * step for s, step in zip(strides, args[2], strict=True))
        case "Broadcast" | "BroadcastAxes":
            new = len(out.shape) - len(source.shape)
            grown = (n == 1 and out.shape[i + new] != 1 for i, n in enumerate(source.shape))
            return (0,) * new + tuple(0 if g else s for g, s in zip(grown, strides, strict=True))
        case "Reshape" | "Flatten" | "Unflatten":
            return reshaped(source.shape, strides, out.shape)
    return strides  # Split, StopGradient, Depends, Contiguous


_VIEWS = {"Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze"}
_VIEWS |= {"StopGradient", "Transpose", "Unflatten"}
_NORMS = {"LayerNorm", "RMSNorm"}
_PRODUCTS = {"AddMM", "Matmul", "QuantizedMatmul"}
_HEAVY = {*_PRODUCTS, "Attention", "Convolution"}
_KEEPS = {*_HEAVY, "Concatenate", "Gather", "Pad", "Reduce", "Full"}  # they never write into their input's memory


class Tally:
    """Walks through a graph and charges each operation its kernels and bytes."""

    def __init__(self, of: Graph):
        self.kernels: Counter = Counter()  # by operation; "copy for X": a hidden one
        self.moved: Counter = Counter()  # bytes, by operation
        self.wide: Counter = Counter()  # kernels that write a large float32 array
        self.flops: Counter = Counter()
        self._layouts: dict[str, tuple[str, tuple[int, ...]]] = {}  # array -> the array that owns its memory, strides
        self._held: list[tuple[list[str], str | None, int, bool, int]] = []  # see `_run`
        for node in of.nodes:
            self._visit(node)
        self.peak = self._peak({self._of(a)[0] for a in of.returned})

    def _of(self, a: Array) -> tuple[str, tuple[int, ...]]:
        return self._layouts.get(a.id, (a.id, _dense(a.shape)))

    def _read(self, a: Array) -> int:
        """Bytes behind a view: those of a broadcast are read once."""
        return math.prod(n for n, s in zip(a.shape, self._of(a)[1], strict=True) if s != 0) * a.dtype.size

    def _visit(self, node: Node) -> None:
        out = node.outputs[0]
        if node.name in _VIEWS:
            owner, strides = self._of(node.inputs[0])
            viewed = _view(node, strides)
            if viewed is None:
                self._run("Reshape", node.inputs[:1], out)
            elif node.name == "Depends":
                self._layouts |= {o.id: self._of(i) for i, o in zip(node.inputs, node.outputs, strict=False)}
            else:
                self._layouts |= {o.id: (owner, viewed) for o in node.outputs}
            return
        strides = _dense(out.shape)
        if node.name == "Attention":
            strides = _dense([out.shape[i] for i in (0, 2, 1, 3)])
            strides = tuple(strides[i] for i in (0, 2, 1, 3))  # (B, N, heads, d) in memory
        elif node.name not in _KEEPS:
            strides = self._elementwise(node, out)
        self._copies(node)
        launched, temporary = 1, 0
        if node.name == "Convolution":
            launched, temporary = self._convolution(node)
        elif node.name == "Concatenate":
            launched = len(node.inputs)
        elif node.name == "Pad":
            launched = 2  # it fills, then copies
        elif node.name in _PRODUCTS:
            self.flops["matmul"] += 2 * math.prod(out.shape) * node.inputs[0].shape[-1]
        elif node.name == "Attention":
            self.flops["attention"] += 4 * math.prod(out.shape) * node.inputs[1].shape[2]
        self._run(node.name, node.inputs, out, launched, node.name not in _KEEPS, temporary)
        self._layouts[out.id] = (out.id, strides)
        for other in node.outputs[1:]:
            self._layouts[other.id] = (other.id, _dense(other.shape))

    def _run(self, name: str, inputs: list[Array], out: Array, launched=1, reuses=False, temporary: int = 0) -> None:
        """Charge a kernel, and note what it reads, what it makes and of how many bytes, whether it may write into the
        memory of an input, and what it holds while it runs."""
        self.kernels[name] += launched
        self.moved[name] += sum(map(self._read, inputs)) + out.nbytes
        if out.dtype == mx.float32 and math.prod(out.shape) > LARGE:
            self.wide[name] += 1
        self._held.append(([self._of(a)[0] for a in inputs], out.id, out.nbytes, reuses, temporary))

    def _elementwise(self, node: Node, out: Array) -> tuple[int, ...]:
        """Strides of an output: those of the inputs of its size if they all have the same without holes."""
        found = {self._of(a)[1] for a in node.inputs if a.shape == out.shape}
        strides = next(iter(found), ())
        return strides if len(found) == 1 and _whole(out.shape, strides) else _dense(out.shape)

    def _copies(self, node: Node) -> None:
        """The copies that an operation makes of inputs that lie in memory as it cannot read them."""
        inputs = node.inputs
        if node.name in _NORMS:
            inputs, fits = inputs[:1], _norm_reads
        elif node.name == "Softmax":
            fits = lambda shape, strides: strides[-1] == 1 and _whole(shape, strides)  # noqa: E731
        elif node.name == "Attention":
            fits = lambda shape, strides: strides[-1] == 1  # noqa: E731
        elif node.name == "QuantizedMatmul":
            fits = lambda shape, strides: strides[-1] == 1 and strides[-2] in (shape[-1], 0)  # noqa: E731
        elif node.name in _PRODUCTS:
            inputs, fits = inputs[:2], lambda shape, strides: 1 in strides[-2:]
        elif node.name == "Convolution":
            fits = _is_dense
        else:
            return
        for a in inputs:
            if len(a.shape) > 1 and not fits(a.shape, self._of(a)[1]):
                self._run(f"copy for {node.name}", [a], Array(f"{a.id} copied", a.shape, a.dtype))

    def _convolution(self, node: Node) -> tuple[int, int]:
        """Kernels of a convolution, and the bytes of its scratch. Winograd's F(6 x 6, 3 x 3) pads, transforms weights
        and map, multiplies and transforms back."""
        (x, w), out = node.inputs[:2], node.outputs[0]
        (B, h, width, c), (o, kh, kw, _) = x.shape, w.shape
        self.flops["convolution"] += 2 * math.prod(out.shape) * kh * kw * c
        small = B * h * width < 4096 or c + o < 256 or c % 32 or o % 32
        if (kh, kw) != (3, 3) or list(node.arguments[0]) != [1, 1] or small:
            return 1, 0
        scratch = 64 * B * math.ceil(out.shape[1] / 6) * math.ceil(out.shape[2] / 6) * (c + o) * out.dtype.size
        self.moved[node.name] += 2 * scratch + 2 * 64 * c * o * w.dtype.size
        return 5, scratch

    def _peak(self, returned: set[str]) -> int:
        """The most bytes of activations that are held at once. Inputs and weights are not counted."""
        last = {owner: i for i, (reads, *_) in enumerate(self._held) for owner in reads}
        last |= dict.fromkeys(returned, len(self._held))
        held: dict[str, int] = {}
        live = peak = 0
        for i, (reads, made, n, reuses, temporary) in enumerate(self._held):
            # MLX reuses memory that nothing else refers to: read here, once, and for the last time.
            spent = (a for a in reads if held.get(a) == n and last[a] == i and reads.count(a) == 1)
            reused = next(spent, None) if reuses else None
            if reused is not None:
                live -= held.pop(reused)
            held[made] = n
            live += n
            peak = max(peak, live + temporary)
            for owner in [a for a in {*reads, made} if a in held and last.get(a, i) <= i]:
                live -= held.pop(owner)
        return peak

    def figures(self) -> dict:
        """As `--json` prints them."""
        return {
            "kernels": sum(self.kernels.values()),
            "other_bytes": sum(n for name, n in self.moved.items() if name not in _HEAVY),
            "hidden_copies": sum(n for name, n in self.kernels.items() if name.startswith("copy for ")),
            "float32_kernels": sum(self.wide.values()),
            "peak_bytes": self.peak,
            "kernels_by_operation": dict(self.kernels.most_common()),
            "bytes_by_operation": dict(self.moved.most_common()),
            "float32_by_operation": dict(self.wide.most_common()),
            "flops": dict(self.flops),
        }


def _norm_reads(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether MLX's norms read rows that lie like this without a copy."""
    return _whole(shape, strides) and strides[-1] == 1 and (strides[-2] in (0, shape[-1]) or shape[-2] == 1)


# ---- the networks of a model


def step(pipe: Pipeline, request: Request) -> Graph:
    """The graph of one call of the denoiser, as the pipeline prepares it for a short prompt."""
    model, passes = pipe.description, pipe.description.passes(request)
    net, dtype = _bare(pipe, model.family.denoiser)
    shape = (1, model.text.tokens, model.net.context)
    pooled = getattr(model.net, "pooled", None)
    if getattr(model.net, "added", None) is not None:
        sizes = 5 if model.text.scores is not None else 6
        pooled = model.net.added - sizes * model.net.added_time
    text = Text(mx.zeros(shape, dtype), None if pooled is None else mx.zeros((1, pooled), dtype))
    conds = conditioning.prepare(model, net, request, [_TIME], [text] * passes, both=True)
    channels = model.latent_channels + model.row.beside // model.family.patch**2
    x = mx.zeros((passes * request.count, *model.latent_size(request), channels), dtype)
    if model.flow:
        net.release_modulation()
    tree = {"x": x, "cond": conds.get("both", conds["cond"]), "weights": net.parameters()}
    return graph(lambda t: net.update(t["weights"])(t["x"], _TIME, **t["cond"]), tree)


def decoding(pipe: Pipeline, request: Request) -> Graph:
    """The graph of the decoder of one picture."""
    vae, dtype = _bare(pipe, "vae")
    z = mx.zeros((1, *pipe.description.latent_size(request), pipe.description.latent_channels), dtype)
    tile = memory.TILE if pipe.low_memory else None
    tree = {"z": z, "weights": vae.parameters()}
    return graph(lambda t: vae.update(t["weights"]).decode(t["z"], tile=tile), tree)


def _bare(pipe: Pipeline, name: str) -> tuple[nn.Module, mx.Dtype]:
    """A network, and the dtype it computes in. Its random weights are never made."""
    net = pipe.networks.open(name)
    return net, dtype_of(net)


def measure(pipe: Pipeline, request: Request) -> dict:
    """The figures of a step and of the decoder."""
    model, made = pipe.description, {"step": step(pipe, request), "decode": decoding(pipe, request)}
    return {
        "mlxdiff": __version__,
        "mlx": metadata.version("mlx"),
        "model": pipe.name,
        **model.recipe.values(),
        "vae_dtype": component_dtype(model.family, "vae", model.recipe.dtype),
        "width": request.width,
        "height": request.height,
        "batch": model.passes(request),
        "low_memory": pipe.low_memory,
        # The run reads each step's latents once; a wait inside of a network would come on top.
        **{part: {"waits": 1 + g.waits} | Tally(g).figures() for part, g in made.items()},
    }


_ROWS = (
    ("kernels", "kernels", "{:,}", "launches"),
    ("other traffic", "other_bytes", "{:.1f} GB", "read and written outside products, convolutions and attention"),
    ("hidden copies", "hidden_copies", "{:,}", "of inputs that lie in memory as a kernel cannot read them"),
    ("float32", "float32_kernels", "{:,}", "kernels that write a large array in float32"),
    ("activations", "peak_bytes", "{:.2f} GB", "the most that is held at once, besides weights and inputs"),
    ("waits", "waits", "{:,}", "of Python for the GPU"),
)


def table(facts: dict) -> str:
    """The figures as an aligned table."""
    f, parts = facts, ("step", "decode")
    lines = [
        f"{f['model']}, {Recipe(f['dtype'], f['bits'])}, decoder {f['vae_dtype']}, {f['width']}x{f['height']}, "
        f"batch {f['batch']}" + (", low memory" if f["low_memory"] else ""),
        "counted from the graphs for MLX's Metal backend: lower bounds, nothing was run",
        "",
        f"{'':14}{'one step':>12}{'decode':>12}",
    ]
    for name, key, form, what in _ROWS:
        values = (f[part][key] / 1e9 if "GB" in form else f[part][key] for part in parts)
        lines.append(f"{name:14}" + "".join(f"{form.format(v):>12}" for v in values) + f"   {what}")
    for part in parts:
        moved = f[part]["bytes_by_operation"].items()
        most = [f"{name} {n / 1e9:.1f} GB" for name, n in moved if name not in _HEAVY][:4]
        launched = [f"{n} {name}" for name, n in list(f[part]["kernels_by_operation"].items())[:4]]
        lines += ["", f"{part:14}most kernels: {', '.join(launched)}", f"{'':14}most traffic: {', '.join(most)}"]
    return "\n".join(lines)
