"""What all tests of `accelerate` have."""

import copy

import pytest
from models import plain_model, with_lora

from fastlora.interop import encoders
from fastlora.kernels import forced_route


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The fused form and packed tokens on small inputs, too, which run as before otherwise."""
    monkeypatch.setattr(encoders, "MIN_PADDING", (0, 0))
    with forced_route("reference"):
        yield


@pytest.fixture
def pair():
    """A model to accelerate, and the same one that stays PEFT's."""
    ours = with_lora(plain_model()).double().train()
    return ours, copy.deepcopy(ours)
