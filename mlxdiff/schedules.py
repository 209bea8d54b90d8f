"""Schedules: how noise grows in training, and the noise levels that a sampler visits. Pure functions in numpy float64.

Discrete: sigma is the noise of a sample in VE form, x = x0 + sigma * noise; the network sees x_vp = x / sqrt(1 +
sigma^2) (Karras et al. 2022). Flow: x = (1 - sigma) * x0 + sigma * noise, and the network sees x itself (Liu et al.
2023). A spacing is a function (schedule, n) -> n descending sigmas; SPACINGS and FLOW_SPACINGS are the tables."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from .errors import Error, did_you_mean

Array = TypeVar("Array")  # a numpy or MLX array
MOST_STEPS = 100_000  # of training; published models have 1000
_MOST_LOG_SHIFT = 20.0  # published models have at most 3; from about 35 all steps are the first one

# ---- the forward process


def betas(kind: str, n: int, start: float, end: float) -> np.ndarray:
    """The variance added at each of n training steps (Ho 2020; Rombach 2022; Nichol 2021; Xu 2022)."""
    if kind == "linear":
        return np.linspace(start, end, n)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, n) ** 2
    if kind == "cosine":
        f = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)
    if kind == "sigmoid":
        return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, n)))
    raise Error(f"There are no betas {kind!r}.", fix="Use linear, scaled_linear, cosine or sigmoid.")


def alpha_bar(betas: np.ndarray) -> np.ndarray:
    """The share of the signal's variance left after each step."""
    return np.cumprod(1 - betas)


