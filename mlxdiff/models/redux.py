"""FLUX.1 Redux (Black Forest Labs 2024): what SigLIP sees of a picture as tokens that FLUX reads after those of the
prompt."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .vision import Output


@dataclass(frozen=True)
class Config:
    image: int  # width of what it reads
    hidden: int
    context: int  # width of its tokens
    pools = False  # it reads every token


def misfit(config: Config, net) -> str:
    """What keeps a denoiser of a Config from reading its tokens; "" if nothing does."""
    return "" if config.context == net.context else f"makes tokens {config.context} wide, not {net.context}"


class Redux(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.image, config.hidden)
        self.redux_down = nn.Linear(config.hidden, config.context)

    def __call__(self, seen: Output) -> mx.array:
        return self.redux_down(nn.silu(self.redux_up(seen.last)))  # (B, N, context)
