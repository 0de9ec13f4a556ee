"""The contenders of the layer benchmarks: one LoRA projection, or query, key and value.

Each is built from the same weights and gives y = x W^T + b + scale B A dropout(x), in blocks of
columns of which some are adapted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.kernels import Packed, Term, forced_route, lora_grouped

ALPHA = 16.0
NAMES = ["compiled", "peft", "fastlora reference", "fastlora gemm"]
PLACES = [("cpu", torch.float32)]
if torch.cuda.is_available():
    PLACES.append(("cuda", torch.float16))


@dataclass
class Problem:
    """Sizes and weights: weight [blocks * H, H], factors of the adapted blocks in fp32."""

    M: int
    H: int
    r: int
    p: float
    blocks: int
    adapted: tuple[int, ...]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        like = dict(device=self.device, dtype=self.dtype)
        self.x = torch.randn(self.M, self.H, **like, requires_grad=True)
        self.grad = torch.randn(self.M, self.blocks * self.H, **like)
        self.grads = [part.contiguous() for part in self.grad.chunk(self.blocks, -1)]
        self.weight = torch.randn(self.blocks * self.H, self.H, **like) / self.H**0.5
        self.bias = torch.randn(self.blocks * self.H, **like)
        self.factors = [
            (
                torch.randn(self.r, self.H, device=self.device).div_(self.H**0.5).requires_grad_(),
                torch.randn(self.H, self.r, device=self.device).requires_grad_(),
            )
            for _ in self.adapted
        ]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return ALPHA / self.r

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that gets a gradient."""
        return [self.x, *(f for pair in self.factors for f in pair)]

    def backward(
        self, y: Tensor | list[Tensor], leaves: list[Tensor] | None = None, keep: bool = False
    ) -> tuple[Tensor, ...]:
        """The gradients of the leaves; with `keep`, y can go backward again."""
        grad = self.grad if isinstance(y, Tensor) else self.grads
        return torch.autograd.grad(y, leaves or self.leaves, grad, retain_graph=keep)


# A function of x: the blocks' outputs, one by one or in one tensor.
Function = Callable[[Tensor], Tensor | list[Tensor]]
# From a problem and its probability of dropout.
Build = Callable[[Problem, float], Function]


def unfused(problem: Problem, p: float) -> Function:
    """Plain PyTorch: a linear layer a block, and a low-rank pair beside the adapted ones."""
    weights, biases = problem.weight.chunk(problem.blocks), problem.bias.chunk(problem.blocks)
    pairs = dict(zip(problem.adapted, problem.factors, strict=True))

    def forward(x: Tensor) -> list[Tensor]:
        outputs = []
        for block, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y = F.linear(x, weight, bias)
            if block in pairs:
                A, B = (f.to(x.dtype) for f in pairs[block])
                y = y + F.linear(F.linear(F.dropout(x, p), A), B) * problem.scale
            outputs.append(y)
        return outputs

    return forward


def frozen(problem: Problem, p: float) -> Function:
    """The projection without LoRA: what no implementation can beat."""
    return lambda x: F.linear(x, problem.weight, problem.bias)


def compiled(problem: Problem, p: float) -> Function:
    """`torch.compile` of the unfused form."""
    if problem.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise NotImplementedError("torch.compile needs a C++ compiler")
    # Backward alone is timed on one graph again and again, which donated buffers forbid.
    torch._functorch.config.donated_buffer = False
    # Each shape by itself: all share one code object, and beyond 8 variants it would run eager.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(unfused(problem, p), dynamic=False)


