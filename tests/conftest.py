"""What every test shares: OpenBLAS under MLX (by importing mlxdiff first) and no network."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The oracles must not look for a hub; tests of the hub code point HF_ENDPOINT at a loopback server of their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mlxdiff  # noqa: F401
