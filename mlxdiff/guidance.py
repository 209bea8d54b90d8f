"""Guidance: `denoiser` makes one function, denoise(x, sigma) -> x0, of a network, its conditions and its prediction.

Only this module calls the network with a sampler's x. It scales x as in training and casts it to the network's dtype;
it casts the output to float32."""

import math
from collections.abc import Callable

import mlx.core as mx

from .errors import Error
from .schedules import Schedule

Denoise = Callable[[mx.array, float], mx.array]

# x, sigma and the network's output -> x0 (Ho et al. 2020; Salimans and Ho 2022, appendix D; Liu et al. 2023)
PREDICTIONS: dict[str, Callable[[mx.array, float, mx.array], mx.array]] = {
    "eps": lambda x, sigma, out: x - sigma * out,
    "v": lambda x, sigma, out: x / (1 + sigma**2) - sigma / math.sqrt(1 + sigma**2) * out,
    "x0": lambda x, sigma, out: out,
    "flow": lambda x, sigma, out: x - sigma * out,
}


def denoiser(
    net: Callable[..., mx.array],
    schedule: Schedule,
    prediction: str,
    cond: dict,
    *,
    beside: mx.array | None = None,
    both: dict | None = None,
    uncond: dict | None = None,
    scale: float = 1.0,
    rescale: float = 0.0,
    interval: tuple[float, float] = (math.inf, 0.0),
    skip: dict | None = None,
    skip_scale: float = 0.0,
    skip_interval: tuple[float, float] = (math.inf, 0.0),
    dtype: mx.Dtype,
) -> Denoise:
    """denoise(x, sigma) -> x0, for a sampler's x (B, h, w, c).

    cond: the arguments of net besides x and t, for B samples.
    beside: more channels that net reads beside those of x, (B, h, w, more); they are neither noised nor scaled.
    both: the same for 2 B samples, the negative half first; a guided step runs them as one batch.
    uncond: the negative half alone, in place of both; two separate passes hold half the activations.
    scale: the scale of classifier-free guidance (Ho and Salimans 2022); up to 1 only cond runs, as in diffusers.
    rescale: how far to restore the spread of the positive output (Lin et al. 2024), 0 to 1.
    interval: guidance is on from the first sigma down to the second, which is excluded (Kynkäänniemi et al. 2024).
    skip: `cond` plus skip_layers: an extra pass without those layers, from which guidance pushes away by skip_scale
    within skip_interval (skip-layer guidance, Stability AI 2024)."""
    if prediction not in PREDICTIONS:
        raise Error(f"There is no prediction {prediction!r}.", fix=f"Use one of {', '.join(PREDICTIONS)}.")

    def denoise(x: mx.array, sigma: float) -> mx.array:
        t, x_in = schedule.t(sigma), (x / schedule.spread(sigma)).astype(dtype)
        if beside is not None:
            x_in = mx.concatenate([x_in, beside.astype(dtype)], axis=-1)
        if scale <= 1 or not interval[0] >= sigma > interval[1]:
            out = net(x_in, t, **cond).astype(mx.float32)
        else:
            if both is not None:
                sides = mx.split(net(mx.concatenate([x_in, x_in]), t, **both), 2)  # (2 B, h, w, c) -> 2 x (B, h, w, c)
            else:
                sides = net(x_in, t, **uncond), net(x_in, t, **cond)
            negative, positive = (side.astype(mx.float32) for side in sides)
            out = guide(negative, positive, scale, rescale)
            if skip is not None and skip_interval[0] >= sigma > skip_interval[1]:
                out = out + skip_scale * (positive - net(x_in, t, **skip).astype(mx.float32))
        return PREDICTIONS[prediction](x, sigma, out)

    return denoise


def masked(denoise: Denoise, mask: mx.array, z: mx.array, noised: Callable[[float], mx.array], first: float) -> Denoise:
    """`denoise` where only a part of a start image is drawn anew. Outside of it x0 is the image, so that every sampler
    returns to it. This gives the pictures that diffusers gives, which mixes after each step instead.

    mask (1, h, w, 1): 1 where it is drawn anew, 0 elsewhere. z: the latents of the image. noised(sigma): the same with
    the noise that the run began with. first: the run's first sigma, where x is right as it is."""

    def inside(x: mx.array, sigma: float) -> mx.array:
        if sigma < first:
            x = mask * x + (1 - mask) * noised(sigma)
        return mask * denoise(x, sigma) + (1 - mask) * z

    return inside


def guide(negative: mx.array, positive: mx.array, scale: float, rescale: float) -> mx.array:
    """Push away from the negative output, then restore the spread of the positive one by `rescale`, image by image."""
    out = negative + scale * (positive - negative)
    if rescale > 0:
        spread, grown = (mx.std(a, axis=tuple(range(1, a.ndim)), keepdims=True) for a in (positive, out))
        out = out * (1 - rescale + rescale * spread / grown)
    return out
