"""Reuse: a step whose network would find almost what an earlier step found does not compute it again. Of transformers
the first block is computed in each step; if what it adds has changed by no more than the threshold, what all other
blocks added is taken from the step that computed them last (First Block Cache, ParaAttention 2024, after TeaCache, Liu
et al. 2024). Of U-Nets the first residual block decides, and all levels are kept but the last layer of the way up and
what it reads (DeepCache, Ma et al. 2024, with its cheapest branch)."""

from collections.abc import Callable

import mlx.core as mx


class Reuse:
    """What one pass of the network keeps from step to step. Passes with other conditions have their own."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.calls = self.reused = 0
        self._first: mx.array | None = None  # of the step that computed the rest last
        self._rest: mx.array | None = None

    def __call__(self, first: mx.array, x: mx.array | float, rest: Callable[[], mx.array]) -> mx.array:
        """What `rest` returns, or x and what an earlier `rest` added to its x. first: what the first block adds."""
        self.calls += 1
        if self._first is not None and self._change(first) <= self.threshold:
            self.reused += 1
            return x + self._rest
        out = rest()
        self._first, self._rest = first, out - x
        return out

    def _change(self, first: mx.array) -> float:
        """By how much of itself it has changed, in the mean. Comparing waits for the first block."""
        now, before = first.astype(mx.float32), self._first.astype(mx.float32)
        return (mx.abs(now - before).mean() / mx.abs(before).mean()).item()


class Passes:
    """The passes of a run, those of a refiner included, and which of its steps reused."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._made: list[Reuse] = []
        self._calls = 0  # that were computed in full, up to the last `step`

    def __repr__(self) -> str:
        return f"Passes({self.threshold:g})"

    def one(self) -> dict:
        """The argument of the network for one more pass: none if the run reuses nothing."""
        if self.threshold == 0:
            return {}
        self._made.append(Reuse(self.threshold))
        return {"reuse": self._made[-1]}

    def step(self) -> bool:
        """Whether the step that has just ended computed nothing in full."""
        before, self._calls = self._calls, sum(made.calls - made.reused for made in self._made)
        return self.threshold > 0 and self._calls == before


NOTHING = Passes(0.0)  # is reused
