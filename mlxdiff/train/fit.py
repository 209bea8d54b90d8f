"""The training loop. `fit` yields one Report for each step. It saves regularly and when it stops, by its end, Ctrl-C or
an error; it continues from a saved state. A step's batch follows from its number, so a resumed run is the same run."""

import csv
import errno
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
from PIL import Image, ImageDraw

from .. import foreign, metadata, whole
from ..errors import Error
from ..machines import Machines
from ..whole import PART, appearing

# Muon trains matrices between hidden layers; AdamW trains the first and last layers, embeddings, norms and biases.
ENDS = ("conv_in", "conv_out", "quant_conv", "embedding.", "time_embedding.linear_1")

_LINE = re.compile(r"(\d{1,9}),\d+(\.\d+)?(e[+-]\d\d)?,[^,]+,[^,]+$", re.ASCII)  # of the log: a step and its loss first


@dataclass(frozen=True)
class Plan:
    steps: int
    rate: float
    optimizer: str  # "adamw" or "muon"
    warmup: int  # steps
    decay: float  # after this share of the steps, the rate falls to 0; 1: it stays
    clip: float  # maximum of the gradient's norm
    ema: float  # the largest share of the average that one step keeps
    save_every: int
    weight_decay: float = 0.0  # of AdamW
    accumulate: int = 1  # batches of a step, one after the other; the mean of their gradients counts


class Report(NamedTuple):
    step: int  # done so far
    loss: float
    rate: float
    seconds: float  # duration of this step


def optimizer(kind: str, weight_decay: float = 0.0) -> opt.Optimizer:
    adamw = opt.AdamW(0.0, betas=[0.9, 0.99], weight_decay=weight_decay, bias_correction=True)
    if kind == "adamw":
        return adamw
    inner = opt.Muon(0.0, momentum=0.95, weight_decay=0.0)
    return opt.MultiOptimizer([inner, adamw], [lambda name, p: p.ndim >= 2 and not any(e in name for e in ENDS)])


def set_rate(chosen: opt.Optimizer, rate: float) -> None:
    """Set the learning rate. Muon's steps all have the same size; beside it, AdamW gets about a seventh."""
    if isinstance(chosen, opt.MultiOptimizer):
        chosen.optimizers[0].learning_rate, chosen.optimizers[1].learning_rate = rate, 0.15 * rate
    else:
        chosen.learning_rate = rate


def rate_at(plan: Plan, step: int) -> float:
    left = (plan.steps - step) / (plan.steps * (1 - plan.decay)) if plan.decay < 1 else 1.0
    return plan.rate * min(1.0, (step + 1) / max(1, plan.warmup), left)


def fit(
    model: nn.Module,
    loss: Callable,
    batch: Callable[[int], tuple],
    plan: Plan,
    folder: Path,
    others: Machines | None = None,
) -> Iterator[Report]:
    """loss(model, *batch(number)) -> scalar; a step takes `accumulate` batches. The model is trained in place;
    `averaged` reads its mean from the folder. What is frozen of a model is neither changed nor saved. others: the
    machines of this run, which divide a step's batches; the state of the first counts."""
    check_shares(plan.accumulate, 1 if others is None else others.size)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = optimizer(plan.optimizer, plan.weight_decay)
    chosen.init(model.trainable_parameters())
    step, mean = _begun(folder / "state.safetensors", model, chosen, others)
    gradient, saved = partial(nn.value_and_grad(model, loss), model), step
    sound = _state(model, chosen, mean)  # after `step` steps: what is saved when the run stops within the next one
    with writing(folder):
        _cut_log(folder / "log.csv", step)
    try:
        while step < plan.steps:
            began = time.perf_counter()
            rate = rate_at(plan, step)
            set_rate(chosen, rate)
            value, grads = _mean_gradient(gradient, batch, step, plan.accumulate, others)
            grads, _ = opt.clip_grad_norm(grads, plan.clip)
            chosen.update(model, grads)
            keep = min(plan.ema, (step + 1) / (step + 12))  # at first the average follows closely
            mean = tree_map(lambda m, p, k=keep: m + (1 - k) * (p - m), mean, model.trainable_parameters())
            mx.eval(value, model.trainable_parameters(), chosen.state, mean)
            report = Report(step + 1, value.item(), rate, time.perf_counter() - began)
            if not math.isfinite(report.loss):
                saved = step  # what it was computed with may not be sound: the last saved state stays
                problem = f"The loss of step {report.step} is not finite."
                raise Error(problem, "Lower the rate, or continue with float32.")
            with writing(folder), open(folder / "log.csv", "a", newline="") as file:
                csv.writer(file).writerow([report.step, f"{report.loss:.6g}", f"{rate:.4g}", f"{report.seconds:.3f}"])
            step, sound = report.step, _state(model, chosen, mean)
            if step - saved >= plan.save_every:
                _save(folder, sound, step)
                saved = step
            yield report
    finally:
        model.update(sound["model"])
        if step > saved:
            _save(folder, sound, step)


