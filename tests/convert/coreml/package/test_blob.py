"""Values of a few bits, packed from the lowest bit on."""

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.package.blob import WIDTHS, unpack


@pytest.mark.parametrize("count", [1, 7, 8, 64])
@pytest.mark.parametrize("dtype", [name for name in WIDTHS if name != "int4"])
def test_unpacking_is_the_stream_of_bits(dtype, count):
    width = WIDTHS[dtype]
    values = np.random.default_rng(count).integers(0, 1 << width, count, np.uint8)
    bits = (values[:, None] >> np.arange(width)) & 1
    raw = np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()
    np.testing.assert_array_equal(unpack(raw, count, dtype), values)