def zero_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that the last step is pure noise (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def q_step(x: Array, noise: Array, beta: float) -> Array:
    """One step of the chain, q(x_t | x_{t-1})."""
    return math.sqrt(1 - beta) * x + math.sqrt(beta) * noise


def q_sample(x0: Array, noise: Array, alpha_bar_t: float | Array) -> Array:
    """t steps of the chain at once, q(x_t | x_0) (Ho et al. 2020, eq. 4)."""
    return alpha_bar_t**0.5 * x0 + (1 - alpha_bar_t) ** 0.5 * noise


# ---- the training schedule as samplers read it


@dataclass(frozen=True)
class Grid:
    """How a group of samplers reads the training schedule. diffusers' schedulers differ here, so each sampler has
    one."""

    ve_start: bool  # the first x is noise * sigma, else noise * sqrt(1 + sigma^2)
    whole: bool  # training times are rounded to whole steps
    spare: int  # leading and linspace make this many extra points and drop the lowest
    zero: float  # replaces an alpha_bar of 0 (zero_snr): diffusers has 2^-24, or 0, which is like 2^-48 in float32
    first: bool  # True: ends at sigma(0) if the model says so; False: always ends at 0


KDIFFUSION = Grid(ve_start=True, whole=False, spare=0, zero=2**-24, first=False)  # Euler, Heun and their noisy versions
LOGSNR = Grid(ve_start=False, whole=True, spare=1, zero=2**-24, first=False)  # DPM++ multistep, UniPC
DDPM = Grid(ve_start=False, whole=True, spare=0, zero=2**-48, first=False)  # DDPM, LCM
DDIM = Grid(ve_start=False, whole=True, spare=0, zero=2**-48, first=True)


@dataclass(frozen=True)
class Discrete:
    """A schedule of n training steps, t = 0 ... n - 1, read on a grid."""

    alpha_bar: np.ndarray  # (n,)
    grid: Grid = KDIFFUSION
    offset: int = 0  # added to the leading steps
    final_alpha_one: bool = True  # False: samplers whose grid allows it end at sigma(0)

    @cached_property
    def sigmas(self) -> np.ndarray:  # (n,), ascending
        a = np.where(self.alpha_bar > 0, self.alpha_bar, self.grid.zero)
        return np.sqrt((1 - a) / a)

    @property
    def n(self) -> int:
        return len(self.alpha_bar)

    def sigma(self, t: np.ndarray) -> np.ndarray:
        """The sigma at time t; log sigma is interpolated between training steps."""
        return np.exp(np.interp(t, np.arange(self.n), np.log(self.sigmas)))

    def t(self, sigma: float) -> float:
        """The inverse of sigma(t): exact on training steps, clipped to them beyond either end."""
        t = float(np.interp(math.log(sigma), np.log(self.sigmas), np.arange(self.n)))
        return float(round(t)) if self.grid.whole or abs(t - round(t)) < 1e-4 else t

    def start(self, sigma: float, spacing: str) -> float:
        """The factor of the standard noise that makes the first x."""
        return sigma if self.grid.ve_start and spacing != "leading" else self.spread(sigma)

    def noised(self, x0: Array, noise: Array, sigma: float) -> Array:
        """x at sigma for a start image's latents x0."""
        return x0 + sigma * noise

    def taken(self, steps: int, strength: float) -> int:
        """How many steps, counted from the clean end, redraw a start image. The rounding is diffusers'."""
        return int(steps * strength)

    def spread(self, sigma: float) -> float:
        """The networks see x divided by this."""
        return math.sqrt(1 + sigma**2)

    @property
    def last(self) -> float:
        """The sigma at which a run ends."""
        return float(self.sigmas[0]) if self.grid.first and not self.final_alpha_one else 0.0

    def ends(self, n: int) -> tuple[float, float]:
        """The lowest and the highest of n levels, for spacings between two ends."""
        return self.sigmas[0], self.sigmas[-1]

    @property
    def spacings(self) -> dict[str, "Spacing"]:
        return SPACINGS


@dataclass(frozen=True)
class Flow:
    """Rectified flow: sigma in [0, 1] is also the network's time. A shift above 1 moves the steps to larger sigma
    (Esser et al. 2024, eq. 23)."""

    shift: float = 1.0
    own: str = "linspace"  # the model's spacing, linspace or trailing; it sets the ends of karras, exponential and beta
    n: int = 1000  # training steps: the smallest sigma is 1 / n
    dynamic: bool = False  # whether the picture's size sets the shift; then the training sigmas are not shifted

    last = 0.0

    def t(self, sigma: float) -> float:
        return sigma * self.n / 1000  # the networks count in thousandths

    def start(self, sigma: float, spacing: str) -> float:
        return 1.0

    def noised(self, x0: Array, noise: Array, sigma: float) -> Array:
        return (1 - sigma) * x0 + sigma * noise

    def taken(self, steps: int, strength: float) -> int:
        return steps - int(steps - steps * strength)

    def spread(self, sigma: float) -> float:
        return 1.0

    def ends(self, n: int) -> tuple[float, float]:
        return tuple(FLOW_SPACINGS[self.own](self, n)[[-1, 0]])

    def shifted(self, sigma: np.ndarray | float) -> np.ndarray | float:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    @property
    def spacings(self) -> dict[str, "Spacing"]:
        return FLOW_SPACINGS


Schedule = Discrete | Flow
Spacing = Callable[[Schedule, int], np.ndarray]


def flow(row: dict, tokens: int, steps: int, shift: float | None = None) -> Flow:
    """The schedule of a model folder, for a picture of `tokens` patches drawn in so many steps. shift: replaces the
    model's shift."""
    d = row["dynamic"] if shift is None else None
    if d is not None:
        shift = math.exp(min(_log_shift(d, tokens, steps), _MOST_LOG_SHIFT))
    return Flow(row["shift"] if shift is None else shift, row["ends"], row["steps"], d is not None)


def _log_shift(d: dict, tokens: int, steps: int) -> float:
    if "max_shift" in d:  # FLUX.1 dev: linear in the number of patches
        slope = (d["max_shift"] - d["base_shift"]) / (d["max_image_seq_len"] - d["base_image_seq_len"])
        return d["base_shift"] + slope * (tokens - d["base_image_seq_len"])
    few, many = (d[f"slope_{n}"] * tokens + d[f"shift_{n}"] for n in (10, 200))  # FLUX.2: see `published.EMPIRICAL`
    return many if tokens > d["tokens"] else many + (few - many) * (200 - steps) / 190


def discrete(row: dict, grid: Grid) -> Discrete:
    """The schedule of a model folder as a sampler with this grid reads it; row: "schedule" in model.json."""
    a = alpha_bar(betas(row["betas"], row["steps"], row["start"], row["end"]))
    return Discrete(zero_snr(a) if row["zero_snr"] else a, grid, row["offset"], row["final_alpha_one"])


# ---- spacings: leading, trailing, linspace and lcm choose training steps, the others choose noise levels


def leading(schedule: Discrete, n: int) -> np.ndarray:
    """Multiples of a whole stride, counted from the clean end (Ho et al. 2020); equal to diffusers."""
    points = n + schedule.grid.spare
    return schedule.sigma(np.arange(points)[::-1][:n] * (schedule.n // points) + schedule.offset)


def trailing(schedule: Discrete, n: int) -> np.ndarray:
    """Counted from the noisy end (Lin et al. 2024, table 2); equal to diffusers."""
    return schedule.sigma(np.round(np.arange(schedule.n, 0, -schedule.n / n))[:n] - 1)


def linspace(schedule: Discrete, n: int) -> np.ndarray:
    """Both ends included; equal to diffusers, which interpolates sigma, not log sigma, between whole steps."""
    t = np.linspace(0, schedule.n - 1, n + schedule.grid.spare)[::-1][:n]
    return np.interp(np.round(t) if schedule.grid.whole else t, np.arange(schedule.n), schedule.sigmas)


def lcm(schedule: Discrete, n: int) -> np.ndarray:
    """n of the 50 distillation steps, from the noisy end (Luo et al. 2023); equal to diffusers."""
    distilled = np.arange(50, 0, -1) * (schedule.n // 50) - 1
    return schedule.sigma(distilled[np.linspace(0, 50, n, endpoint=False).astype(int)])


def sgm_uniform(schedule: Discrete, n: int) -> np.ndarray:
    """Even in t without the clean end, as in ComfyUI and Stability's SGM."""
    return schedule.sigma(np.linspace(schedule.n - 1, 0, n + 1)[:-1])


def simple(schedule: Discrete, n: int) -> np.ndarray:
    """Every (steps / n)-th training step from the noisy end, rounded to the noisier one, as in ComfyUI."""
    return schedule.sigmas[schedule.n - 1 - (np.arange(n) * (schedule.n / n)).astype(int)]


# ---- spacings between two ends, for diffusion and rectified flow


def karras(schedule: Schedule, n: int) -> np.ndarray:
    """Even in sigma^(1/7) (Karras et al. 2022, eq. 5)."""
    low, high = schedule.ends(n)
    return np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7


def exponential(schedule: Schedule, n: int) -> np.ndarray:
    """Even in log sigma."""
    low, high = schedule.ends(n)
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta(schedule: Schedule, n: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6) in sigma (Lee et al. 2024), as in diffusers; ComfyUI spaces t in this way instead."""
    low, high = schedule.ends(n)
    return low + (high - low) * beta_quantile(np.linspace(1, 0, n), 0.6)


def beta_quantile(p: np.ndarray, a: float) -> np.ndarray:
    """The quantile p of Beta(a, a). Below 1/2 its distribution function is a power series, which bisection inverts."""
    k = np.arange(64)
    series = np.cumprod(np.concatenate([[1.0], (k[1:] - a) / k[1:]])) / (a + k)
    tail, low, high = np.minimum(p, 1 - p), np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(64):
        x = (low + high) / 2
        below = x**a * (x[:, None] ** k @ series) * math.gamma(2 * a) / math.gamma(a) ** 2 < tail
        low, high = np.where(below, x, low), np.where(below, high, x)
    return np.where(p < 0.5, low, 1 - low)


# ---- spacings of rectified flow; they are even before the shift


def flow_linspace(schedule: Flow, n: int) -> np.ndarray:
    """As in diffusers' SD3 pipeline: down to the smallest training sigma, to which a fixed shift is applied twice."""
    least = 1 / schedule.n
    return schedule.shifted(np.linspace(1, least if schedule.dynamic else schedule.shifted(least), n))


def flow_trailing(schedule: Flow, n: int) -> np.ndarray:
    """From 1 to 1 / n, as in Black Forest Labs' code."""
    return schedule.shifted(np.linspace(1, 1 / n, n))


def flow_sgm_uniform(schedule: Flow, n: int) -> np.ndarray:
    """Without the clean end, as in diffusers' UniPC and DPM++."""
    return schedule.shifted(np.linspace(1, 1 / schedule.n, n + 1)[:-1])


SPACINGS: dict[str, Spacing] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
    "sgm_uniform": sgm_uniform,
    "beta": beta,
    "simple": simple,
    "lcm": lcm,
}
FLOW_SPACINGS: dict[str, Spacing] = {
    "linspace": flow_linspace,
    "trailing": flow_trailing,
    "sgm_uniform": flow_sgm_uniform,
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
}


def sigmas(schedule: Schedule, spacing: str, steps: int) -> list[float]:
    """The steps + 1 noise levels of a run, descending to 0, or to sigma(0) if both the model and the sampler end
    there."""
    if spacing not in SPACINGS:
        fix = f"{did_you_mean(spacing, SPACINGS)}Use one of {', '.join(SPACINGS)}."
        raise Error(f"There is no schedule {spacing!r}.", fix)
    if not 1 <= steps <= schedule.n:
        raise Error(f"{steps} steps are not between 1 and {schedule.n}.", fix="Most pictures need 4 to 50.")
    if spacing not in schedule.spacings:
        names = ", ".join(schedule.spacings)
        raise Error(f"The {spacing} schedule does not exist for rectified flow.", fix=f"Use one of {names}.")
    levels = schedule.spacings[spacing](schedule, steps)
    if not np.all(np.diff(levels) < 0):  # for example leading with an offset and as many steps as in training
        raise Error(f"The {spacing} schedule has no {steps} different steps.", fix="Ask for fewer steps.")
    return [*levels.tolist(), schedule.last]
