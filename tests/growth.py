"""Memory over many pictures: `python -m tests.growth` draws 2,000 small ones of 50 prompts and many sizes and samplers,
and fails if the process holds more than 10 MB more at the end than after the first 200. By hand, on an idle machine."""

import argparse
import ctypes
import gc
import itertools
import sys
import time
from contextlib import suppress

from mlxdiff import Pipeline, builtin, load, samplers  # before MLX, whose own BLAS is far slower

# isort: split
import mlx.core as mx
import psutil

from mlxdiff.request import Request

MOST = 10 * 2**20  # bytes
SIZES = range(64, 120, 8)  # small: what is kept for a shape or a prompt grows with their number


def requests(n: int):
    """n requests that differ, in the same order each time."""
    words = builtin.vocabulary()
    scenes = itertools.product(*(list(words[kind])[:4] for kind in list(words)[:3]))
    prompts = [" ".join(scene) for scene in itertools.islice(scenes, 50)]
    for i in range(n):
        settings = {"sampler": [*samplers.SAMPLERS][i % len(samplers.SAMPLERS)], "guidance": (1.0, 4.0)[i % 3 == 0]}
        settings |= {"width": SIZES[i % len(SIZES)], "height": SIZES[i // len(SIZES) % len(SIZES)], "steps": 2}
        yield Request(prompts[i % len(prompts)], seed=i, **settings)


def held(pipe: Pipeline) -> tuple[int, int]:
    """The bytes that this process holds after the same picture each time (MLX keeps what the last one left, and a
    larger one leaves more): with what the C library keeps for later, and without, where that can be asked for."""
    pipe(next(requests(1)))
    gc.collect()
    rss = psutil.Process().memory_info().rss
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    return rss, psutil.Process().memory_info().rss


def main() -> None:
    p = argparse.ArgumentParser(description="Draw many small pictures, and compare what memory they leave behind.")
    p.add_argument("--pictures", type=int, default=2000)
    p.add_argument("--after", type=int, default=200, metavar="N", help="compare with what is held after N pictures")
    args = p.parse_args()
    pipe, begin, first = load("storybook", dtype="float32"), time.monotonic(), None
    for i, request in enumerate(requests(args.pictures), 1):
        pipe(request)
        if i == args.after:
            first = held(pipe)[1]
        if i % 50 == 0 or i == args.after:
            rss, used = held(pipe)
            print(
                f"{i:5} pictures, {time.monotonic() - begin:4.0f} s: {used / 2**20:.1f} MB "
                f"({rss / 2**20:.1f} with what the C library keeps), MLX holds "
                f"{mx.get_active_memory() / 2**20:.1f} MB and caches {mx.get_cache_memory() / 2**20:.1f} MB",
                flush=True,
            )
    grown = held(pipe)[1] - first
    print(f"{grown / 2**20:+.1f} MB since picture {args.after}.")
    sys.exit(grown > MOST)


if __name__ == "__main__":
    main()
