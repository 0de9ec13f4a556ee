"""`LoRALinear` against PEFT's layer, as modules: six in a row, few rows and many.

Evaluation is a forward pass without gradients; training is forward and backward with dropout. A
ratio is that of PEFT's time to ours in the same seconds.
"""

import copy

import peft
import pytest
import torch
from implementations import ALPHA, PLACES
from torch import nn

import fastlora

ROWS, WIDTHS, RANK, LAYERS = (8, 32, 128, 512, 4096), (384, 768), 8, 6
LEAST_ROWS = 512  # that one timing covers: fewer are run several times


def stacks(width, dtype, device):
    """PEFT's layers and ours with the same weights and dropout."""
    torch.manual_seed(0)
    plain = nn.Sequential(*[nn.Linear(width, width) for _ in range(LAYERS)]).to(device, dtype)
    names = [str(i) for i in range(LAYERS)]
    ours = copy.deepcopy(plain)
    config = fastlora.LoraConfig(r=RANK, alpha=ALPHA, dropout=0.1, targets=names)
    layers = fastlora.inject(ours, config)
    theirs = peft.get_peft_model(
        plain, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.1, target_modules=names)
    )
    for name, layer in layers.items():
        nn.init.normal_(layer.lora_B["default"], std=0.1)
        other = theirs.base_model.model[int(name)]
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(layer.lora_A["default"])
            other.lora_B["default"].weight.copy_(layer.lora_B["default"])
    return theirs, ours


def run(model, x, mode):
    """A function that evaluates or trains a model once, and returns its output."""
    model.train(mode == "training")

    def evaluate():
        with torch.no_grad():
            return model(x)

    def train():
        y = model(x)
        y.sum().backward()
        return y

    return train if mode == "training" else evaluate


@pytest.mark.parametrize("mode", ["eval", "training"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def test_linear(compare, place, rows, width, mode):
    device, dtype = place
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=mode == "training")
    theirs, ours = (run(model, x, mode) for model in stacks(width, dtype, device))
    exact = stacks(width, torch.float64, device)
    expected, found = (run(model, x.detach().double(), "eval")() for model in exact)
    repeats = max(1, LEAST_ROWS // rows)

    def repeated(function):
        return lambda: [function() for _ in range(repeats)]

    compare(
        f"layer {mode} {device} {str(dtype)[6:]}: {rows} rows of {width}, r={RANK}, to PEFT's",
        repeated(theirs),
        repeated(ours),
        device,
        name="LoRALinear",
        agrees=torch.allclose(expected, found),
    )
