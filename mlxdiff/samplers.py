"""Samplers: generator functions that yield (x, x0) after each step. To add one, write it here, give it a row in
SAMPLERS, and add the names that other programs have for it to `dialects`.

x: (B, h, w, c) float32 in VE form, x = x0 + sigma * noise. sigmas: descending floats, one more than steps; most runs
end at 0. denoise(x, sigma) -> x0. draw() -> standard normals shaped like x. eta: the share of fresh noise; 0 is none, 1
is the share in the paper. All samplers follow dx/dsigma = (x - x0) / sigma (Karras et al. 2022). Rectified flow,
x = (1 - sigma) x0 + sigma * noise, has the same equation, so one-step samplers work there unchanged. Two things differ:
the ratio of noise to signal (multistep samplers work in its logarithm), and how much noise a step may add. The column
`flow` of the table holds the versions for rectified flow."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import mlx.core as mx

from .errors import Error
from .schedules import DDIM, DDPM, KDIFFUSION, LOGSNR, Grid

Denoise = Callable[[mx.array, float], mx.array]
Draw = Callable[[], mx.array]
Steps = Iterator[tuple[mx.array, mx.array]]
Ratio = Callable[[float], float]  # sigma -> ratio of noise to signal


def shrink(x: mx.array, x0: mx.array, ratio: float) -> mx.array:
    """The exact step if x0 is constant: x - x0 shrinks with sigma. No digits are lost at large sigma."""
    return x0 + ratio * (x - x0)


def ve_ratio(s: float) -> float:
    return s


def flow_ratio(s: float) -> float:
    return s / (1 - s) if s < 1 else math.inf


def unipc_ratio(s: float) -> float:
    return flow_ratio(min(s, 1 - 1e-6))  # diffusers' UniPC begins here, to keep the first logarithm finite


def ancestral(s: float, s_next: float, eta: float) -> tuple[float, float]:
    """(down, up): step down to `down`, then add noise of size `up`. Together they make s_next; at eta 1 this is DDPM's
    posterior."""
    up = min(s_next, eta * s_next * math.sqrt(s**2 - s_next**2) / s)
    return math.sqrt(s_next**2 - up**2), up


def euler(denoise: Denoise, x: mx.array, sigmas: list[float]) -> Steps:
    """Euler's method (Karras et al. 2022, algorithm 1 without churn)."""
    for s, s_next in pairwise(sigmas):
        x0 = denoise(x, s)
        x = shrink(x, x0, s_next / s)
        yield x, x0


def ddim(denoise: Denoise, x: mx.array, sigmas: list[float], draw: Draw, eta: float) -> Steps:
    """DDIM (Song et al. 2021, eq. 12). At eta 0 it is Euler; at eta 1 it is DDPM (Ho et al. 2020), also known as Euler
    ancestral."""
    for s, s_next in pairwise(sigmas):
        x0 = denoise(x, s)
        down, up = ancestral(s, s_next, eta)
        x = shrink(x, x0, down / s)
        if up > 0:
            x = x + up * draw()
        yield x, x0


def euler_ancestral_flow(denoise: Denoise, x: mx.array, sigmas: list[float], draw: Draw, eta: float) -> Steps:
    """Euler ancestral for rectified flow (ComfyUI): step below s_next, then rescale the signal and add noise for
    s_next."""
    for s, s_next in pairwise(sigmas):
        x0 = denoise(x, s)
        down = s_next * (1 + eta * (s_next / s - 1))
        signal = (1 - s_next) / (1 - down)
        x = signal * shrink(x, x0, down / s)
        up = math.sqrt(max(0.0, s_next**2 - (down * signal) ** 2))
        if up > 0:
            x = x + up * draw()
        yield x, x0


