from pathlib import Path

import pytest
import torch

from fastlora.data.source import resolve


@pytest.fixture(autouse=True, scope="session")
def single_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of MiniLM; without the wheel and the hub, resolve() says how to get it."""
    return resolve("minilm").folder
