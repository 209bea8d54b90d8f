"""`mlxdiff tune`: measures equivalent ways to compute a layer on this machine, and keeps those that are faster. Each is
first compared with the reference, in float32 and in the dtypes that this machine works in, and is never chosen if it
deviates. The choices are kept in the cache, by chip, system and version of MLX."""

import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from . import foreign, recipe
from .console import Parser, run, say, say_json
from .errors import Error
from .models import cpu, layers, ways
from .store import cache

FORMAT = 1
GAIN = 1.05  # a way must be faster by this factor to be chosen
SECONDS = 0.6  # for the clock of one case, after the comparison
_ROUNDS = 5  # of a case at least, if they fit into its seconds
# How far results may be apart, as a part of the largest value: float32's roundings in sums of some thousand terms.
_EXACT = 1e-5
_UNIT = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
_AGAIN = "`mlxdiff tune` makes it again."

Arrays = tuple[mx.array, ...]


class Way(NamedTuple):
    """One alternative: a row of WAYS."""

    name: str  # in ways.STANDARD
    devices: tuple[str, ...]  # "cpu", "gpu"
    what: str
    reference: Callable[..., mx.array]
    alternative: Callable[..., mx.array]
    inputs: Callable[..., Arrays]  # of the sizes of a case and a dtype
    cases: dict[str, tuple[tuple[int, ...], ...]]  # device -> sizes of each case


class Measured(NamedTuple):
    way: str
    sizes: tuple[int, ...]
    chosen: bool
    why: str
    seconds: tuple[float, float] | None  # of the reference and of the alternative; None: they were not timed
    error: float | None  # of the alternative in float32


