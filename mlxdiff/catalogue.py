"""`mlxdiff models`: lists the named models with their memory, what fits this machine, and the built-in model's
words."""

import sys
import textwrap

from . import advice, builtin, memory
from .console import Parser, run, say
from .errors import Error, did_you_mean
from .families import ADAPTERS, DEFAULT, FAMILIES, MODELS, Beside, Fast, Model, Word, fitting
from .guides import MASKED
from .recipe import WHOLE, default_dtype, recipe

# The table's columns: (bits, whether --low-memory); bits None means 16 bits, not quantized.
COLUMNS = ((4, True), (4, False), (8, False), (None, False))
# Settings that make a model fit, from those that give up least to those that give up most.
_WAYS = ((None, False), (None, True), (8, False), (8, True), (6, True), (4, False), (4, True), (3, True))
_STAGES = memory.Peaks("reading the prompt", "drawing the steps", "decoding the picture")


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="mlxdiff models", description="List the named models, or describe one.")
    p.add_argument("name", nargs="?", metavar="NAME", help=f"describe this model; {builtin.NAME} also lists its words")
    what = "list the networks that guide or change models, by their names"
    p.add_argument("--adapters", action="store_true", help=what)
    args = p.parse_args(argv)
    return run("mlxdiff models", lambda: adapters(args.name) if args.adapters else chosen(args.name))


def chosen(name: str | None) -> int:
    return everything() if name is None else one(name)


def adapters(name: str | None) -> int:
    """List the networks that guide or change a named model, or all models."""
    model = None if name is None else _model(name)
    rows = ADAPTERS if model is None else {(model.family.name, n): row for n, row in _beside(model).items()}
    say(f"{'for':22} {'name':20} {'kind':12} {'download':>10}  {'licence':27} hub id")
    for (of, called), row in rows.items():
        place = row.repo if row.file is None else f"{row.repo}/{row.file}"
        size = f"{row.size + row.encoder:.2f} GB"
        if row.repo is None:
            size, place = "none", "in the package"
        say(f"{FAMILIES[of].title:22} {called:20} {row.kind:12} {size:>10}  {row.licence:27} {place}")
    say('\nTo use one: mlxdiff generate "a lighthouse" -m sd15 --control canny edges.png 0.8')
    say('or, with the built-in model: mlxdiff generate "a red house" --control sketch drawing.png')
    say(f"inpaint reads the start image and its mask: -i photo.png --mask door.png --control inpaint {MASKED}")
    say('or, if it reads a picture: mlxdiff generate "a lighthouse" -m sd15 --reference ip-adapter photo.png 0.6')
    say('or, if it is a LoRA: mlxdiff generate "a lighthouse" -m sd15 --lora lcm')
    say('or, with a word of the package: mlxdiff generate "a <teal> house" --embedding teal')
    words = {called: row for (_, called), row in rows.items() if isinstance(row, Word)}
    if words:
        say("\nThese were taught, and count where the prompt has their word:")
        for called, row in words.items():
            say(f"{called:27} {row.word:20} --embedding {called}")
    fast = {key: row for key, row in rows.items() if isinstance(row, Fast)}
    if fast:
        say("\nThese LoRAs bring settings, which are used where you give no others; most draw in few steps:")
    for (of, called), row in fast.items():
        scale = "" if row.scale == 1 else f", scale {row.scale:g}"
        wants = f"{row.steps:2} steps, guidance {row.guidance:<3g} {row.sampler:15} {row.schedule}{scale}"
        say(f"{FAMILIES[of].title:27} {called:12} {wants}")
    return 0


def _beside(model: Model) -> dict[str, Beside]:
    """The networks with names that were made for models like this one."""
    return fitting(model.family, model.networks[model.family.denoiser])


def everything() -> int:
    say(f"{'':20} {'default':>13} {'':>10}   estimated GB of memory at")
    columns = f"{'size':>7} {'steps':>5} {'download':>10}  {'4 low':>6} {'4':>5} {'8':>5} {'16 bits':>8}   licence"
    say(f"{'name':20} {columns}")
    for name, m in MODELS.items():
        low, four, eight, sixteen = map(gigabytes, on_a_mac(name))
        figures = f"{low:>6} {four:>5} {eight:>5} {sixteen:>8}"
        row = m.family.variants[m.variant]
        also = "; edits pictures" if row.edits else "; needs a mask" if row.inpaints else ""
        also = "; needs a control picture" if "control" in row.reads else also
        drawn = f"{m.defaults.size:7} {m.defaults.steps:5}"
        say(f"{name:20} {drawn} {_download(name):>10}  {figures}   {m.licence}{also}")
    families = [f for f in FAMILIES.values() if any(not v.needs for v in f.variants.values())]
    titles = textwrap.fill(", ".join(f.title for f in families), 100)
    say("\nMemory: the peak of one picture of the default size on a Mac; 4 low is -q 4 --low-memory.")
    say("mlxdiff models NAME says what fits this machine; mlxdiff models --adapters lists the networks that guide.")
    say(f"\nBesides these, mlxdiff draws with any hub repository, folder, .safetensors or .gguf file of\n{titles}.")
    return 0