def _begun(file: Path, model: nn.Module, chosen: opt.Optimizer, others: Machines | None) -> tuple[int, dict]:
    """The step at which a run begins, and the mean of its weights: those of a saved state, if there is one. On several
    machines, that of the first counts."""
    step, mean = 0, tree_map(mx.array, model.trainable_parameters())
    if file.exists():
        step, mean = _restore(file, model, chosen)
    if others is not None:
        mine = mx.array(step), model.trainable_parameters(), chosen.state, mean
        first, trained, chosen.state, mean = others.same(mine)
        model.update(trained)
        step = first.item()
    return step, mean


def _mean_gradient(
    gradient: Callable, batch: Callable[[int], tuple], step: int, accumulate: int, others: Machines | None
) -> tuple[mx.array, dict]:
    """The mean loss and gradient of a step's batches, of which each machine computes its share."""
    rank, size = (0, 1) if others is None else (others.rank, others.size)
    first, share = step * accumulate + rank, accumulate // size
    value, grads = gradient(*batch(first))
    for k in range(1, share):
        mx.eval(value, grads)  # what it took is free again before the next batch
        more, again = gradient(*batch(first + k * size))
        value, grads = value + more, tree_map(mx.add, grads, again)
    if share > 1:
        value, grads = value / share, tree_map(lambda g: g / share, grads)
    return (value, grads) if others is None else others.mean((value, grads))


def check_shares(accumulate: int, machines: int) -> None:
    """Raise unless a step's batches can be divided over so many machines."""
    if accumulate % machines:
        problem = f"A step has {accumulate} batch{'es' * (accumulate > 1)}, for {machines} machines."
        raise Error(problem, f"Use `accumulate={machines}`, or a multiple of it: each machine takes its share.")


