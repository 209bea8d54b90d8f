"""A network whose numbers float16 cannot hold, in every family: one Error that names a dtype, and no picture.
Reference: the same loud weights in float32, which draw."""

import mlx.core as mx
import pytest
from mlx.utils import tree_map

import mlxdiff
from mlxdiff.errors import Error

from . import tiny
from .test_flux2_pipelines import made as klein
from .test_flux2_pipelines import short  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("cache", "short")
MAKES = {"sd": tiny.sd1, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux, "flux2": klein, "zimage": tiny.zimage}


def ends(folder, name: str, dtype: str) -> str:
    """What drawing says if a network's weights are 100 times as large; "" if it draws."""
    pipe = mlxdiff.load(folder, dtype=dtype)
    network = pipe.networks.get(name)
    network.update(tree_map(lambda x: mx.clip(100 * x, -6e4, 6e4).astype(x.dtype), network.parameters()))
    pipe.hold({name: network})
    try:
        pipe("a red house", seed=1, steps=2, width=64, height=64)
    except Error as e:
        return str(e)
    return ""


@pytest.mark.parametrize("family", MAKES)
def test_a_network_that_overflows_in_float16_is_one_error(tmp_path, family):
    MAKES[family](tmp_path / "words").save_pretrained(tmp_path / family)
    parts = mlxdiff.load(tmp_path / family, dtype="float16").description.components
    loud = [name for name in parts if name not in ("vae", "image_encoder")]
    assert len(loud) >= 2
    for name in loud:
        says = ends(tmp_path / family, name, "float16")
        assert "not finite in float16" in says, name
        assert says.count("bfloat16") == 1
        assert not ends(tmp_path / family, name, "float32")
