"""The oracles' networks here are tiny: torch's threads would spend more time meeting than working."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where this module's conversions are kept."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDIFF_CACHE", str(place))
        yield place