def same_run(folder: Path, settings: dict, longer: bool = False) -> None:
    """Raise unless the folder is empty or holds a run with the same settings: other settings would mix two runs. Then
    note them there. longer: it may have more steps now."""
    file = folder / "recipe.json"
    with writing(folder):
        str(folder).encode()  # MLX writes no other names
        if file.exists():
            before = foreign.read_json(file, "Give a new folder.")
            stored = {k: before.get(k) for k in settings if settings[k] != before.get(k)}
            grown = longer and [*stored] == ["steps"] and type(stored["steps"]) is int
            if stored and not (grown and stored["steps"] < settings["steps"]):
                # A list of fingerprints would say nothing.
                named = [
                    f"{k} {v}" if k != "pictures" or type(v) is int else "other pictures" for k, v in stored.items()
                ]
                fix = "Give the same settings, or another `output`."
                raise Error(f"{folder} holds a run with {', '.join(named)}.", fix)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise Error(f"{folder} holds something other than a run.", "Give a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, indent=1) + "\n")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Make one Error of whatever keeps a file of a run from being written."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as e:  # MLX raises the second, a name that no file can have the third
        why = str(getattr(e, "strerror", None) or e).rstrip(".")
        fix = "Check the free space and the permissions, or give another `output`."
        raise Error(f"{place} cannot be written: {why}.", fix) from None


def write_arrays(file: Path, arrays: dict[str, mx.array], header: dict[str, str]) -> None:
    """Write a .safetensors file completely or not at all, over an older one."""
    with writing(file), appearing(file) as part:
        mx.save_safetensors(str(part), arrays, header)


def write_text(file: Path, text: str) -> None:
    """The same for a text: a full disk must not cost the notes of a run that is continued."""
    with writing(file):
        whole.write(file, text.encode("utf-8"))


def write_picture(file: Path, image: Image.Image, source: str | None = None) -> None:
    """The same for a PNG. source: what IPTC calls it, if a model drew it."""
    with writing(file), appearing(file) as part:
        image.save(part, "PNG", **({} if source is None else metadata.options("PNG", {}, source)))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Train in a folder that no other process trains in: two would mix their runs. The system ends this however the
    process ends. What a process that was killed had half written is removed."""
    with writing(folder):
        handle = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK)  # a pipe there would wait for ever
    with os.fdopen(handle, "wb"):
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                problem = f"Another process trains in {folder}."
                raise Error(problem, "Wait until it ends, or give another `output`.") from None
        else:  # on a drive without locks nobody knows whose they are
            for part in [p for p in folder.rglob(f".*{PART}*") if p.is_file()]:
                part.unlink(missing_ok=True)
        yield


def averaged(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the running mean of its weights, as last saved."""
    arrays = mx.load(str(folder / "state.safetensors"))
    model.update(tree_unflatten([(k[5:], v) for k, v in arrays.items() if k.startswith("mean.")]))
    return model


def _state(model: nn.Module, chosen: opt.Optimizer, mean: dict) -> dict[str, dict]:
    """What a run is continued from. The arrays are not copied; the optimizer's dictionary is, since it is changed."""
    return {"model": model.trainable_parameters(), "optimizer": tree_map(lambda x: x, chosen.state), "mean": mean}


def _save(folder: Path, state: dict[str, dict], step: int) -> None:
    arrays = {f"{name}.{k}": v for name, tree in state.items() for k, v in tree_flatten(tree)}
    write_arrays(folder / "state.safetensors", arrays, {"step": str(step)})
    plot(folder / "log.csv", folder / "loss.png")


def _restore(path: Path, model: nn.Module, chosen: opt.Optimizer) -> tuple[int, dict]:
    def saved(name: str, tree: dict) -> dict:
        return tree_map_with_path(lambda at, now: _alike(arrays[f"{name}.{at}"], now), tree)

    try:
        foreign.check_regular(path)
        arrays, metadata = mx.load(str(path), return_metadata=True)
        step, trained = int(metadata["step"]), model.trainable_parameters()
        if step < 0:
            raise ValueError(f"it is of step {step}")
        model.update(saved("model", trained))
        chosen.state = saved("optimizer", chosen.state)
        return step, saved("mean", trained)
    except (KeyError, OSError, RuntimeError, ValueError) as e:
        raise Error(f"{path} cannot be continued: {e}.", "Start again in a new folder.") from None


def _alike(found: mx.array, now: mx.array) -> mx.array:
    """What is found in a saved state. Raises ValueError unless it can take the place of what is there now."""
    if found.shape != now.shape or found.dtype != now.dtype:
        raise ValueError(f"it holds {found.dtype} {found.shape} in the place of {now.dtype} {now.shape}")
    if not mx.isfinite(found).all().item():
        raise ValueError("it holds numbers that are not finite")
    return found


def _cut_log(path: Path, step: int) -> None:
    """Remove log lines that are newer than the saved state, and what is no line of a log."""
    rows = foreign.read_text(path, "Remove it.").splitlines()[1:] if path.exists() else []
    kept = [r for r in rows if (m := _LINE.match(r)) and int(m[1]) <= step]
    write_text(path, "\n".join(["step,loss,rate,seconds", *kept]) + "\n")


def plot(log: Path, picture: Path) -> None:
    """Plot the loss over the steps, with a logarithmic axis: single steps in grey, their running mean in red."""
    losses = [max(float(row["loss"]), 1e-9) for row in csv.DictReader(log.open())]  # 0 has no logarithm
    if len(losses) < 2:
        return
    means, mean = [], losses[0]
    for k, value in enumerate(losses):
        mean += (value - mean) / min(k + 1, 50)
        means.append(mean)
    width, height, low, high = 640, 320, min(losses), max(losses)
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)

    def points(values):
        span = max(math.log(high / low), 1e-9)
        for k, v in enumerate(values):
            yield 50 + (width - 60) * k / (len(values) - 1), height - 20 - (height - 40) * math.log(v / low) / span

    pen.line(list(points(losses)), fill=(200, 200, 200))
    pen.line(list(points(means)), fill=(200, 40, 40), width=2)
    pen.text((4, 12), f"{high:.3g}", fill="black")
    pen.text((4, height - 28), f"{low:.3g}", fill="black")
    pen.text((width - 80, height - 14), f"{len(losses)} steps", fill="black")
    write_picture(picture, image)
