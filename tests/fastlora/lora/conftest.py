"""What the tests of the LoRA library share: small models, and plain PyTorch as the judge."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlora import LoraConfig, LoRALinear, inject, lora_layers, pack
from fastlora.kernels import forced_route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, N, RANK, ALPHA = 13, 7, 3, 6.0
SETTINGS = LoraConfig(r=RANK, alpha=ALPHA, dropout=0.0, targets=("0",))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What a kernel does not write is NaN and cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def fill_adapters(model, std=0.3, seed=1):
    """B is zero at first: give it values, so that adapters do something. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for B in layer.lora_B.values():
                B.copy_(torch.randn(B.shape, generator=generator) * std)
    return model


@pytest.fixture(scope="session")
def fill():
    return fill_adapters


class Pair(nn.Module):
    """What a LoRALinear stands for, in plain PyTorch and under the same names."""

    def __init__(self, layer, dtype=None):
        super().__init__()

        def copied(p):
            return nn.Parameter(p.detach().to(dtype or p.dtype, copy=True), p.requires_grad)

        self.weight, self.bias = copied(layer.weight), copied(layer.bias)
        self.lora_A = nn.ParameterDict({"default": copied(layer.lora_A["default"])})
        self.lora_B = nn.ParameterDict({"default": copied(layer.lora_B["default"])})

    def forward(self, input):
        A, B = self.lora_A["default"].to(input.dtype), self.lora_B["default"].to(input.dtype)
        low = F.linear(F.linear(input, A), B)
        return F.linear(input, self.weight, self.bias) + ALPHA / RANK * low


class Subclass(nn.Linear):
    """With a forward of its own, so that LoRA goes around it."""

    def forward(self, input):
        return super().forward(input)


def _injected(dtype, base=nn.Linear):
    return inject(nn.Sequential(base(K, N, dtype=dtype)), SETTINGS)["0"]


def _packed(dtype):
    layer = _injected(dtype)
    pack(layer)
    return layer


KINDS = {
    "injected": _injected,
    "packed": _packed,
    "built": lambda dtype: LoRALinear(K, N, True, DEVICE, dtype, r=RANK, alpha=ALPHA, dropout=0.0),
    "subclass": lambda dtype: _injected(dtype, Subclass),
    "peft": lambda dtype: LoRALinear(K, N, dtype=dtype, r=RANK, alpha=ALPHA, dropout=0.0),
}


def _pefts(layer):
    """PEFT's layer with the same parameters."""
    base = nn.Linear(K, N).to(layer.weight.dtype).requires_grad_(False)
    base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    settings = {"r": RANK, "lora_alpha": ALPHA}
    theirs = peft.tuners.lora.Linear(base, "default", peft.LoraConfig(**settings), **settings)
    for side in ("lora_A", "lora_B"):
        value = getattr(layer, side)["default"].detach()
        getattr(theirs, side)["default"].to(value.dtype).load_state_dict({"weight": value})
    return theirs.to(DEVICE)


def check_like_plain(run, kind, route, dtype=torch.float32):
    """Compare what `run(layer, x)` gives, values and gradients, with plain PyTorch.

    Truth is plain PyTorch in fp64. Errors are at most 2x (gradients 3x) those of plain PyTorch in
    the layer's own type, relative to the largest number of a result and the worst of all results,
    plus a floor of some roundings.
    """
    torch.manual_seed(0)
    layer = fill_adapters(KINDS[kind](dtype).to(DEVICE))
    x = torch.randn(6, K).to(DEVICE, dtype)
    with forced_route(route):
        values, gradients = run(_pefts(layer) if kind == "peft" else copy.deepcopy(layer), x)
    plain, exact = run(Pair(layer), x), run(Pair(layer, torch.float64), x.double())
    ours, theirs, truth = ([*v, *g] for v, g in ((values, gradients), plain, exact))
    assert len(values) == len(plain[0]) and len(ours) == len(theirs)
    found = [(a.shape, a.dtype, type(a)) for a in ours]
    assert found == [(b.shape, b.dtype, type(b)) for b in theirs]
    pairs = [(b, c, _largest(c)) for b, c in zip(theirs, truth, strict=True)]
    relative = max((_largest(b.double() - c) / size for b, c, size in pairs if size), default=0)
    for i, (a, (_, c, size)) in enumerate(zip(ours, pairs, strict=True)):
        limit = size * ((2 if i < len(values) else 3) * relative + 16 * torch.finfo(dtype).eps)
        assert _largest(a.double() - c) <= limit, f"result {i}: {a} (expected {c})"


def _largest(t):
    return t.abs().max().item() if t.numel() else 0.0


@pytest.fixture(scope="session")
def like_plain():
    return check_like_plain