def peft_layers(problem: Problem, p: float) -> Function:
    """PEFT's own LoRA layers around `nn.Linear`."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise NotImplementedError("PEFT is not installed") from error
    layers: list[nn.Module] = []
    pairs = dict(zip(problem.adapted, problem.factors, strict=True))
    weights, biases = problem.weight.chunk(problem.blocks), problem.bias.chunk(problem.blocks)
    for block, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        base = nn.Linear(problem.H, problem.H)
        base.weight = nn.Parameter(weight, requires_grad=False)
        base.bias = nn.Parameter(bias, requires_grad=False)
        layer: nn.Module = base
        if block in pairs:
            config = LoraConfig(r=problem.r, lora_alpha=ALPHA, lora_dropout=p)
            layer = Linear(base, "default", config=config, r=problem.r, lora_alpha=ALPHA)
            layer.train()
            # Versions of PEFT without `config` swallow it, and would drop nothing.
            layer.lora_dropout["default"] = nn.Dropout(p)
            for name, factor in zip(("lora_A", "lora_B"), pairs[block], strict=True):
                del getattr(layer, name)["default"].weight
                getattr(layer, name)["default"].weight = factor
        layers.append(layer)

    def forward(x: Tensor) -> list[Tensor]:
        # As PEFT is used: without autocast, it computes its fp32 factors' products in fp32.
        with torch.autocast(x.device.type, problem.dtype, enabled=x.dtype != torch.float32):
            return [layer(x) for layer in layers]

    return forward


def fastlora_route(name: str) -> Build:
    """fastlora on one of its routes."""

    def build(problem: Problem, p: float) -> Function:
        terms = [
            Term(A, B, problem.scale, p, stream=block, column=block * problem.H)
            for block, (A, B) in zip(problem.adapted, problem.factors, strict=True)
        ]
        # As a trainer has: without it, each call packs, and a CUDA graph captures no kernel.
        packed = Packed() if problem.device == "cuda" else None

        def forward(x: Tensor) -> Tensor:
            with forced_route(name):
                return lora_grouped(x, problem.weight, problem.bias, terms, packed=packed)

        return forward

    return build


def contenders(device: str) -> dict[str, Build]:
    """Every implementation that can run on a device, the unfused reference first."""
    route = "gemm" if device == "cuda" else "reference"
    ours = {f"fastlora {route}": fastlora_route(route)}
    return {"unfused": unfused, "compiled": compiled, "peft": peft_layers, **ours}


def agrees(problem: Problem, build: Build) -> bool:
    """Whether outputs and gradients are right: within 2x (gradients 3x) of the unfused errors."""

    def run(function: Function, kind: torch.dtype | None = None) -> list[Tensor]:
        y = function(problem.x if kind is None else problem.x.to(kind))
        whole = y if isinstance(y, Tensor) else torch.cat(y, -1)
        grads = torch.autograd.grad(whole, problem.leaves, problem.grad.to(whole.dtype))
        return [whole, *grads]

    truth = Problem(**{f: getattr(problem, f) for f in problem.__dataclass_fields__})
    truth.weight, truth.bias = problem.weight.double(), problem.bias.double()
    truth.factors = problem.factors
    exact = run(unfused(truth, 0.0), torch.float64)
    plain, found = run(unfused(problem, 0.0)), run(build(problem, 0.0))
    for i, (mine, theirs, right) in enumerate(zip(found, plain, exact, strict=True)):
        floor = torch.finfo(problem.dtype).eps * right.abs().max()
        limit = (2 if i == 0 else 3) * (theirs - right).abs().max() + floor
        if not (mine - right).abs().max() <= limit:
            return False
    return True


def saved_bytes(problem: Problem, function: Function) -> int:
    """Bytes of activations that a forward pass keeps for backward."""
    parameters = {t.data_ptr() for t in (problem.weight, problem.bias, *problem.leaves[1:])}
    parameters |= {t.data_ptr() for t in problem.weight.chunk(problem.blocks)}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(problem.x)
    return sum(size for pointer, size in saved.items() if pointer not in parameters)


def measure(compare: Callable[..., None], name: str, mode: str, problem: Problem) -> None:
    """Benchmark one implementation in "forward", "backward" or "both" against the unfused one."""
    made = contenders(problem.device)
    if name not in made:
        pytest.skip(f"{name} does not run on {problem.device}")
    try:
        functions = [made["unfused"](problem, problem.p), made[name](problem, problem.p)]
    except NotImplementedError as reason:
        pytest.skip(str(reason))

    def pass_of(function: Function) -> Callable[[], object]:
        if mode == "forward":
            return lambda: function(problem.x)
        if mode == "both":
            return lambda: problem.backward(function(problem.x))
        y = function(problem.x)
        return lambda: problem.backward(y, keep=True)

    facts = dict(name=name, agrees=agrees(problem, made[name]))
    facts["saved"] = saved_bytes(problem, functions[1]) / problem.x.nbytes
    if problem.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        pass_of(functions[1])()
        facts["peak"] = torch.cuda.max_memory_allocated()
    kind = "linear" if problem.blocks == 1 else "qkv"
    where = f"{problem.device} {str(problem.dtype).removeprefix('torch.')}"
    group = f"{kind} {mode} {where}: M={problem.M} H={problem.H} r={problem.r} p={problem.p}"
    compare(group, *map(pass_of, functions), problem.device, **facts)