def lcm(denoise: Denoise, x: mx.array, sigmas: list[float], draw: Draw, eta: float) -> Steps:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): step to x0; at eta 1 all noise is fresh."""
    for s, s_next in pairwise(sigmas):
        x0 = denoise(x, s)  # c_skip and c_out are left out: for t >= 19 they change x0 by less than 7e-6 of x_vp
        x = shrink(x, x0, s_next * math.sqrt(1 - eta**2) / s)
        if eta > 0 and s_next > 0:
            x = x + eta * s_next * draw()
        yield x, x0


def heun(denoise: Denoise, x: mx.array, sigmas: list[float]) -> Steps:
    """Heun's method (Karras et al. 2022, algorithm 1 without churn): two evaluations a step, one in the last step."""
    for s, s_next in pairwise(sigmas):
        x0 = denoise(x, s)
        ahead = shrink(x, x0, s_next / s)
        if s_next > 0:
            slope, slope_ahead = (x - x0) / s, (ahead - denoise(ahead, s_next)) / s_next
            x = x + (s_next - s) * (slope + slope_ahead) / 2
        else:
            x = ahead
        yield x, x0


def dpmpp_2m(denoise: Denoise, x: mx.array, sigmas: list[float], ratio: Ratio = ve_ratio) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2023, algorithm 2)."""
    return dpmpp_2m_sde(denoise, x, sigmas, draw=None, eta=0, ratio=ratio)


def dpmpp_2m_sde(
    denoise: Denoise, x: mx.array, sigmas: list[float], draw: Draw | None, eta: float, ratio: Ratio = ve_ratio
) -> Steps:
    """SDE-DPM-Solver++(2M), midpoint (Lu et al. 2023, appendix). The first step and the step to 0 are of first
    order."""
    old = h_old = None
    for s, s_next in pairwise(sigmas):
        x0 = denoise(x, s)
        h = math.log(ratio(s) / ratio(s_next)) if s_next > 0 else math.inf
        middle = x0 if old is None or s_next == 0 else x0 + h / (2 * h_old) * (x0 - old)
        x = shrink(x, middle, (s_next / s) ** (1 + eta))
        if eta > 0 and s_next > 0:
            x = x + s_next * math.sqrt(1 - (s_next / s) ** (2 * eta)) * draw()
        yield x, x0
        old, h_old = x0, h


def halfway(s: float, s_next: float) -> float:
    return math.sqrt(s * s_next)


def dpmpp_sde(denoise: Denoise, x: mx.array, sigmas: list[float], draw: Draw, eta: float) -> Steps:
    """DPM-Solver++(2S), stochastic (Lu et al. 2023 with k-diffusion's noise): x0 is evaluated halfway in log sigma."""
    for s, s_next in pairwise(sigmas):
        x0 = denoise(x, s)
        if s_next == 0:
            yield x0, x0
            return
        mid = halfway(s, s_next)
        down, up = ancestral(s, mid, eta)
        noise = draw()
        x_mid = shrink(x, x0, down / s) + up * noise
        # The two noises share a Brownian path over sigma: the second contains the first as k-diffusion's tree has it.
        share = (s - mid) / (s - s_next)
        noise = math.sqrt(share) * noise + math.sqrt(1 - share) * draw()
        down, up = ancestral(s, s_next, eta)
        x = shrink(x, denoise(x_mid, mid), down / s) + up * noise
        yield x, x0


def unipc(denoise: Denoise, x: mx.array, sigmas: list[float], ratio: Ratio = ve_ratio) -> Steps:
    """UniPC-2 with B2(h) (Zhao et al. 2023, algorithms 5 and 6): DPM++ 2M predicts, the next x0 corrects."""
    x_old = old = s_old = h_old = slope = None
    for s, s_next in pairwise(sigmas):
        x0 = denoise(x, s)
        if old is not None:
            h = math.log(ratio(s_old) / ratio(s))
            middle = (old + x0) / 2 if slope is None else old + unic(h, h_old, slope, x0 - old)
            x = shrink(x_old, middle, s / s_old)
            slope, h_old = (x0 - old) / h, h
        x_old, old, s_old = x, x0, s
        middle = x0 if slope is None or s_next == 0 else x0 + math.log(ratio(s) / ratio(s_next)) / 2 * slope
        x = shrink(x, middle, s_next / s)
        yield x, x0


def unic(h: float, h_old: float, slope: mx.array, change: mx.array) -> mx.array:
    """The second-order term of the corrector. Its weights make it exact if x0 is quadratic in log sigma."""
    phi = math.expm1(-h)
    b1 = -(phi / h + 1) / phi
    b2 = 2 * ((phi / h + 1) / h - 0.5) / phi
    a = (b1 - b2) / (1 + h_old / h)
    return a * h * slope + (b1 - a) * change


# Adams-Bashforth weights, for the newest slope first.
ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(denoise: Denoise, x: mx.array, sigmas: list[float]) -> Steps:
    """PNDM without its Runge-Kutta steps, that is PLMS (Liu et al. 2022, eq. 12): four slopes with the weights of an
    even grid. The first step is Heun's. It yields the x0 to which the chosen slope leads."""
    slopes = []
    for s, s_next in pairwise(sigmas):
        slopes = [(x - denoise(x, s)) / s, *slopes[:3]]
        slope = sum(w * d for w, d in zip(ADAMS[len(slopes) - 1], slopes, strict=True))
        if len(slopes) == 1 and len(sigmas) > 2:
            ahead = shrink(x, x - s * slope, s_next / s)
            slope = (slope + (ahead - denoise(ahead, s_next)) / s_next) / 2
        x0 = x - s * slope
        x = shrink(x, x0, s_next / s)
        yield x, x0


def starts(sigmas: list[float]) -> list[float]:
    return sigmas[:-1]


def starts_and_ends(sigmas: list[float]) -> list[float]:
    return [s for s in sigmas if s > 0]


def starts_and_halfways(sigmas: list[float]) -> list[float]:
    return sigmas[:-1] + [halfway(s, s_next) for s, s_next in pairwise(sigmas) if s_next > 0]


@dataclass(frozen=True)
class Sampler:
    fn: Callable[..., Steps]  # (denoise, x, sigmas), and draw and eta where eta is not None
    grid: Grid  # how its authors read the training schedule
    eta: float | None = None  # the default; None: the sampler adds no noise
    visits: Callable[[list[float]], list[float]] = starts  # the sigmas at which denoise will be called, in any order
    alone: bool = True  # whether each step calls denoise once
    flow: Callable[..., Steps] | None = None  # the version for rectified flow; None: there is none

    @property
    def noisy(self) -> bool:
        return self.eta is not None


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, KDIFFUSION, flow=euler),
    "euler_ancestral": Sampler(ddim, KDIFFUSION, eta=1.0, flow=euler_ancestral_flow),
    "heun": Sampler(heun, KDIFFUSION, visits=starts_and_ends, alone=False, flow=heun),
    "dpmpp_2m": Sampler(dpmpp_2m, LOGSNR, flow=partial(dpmpp_2m, ratio=flow_ratio)),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, LOGSNR, eta=1.0),
    "dpmpp_sde": Sampler(dpmpp_sde, KDIFFUSION, eta=1.0, visits=starts_and_halfways, alone=False),
    "unipc": Sampler(unipc, LOGSNR, flow=partial(unipc, ratio=unipc_ratio)),
    "pndm": Sampler(pndm, DDIM, alone=False),
    "ddim": Sampler(ddim, DDIM, eta=0.0),
    "ddpm": Sampler(ddim, DDPM, eta=1.0),
    "lcm": Sampler(lcm, DDPM, eta=1.0),
}


def of_flow(name: str) -> Callable[..., Steps]:
    """The version of a sampler for rectified flow."""
    fn = SAMPLERS[name].flow
    if fn is None:
        suited = ", ".join(n for n, row in SAMPLERS.items() if row.flow is not None)
        raise Error(f"The sampler {name} is not for models of rectified flow.", fix=f"Use one of {suited}.")
    return fn
