"""The benchmark: `python -m mlxdiff.bench`."""
