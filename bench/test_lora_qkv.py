"""Query, key and value in one operation, LoRA on query and value: forward, backward and both."""

import pytest
from implementations import NAMES, PLACES, Problem, measure

SHAPES = [(512, 768), (4096, 384)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("place", PLACES, ids=lambda p: p[0])
def test_qkv(compare, place, shape, mode, name):
    measure(compare, name, mode, Problem(*shape, 32, 0.1, 3, (0, 2), *place))