def one(name: str) -> int:
    m = _model(name)
    d = m.defaults
    say(f"{name}: {m.title}")
    say(f"{'licence':10} {m.licence}")
    place = "in the package" if m.repo is None else f"{_download(name)} from {m.repo}"
    say(f"{'download':10} {place}{', gated: accept its licence there first' if m.gated else ''}")
    guidance = f"guidance {d.guidance:g}" if d.guidance else "no guidance"
    say(f"{'draws':10} {d.size}x{d.size} in {d.steps} step{'s' if d.steps > 1 else ''}, {guidance}")
    row = m.family.variants[m.variant]
    if row.edits:
        say(f"{'edits':10} {'a picture' if row.edits == 1 else f'up to {row.edits} pictures'}: -i FILE")
    if row.inpaints:
        say(f"{'needs':10} a picture and a mask: -i FILE --mask FILE, or -i FILE --outpaint LEFT TOP RIGHT BOTTOM")
    if "control" in row.reads:
        say(f"{'needs':10} a control picture: --control FILE")
    others = _beside(m)
    if others:
        listed = ", ".join(others) if len(others) <= 8 else f"{len(others)} networks and LoRAs"
        say(f"{'beside it':10} {listed}: mlxdiff models --adapters {name}")
    if name in builtin.NAMES:
        for kind, words in builtin.vocabulary().items():
            say(f"{kind:10} {', '.join(words)}")
    say("\n".join(_advice(name)))
    return 0


def _model(name: str) -> Model:
    if name not in MODELS and any(name == called for _, called in ADAPTERS):
        raise Error(
            f"{name} guides or changes a model, and is none itself.", "`mlxdiff models --adapters` lists such networks."
        )
    if name not in MODELS:
        raise Error(f"There is no model named {name!r}.", f"{did_you_mean(name, MODELS, 3)}`mlxdiff models` lists all.")
    return MODELS[name]


def on_a_mac(name: str) -> list[float]:
    """Gigabytes at the model's default size, for each of COLUMNS."""
    ways = [(recipe(bits, "bfloat16", text_bits=WHOLE if bits is None else None), low) for bits, low in COLUMNS]
    return [memory.peak(advice.named(name, how, low), gpu=True) / 1e9 for how, low in ways]


def gigabytes(n: float) -> str:
    return f"{n:.1f}" if n >= 0.1 else f"{n:.2f}"


def _download(name: str) -> str:
    m = MODELS[name]
    return "none" if m.repo is None else f"{m.download:.1f} GB"


def on(machine: advice.Machine, name: str, dtype: str) -> list[tuple[str, float, bool]]:
    """For each of _WAYS: its flags, the gigabytes it takes on a machine, and whether they fit."""
    rows = []
    for bits, low in _WAYS:
        workload = advice.named(name, recipe(bits, dtype), low)
        rows.append((_flags(bits, low), memory.peak(workload, machine.gpu) / 1e9, advice.fits(workload, machine)))
    return rows


def _flags(bits: int | None, low: bool) -> str:
    return " ".join(([] if bits is None else [f"-q {bits}"]) + (["--low-memory"] if low else []))


def _table(machine: advice.Machine, name: str, dtype: str, rows: list[tuple[str, float, bool]]) -> list[str]:
    """Lines about the rows of `on`. Where fewer bits lower no peak, one sentence stands for the rows."""
    kind = "its GPU" if machine.gpu else "a CPU"
    within = f" of {machine.memory / 1e9:.1f} GB" + (f", {machine.budget / 1e9:.1f} for the GPU" if machine.gpu else "")
    lines, seen = [f"\nThe peak of one picture on this machine ({kind}{within}; {dtype}), and when it comes:"], set()
    for (bits, low), (flags, size, ok) in zip(_WAYS, rows, strict=True):
        if (low, gigabytes(size)) not in seen:
            peaks = memory.peaks(advice.named(name, recipe(bits, dtype), low), machine.gpu)
            when = _STAGES[peaks.index(max(peaks))]
            lines.append(
                f"  {flags or 'as it is':18} {gigabytes(size):>6} GB  {when:21} {'fits' if ok else 'too large'}"
            )
        seen.add((low, gigabytes(size)))
    if len(lines) <= len(rows):
        lines.append("Fewer bits lower the peak no further: what sets it is not quantized.")
    if not machine.gpu:
        figures = zip(COLUMNS, on_a_mac(name), strict=True)
        macs = ", ".join(f"{_flags(*column) or '16 bits'} {gigabytes(size)}" for column, size in figures)
        lines.append(f"A Mac's GPU takes less, in GB: {macs}.")
    return lines


def _advice(name: str) -> list[str]:
    machine, dtype = advice.this_machine(), default_dtype(MODELS[name].family)
    rows, prompt = on(machine, name, dtype), "a red house under a full moon"
    lines = _table(machine, name, dtype, rows)
    best = next((flags for flags, _, ok in rows if ok), None)
    if best is None:
        return [*lines, "\nNone of these fits. A smaller picture takes less: -W 512 -H 512."]
    ends = f"{'' if name == DEFAULT else f' -m {name}'}{' ' if best else ''}{best}"
    row = MODELS[name].family.variants[MODELS[name].variant]
    if row.inpaints:
        return [*lines, f'\nRecommended: mlxdiff generate "a red door" -i photo.png --mask door.png{ends}']
    if "control" in row.reads:
        ends = f" --control picture.png{ends}"
    also = [f'To edit: mlxdiff generate "make it winter" -i photo.png{ends}'] if row.edits else []
    return [*lines, f'\nRecommended: mlxdiff generate "{prompt}"{ends}', *also]


if __name__ == "__main__":
    sys.exit(main())
