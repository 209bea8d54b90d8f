"""diffusers and transformers as oracles: the same random weights in their network and in ours, and how far apart the
outputs are."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten


def randomize(theirs: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights that keep the scale of what they are given, norms that scale and shift, biases that matter."""
    torch.manual_seed(seed)
    for name, p in theirs.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
        else:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return theirs.eval().requires_grad_(False)


def quieten(theirs: torch.nn.Module, to: float) -> torch.nn.Module:
    """Everything but the norms scaled down, until the eps inside each norm counts."""
    for name, p in theirs.named_parameters():
        if "norm" not in name:
            p.mul_(to)
    return theirs


def give(theirs: torch.nn.Module, ours, dtype: mx.Dtype = mx.float32, rename: Callable[[dict], dict] = dict):
    """Their weights in our network, strictly; `rename` makes our names of theirs where they differ."""
    shapes = {name: p.shape for name, p in tree_flatten(ours.parameters())}
    weights = []
    for name, p in rename(theirs.state_dict()).items():
        name = name.removeprefix("text_model.")
        w = p.numpy()
        if w.ndim == 4:  # OIHW -> OHWI, a 1x1 kernel -> a matrix where ours is one
            w = w.transpose(0, 2, 3, 1)
            w = w.reshape(shapes[name]) if w.shape[1:3] == (1, 1) else w
        weights.append((name, mx.array(w).astype(dtype)))
    return ours.load_weights(weights, strict=True)


def rounded(theirs: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Their network with weights that `dtype` can hold, still computing in float32."""
    return theirs.to(dtype).float()


def nhwc(x: np.ndarray) -> mx.array:
    return mx.array(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))


def nchw(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).transpose(0, 3, 1, 2)


def error(ours, theirs) -> float:
    """Largest difference relative to the largest value."""
    ours = np.array(ours.astype(mx.float32)) if isinstance(ours, mx.array) else ours
    theirs = theirs.numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
