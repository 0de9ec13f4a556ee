"""One linear layer with LoRA: forward, backward and both."""

import pytest
from implementations import NAMES, PLACES, Problem, measure

SHAPES = [(512, 768, 8), (4096, 768, 8), (4096, 768, 32)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}r{s[2]}")
@pytest.mark.parametrize("place", PLACES, ids=lambda p: p[0])
def test_linear(compare, place, shape, mode, name):
    measure(compare, name, mode, Problem(*shape, 0.1, 1, (0,), *place))