def _normal(*shape: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _map(c: int, pixels: int, dtype: mx.Dtype) -> Arrays:
    edge = math.isqrt(pixels)
    weight = _normal(c, 3, 3, c, dtype=dtype, seed=1) / math.sqrt(9 * c)
    return _normal(1, edge, edge, c, dtype=dtype), weight, _normal(c, dtype=dtype, seed=2)


def _heads(d: int, dtype: mx.Dtype, tokens: int = 4096, heads: int = 4) -> Arrays:
    return tuple(_normal(1, heads, tokens, d, dtype=dtype, seed=i) for i in range(3))


def _quantized(bits: int, width: int, rows: int, dtype: mx.Dtype) -> Arrays:
    weight = _normal(width, width, dtype=dtype, seed=1) / math.sqrt(width)
    return _normal(rows, width, dtype=dtype), *mx.quantize(weight, group_size=64, bits=bits)


def _bits(x: mx.array, packed: mx.array) -> int:
    return 32 * packed.shape[1] // x.shape[1]


def _product(x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    return mx.quantized_matmul(x, packed, scales, biases, group_size=64, bits=_bits(x, packed))


def _whole(x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    return ways.dequantize(x, packed, scales, biases, 64, _bits(x, packed), "affine")


def _convolved(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.conv2d(x, weight, padding=1) + bias


def _attend(way: str, on: bool, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention with this way switched on or off."""
    with _switched(way, on):
        return layers.attention(q, k, v)


def _activated(on: bool, x: mx.array) -> mx.array:
    with _switched("activations", on):
        return layers.geglu(x, layers.silu(x))


def _normed(way: str, on: bool, x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    norm = layers.GroupNorm(8, x.shape[-1], 1e-5, silu=True)
    norm.weight, norm.bias = weight[0, 0, 0], bias
    with _switched(way, on):
        return norm(x)


class _switched:
    """Use a way, or do not, while a graph is made; then what was measured counts again."""

    def __init__(self, way: str, on: bool):
        self.way, self.on = way, on

    def __enter__(self) -> None:
        self.before = dict(ways._measured), ways.STANDARD[self.way]
        ways.use({})
        ways.STANDARD[self.way] = self.on

    def __exit__(self, *_) -> None:
        measured, ways.STANDARD[self.way] = self.before
        ways.use(measured)


def _pair(f: Callable, *args) -> tuple[Callable, Callable]:
    return partial(f, *args, False), partial(f, *args, True)


WAYS = (
    Way("activations", ("cpu",), "SiLU and GELU as polynomials", *_pair(_activated),
        lambda n, dtype: (_normal(n // 256, 256, dtype=dtype),), {"cpu": ((2**20,),)}),
    Way("group norm", ("cpu",), "group norm in parts of the map", *_pair(_normed, "group norm"), _map,
        {"cpu": ((64, 4096),)}),
    Way("attention", ("cpu",), "softmax as a polynomial, in parts", *_pair(_attend, "attention"),
        partial(_heads, tokens=1024), {"cpu": ((40,),)}),
    Way("convolution", ("cpu",), "a convolution as nine products", _convolved, cpu.conv3x3, _map,
        {"cpu": ((64, 16384),)}),
    Way("unfold", ("gpu",), "a convolution as one product of an unfolded map", _convolved, ways.unfold, _map,
        {"gpu": ((512, 4096), (640, 1024), (640, 4096), (1280, 256), (1280, 1024))}),
    Way("unpadded", ("gpu",), "heads of 40 not padded to 64", *_pair(_attend, "unpadded"), _heads, {"gpu": ((40,),)}),
    Way("wider", ("gpu",), "heads of 72 and 80 padded to 96", *_pair(_attend, "wider"), _heads,
        {"gpu": ((72,), (80,))}),
    Way("moments", ("gpu",), "a group norm's sums by one kernel", *_pair(_normed, "moments"), _map,
        {"gpu": ((128, 2**18), (320, 16384), (640, 4096), (1280, 1024))}),
    Way("dequantize", ("cpu", "gpu"), "quantized weights made whole before a product", _product, _whole, _quantized,
        {"cpu": tuple((bits, 768, rows) for bits in (4, 8) for rows in (64, 256)),
         "gpu": tuple((bits, width, rows) for bits in (4, 8) for width in (1280, 3072) for rows in (1024, 4096))}),
)  # fmt: skip


# --- measuring


def compare(way: Way, sizes: tuple[int, ...], dtypes: tuple[mx.Dtype, ...]) -> tuple[str, float]:
    """What keeps the alternative from being chosen, or "", and its error in float32. In 16 bits, both are compared with
    the reference in float32, on the same rounded numbers: the alternative may be off half again as much, or by one
    rounding."""
    error = 0.0
    for dtype in (mx.float32, *dtypes):
        inputs = way.inputs(*sizes, dtype)
        true = way.reference(*(x.astype(mx.float32) if x.dtype in _UNIT else x for x in inputs))
        theirs, ours = way.reference(*inputs), way.alternative(*inputs)
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"it gives {tuple(ours.shape)} {ours.dtype}, not {tuple(theirs.shape)} {theirs.dtype}", math.inf
        off = _off(ours, true)
        allowed = _EXACT if dtype == mx.float32 else 1.5 * _off(theirs, true) + _UNIT[dtype]
        if not off <= allowed:  # also of NaN
            return f"it deviates by {off:.1e} in {_name(dtype)}, where {allowed:.1e} is allowed", off
        error = off if dtype == mx.float32 else error
    return "", error


def _off(x: mx.array, true: mx.array) -> float:
    return (mx.abs(x.astype(mx.float32) - true).max() / mx.abs(true).max()).item()


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def measure(way: Way, sizes: tuple[int, ...], dtypes: tuple[mx.Dtype, ...], clock: Callable[[], float]) -> Measured:
    """Compare one case, and time it if it is equal. Both ways take turns, and the shortest times count: other programs
    disturb both."""
    try:
        wrong, error = compare(way, sizes, dtypes)
        if wrong:
            return Measured(way.name, sizes, False, wrong, None, error)
        inputs = way.inputs(*sizes, dtypes[0] if dtypes else mx.float32)
        mx.eval(inputs)
        theirs, ours, end = [], [], time.perf_counter() + SECONDS
        while len(ours) < 2 or (len(ours) < _ROUNDS and time.perf_counter() < end):
            for f, times in ((way.reference, theirs), (way.alternative, ours)):
                begin = clock()
                mx.eval(f(*inputs))
                times.append(clock() - begin)
    except (RuntimeError, ValueError, TypeError) as e:  # what MLX raises, such as for a kernel that does not compile
        return Measured(way.name, sizes, False, f"it failed: {' '.join(str(e).split()):.120}", None, None)
    seconds = min(theirs), min(ours)
    ratio = seconds[0] / max(seconds[1], 1e-9)
    faster = ratio >= GAIN
    return Measured(way.name, sizes, faster, f"{ratio:.2f} times as fast", seconds, error)


def cases() -> list[tuple[Way, tuple[int, ...]]]:
    """Those of this device."""
    device = "gpu" if mx.default_device().type == mx.gpu else "cpu"
    return [(way, sizes) for way in WAYS if device in way.devices for sizes in way.cases[device]]


def measured() -> Iterator[Measured]:
    """All cases, one by one. On a CPU, seconds are those of the processor, which other programs disturb less."""
    gpu = mx.default_device().type == mx.gpu
    dtypes = tuple(dict.fromkeys((recipe.DTYPES[recipe.default_dtype()], mx.float16))) if gpu else ()
    for way, sizes in cases():
        yield measure(way, sizes, dtypes, time.perf_counter if gpu else time.process_time)
        mx.clear_cache()


# --- what is kept


def machine() -> str:
    """What the choices depend on: chip, system, version of MLX."""
    info = mx.device_info()
    chip = str(info.get("device_name") or info.get("architecture") or platform.processor() or platform.machine())
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()
    return f"{chip} ({mx.default_device().type.name}), {system}, MLX {mx.__version__}"


def keep(found: list[Measured]) -> None:
    choices: dict[str, list] = {}
    for m in found:
        choices.setdefault(m.way, []).append([list(m.sizes), m.chosen])
    try:
        others = _read()
    except Error:  # it is damaged: nothing of it is kept
        others = {}
    cache.write_note(_file(), {"format": FORMAT, "machines": others | {machine(): choices}})


_applied = False


def apply(again: bool = False) -> str:
    """Use the choices that are kept for this machine; they are read once in a process. Returns a sentence if the file
    is not understood, and is ignored, else ""."""
    global _applied
    if _applied and not again:
        return ""
    ways.use({})
    try:
        choices = _read().get(machine(), {})
    except Error as e:
        _applied = True
        return str(e)
    _applied = True
    ways.use({way: {tuple(sizes): on for sizes, on in cases} for way, cases in choices.items()})
    return ""


def known() -> bool:
    """Whether this machine was tuned."""
    try:
        return machine() in _read()
    except Error:
        return False


def _file() -> Path:
    return cache.root() / "tuning.json"


def _read() -> dict[str, dict[str, list]]:
    """The choices of all machines: {machine: {way: [[sizes, chosen], ...]}}."""
    file = _file()
    if not file.exists():
        return {}
    note = foreign.read_json(file, f"It is ignored; {_AGAIN}")
    machines = note.get("machines")
    sound = note.get("format") == FORMAT and isinstance(machines, dict)
    if not sound or not all(_sound(choices) for choices in machines.values()):
        raise Error(f"{file} holds no choices of this version.", f"It is ignored; {_AGAIN}")
    return machines


def _sound(choices) -> bool:
    """Whether these are choices among the cases of WAYS."""
    sizes_of = {way.name: {sizes for of_device in way.cases.values() for sizes in of_device} for way in WAYS}

    def known_case(way: str, case) -> bool:
        pair = isinstance(case, list) and len(case) == 2 and isinstance(case[0], list) and type(case[1]) is bool
        return pair and all(type(n) is int for n in case[0]) and tuple(case[0]) in sizes_of[way]

    def known_cases(way: str, of_way) -> bool:
        few = isinstance(of_way, list) and 0 < len(of_way) <= len(sizes_of.get(way, ()))  # before a long list is read
        return few and all(known_case(way, case) for case in of_way)

    return isinstance(choices, dict) and all(known_cases(way, of_way) for way, of_way in choices.items())


# --- the command


def tune(report: Callable[[int, Measured], None] = lambda done, m: None) -> list[Measured]:
    """Measure, keep the choices, and use them. Stopped before its end, it keeps nothing. report: called after each case
    with the number of cases done."""
    found = []
    for m in measured():
        found.append(m)
        report(len(found), m)
    keep(found)
    apply(again=True)
    return found


def line(m: Measured) -> str:
    """A row of the table."""
    size = " ".join(map(str, m.sizes))
    times = "" if m.seconds is None else "{:8.2f} {:8.2f} ms".format(*(1000 * s for s in m.seconds))
    error = "" if m.error is None or m.seconds is None else f", off by {m.error:.0e}"
    return f"{m.way:12} {size:14} {times:20} {'chosen' if m.chosen else 'not chosen'}: {m.why}{error}"


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="mlxdiff tune", description="Measure equivalent ways to compute on this machine; keep the faster.")
    p.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    p.add_argument("--forget", action="store_true", help="go back to what is set for all machines")
    args = p.parse_args(argv)
    return run("mlxdiff tune", lambda: _forget() if args.forget else _tune(args.json))


def _tune(as_json: bool) -> int:
    if as_json:
        say_json({"machine": machine(), "ways": [m._asdict() for m in tune()]})
        return 0
    say(f"{machine()}, {len(cases())} cases.")
    say("Each way is compared with the reference, then timed against it (reference, way).\n")
    found = tune(lambda done, m: say(line(m)))
    what = {way.name: way.what for way in WAYS}
    used = [what[way] for way in dict.fromkeys(m.way for m in found if m.chosen)]
    say(f"\nUsed from now on: {'; '.join(used) or 'none of them'}. Kept in {_file()}.")
    return 0


def summary() -> str:
    """A sentence about the choices in use; "" if this machine was not tuned."""
    found = ways.measured()
    if not found:
        return ""
    used = [way.what for way in WAYS if found.get(way.name)]
    return f"Tuned for this machine: {'; '.join(used) or 'no other way is faster'}."


def _forget() -> int:
    with cache.writing(_file()):
        _file().unlink(missing_ok=True)
    say("The choices for this machine are forgotten: what is set for all machines counts.")
    return 0


def matrix_units() -> str:
    """What one product of 4096-cubes in float16 says about a GPU; on M5, whether its matrix units seem to be in use.
    "" on a CPU."""
    if mx.default_device().type != mx.gpu:
        return ""
    a = _normal(4096, 4096, dtype=mx.float16)
    mx.eval(a @ a)
    begin = time.perf_counter()
    mx.eval(a @ a)
    return of_matrix_units(str(mx.device_info().get("device_name", "")), 2 * 4096**3 / (time.perf_counter() - begin))


# What M5's GPU cores reach without the matrix units, in FLOP/s: 0.46e12 a core, of 10, 20 and 40 cores at most.
_WITHOUT = {"Apple M5": 4.6e12, "Apple M5 Pro": 9.2e12, "Apple M5 Max": 18.4e12}


def of_matrix_units(chip: str, flops: float) -> str:
    reached = f"A product of 4096-cubes in float16 reaches {flops / 1e12:.1f} TFLOP/s"
    if chip not in _WITHOUT:
        return f"{reached}."
    if flops > _WITHOUT[chip]:
        return f"{reached}: the matrix units of {chip} seem to be in use."
    return f"{reached}: the matrix units of {chip} seem not to be in use. They need macOS 26.2 and MLX's wheel for it."


if __name__ == "__main__":
    sys.exit(main())
