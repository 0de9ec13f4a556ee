"""Kernel tests run on memory poisoned with NaN: a tile that is not written cannot pass."""

import pytest
import torch

from fastlora.kernels.triton import tuning


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def wide_tiles(monkeypatch):
    """Tiles that hold all columns of a test's layer: the interpreter's time is by the tile.

    For tests of what surrounds a kernel; those of the kernels keep the tiles that users get.
    """
    tile = tuning.Blocks()
    blocks = tuning.Config(down=tile, add=tile, outer=tile)
    monkeypatch.setitem(tuning.MEASURED, tuning.key_of(0, torch.float32, 1), blocks)
