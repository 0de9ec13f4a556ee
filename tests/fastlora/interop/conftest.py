"""What all tests of `accelerate` have."""

import copy

import pytest
from models import plain_model, with_lora

from fastlora.kernels import forced_route


@pytest.fixture(autouse=True)
def fused():
    """The fused form on small inputs, too, which plain PyTorch computes otherwise."""
    with forced_route("reference"):
        yield


@pytest.fixture
def pair():
    """A model to accelerate, and the same one that stays PEFT's."""
    ours = with_lora(plain_model()).double().train()
    return ours, copy.deepcopy(ours)
