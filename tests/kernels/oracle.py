"""The fp64 reference as the judge of every route, on a GPU, in the interpreter or from PTX."""

import torch

from fastlora.kernels import Term, forced_route, keep_mask, lora_grouped
from fastlora.kernels.dropout import philox_keep
from fastlora.kernels.reference import add_terms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor(0x1234_5678_9ABC_DEF0, device=DEVICE)

NAMES = ["reference", "gemm"]
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
    DTYPES.append(torch.bfloat16)  # silently wrong in the interpreter


def reference(x, weight, bias, terms, seed=None, mask=keep_mask):
    """`lora_grouped` in plain PyTorch."""
    return add_terms(torch.nn.functional.linear(x, weight, bias), x, terms, seed, mask)


def lora_qkv(x, weight, bias, adapters, scale, p=0.0, seed=None, packed=None):
    """Query, key and value in one operation; `adapters` maps their names to lora_A and lora_B."""
    width = weight.shape[0] // 3
    at = {"query": 0, "key": width, "value": 2 * width}
    terms = [Term(*f, scale, p, at[n], column=at[n]) for n, f in adapters.items()]
    return lora_grouped(x, weight, bias, terms, seed, packed)


def same_mask(route):
    """The mask that a route draws on this device."""
    return keep_mask if route == "reference" else philox_keep


def make(M, K, N, blocks, seed=0):
    """fp64 x, weight, bias, grad and one (A, B) for each (rank, width) of `blocks`."""
    torch.manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    factors = [(draw(r, K) / K**0.5, draw(width, r)) for r, width in blocks]
    return draw(M, K), draw(N, K) / K**0.5, draw(N), draw(M, N), factors


def run(op, inputs, terms_of, dtype, factor_dtype, need_dx=True, trains=(), penalty=False):
    """y, dx, all dA and dB of `op` on copies of the inputs in a dtype.

    `trains` may name "weight" and "bias", whose gradients follow. With `penalty`, so do the
    gradients of the sum of all gradients' squares, None where there is none.
    """
    x, weight, bias, grad, factors = inputs

    def leaf(t, kind, needs):
        return t.detach().to(DEVICE, kind).requires_grad_(needs)

    x = leaf(x, dtype, need_dx)
    factors = [(leaf(A, factor_dtype, True), leaf(B, factor_dtype, True)) for A, B in factors]
    weight, bias = leaf(weight, dtype, "weight" in trains), leaf(bias, dtype, "bias" in trains)
    y = op(x, weight, bias, terms_of(factors), SEED)
    leaves = [x, *(f for pair in factors for f in pair), weight, bias]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    grad = grad.to(DEVICE, dtype)
    first = torch.autograd.grad(y, leaves, grad, allow_unused=True, create_graph=penalty)
    if not penalty:
        return [y, *first]
    squares = sum(part.square().sum() for part in first)
    return [y, *first, *torch.autograd.grad(squares, leaves, allow_unused=True)]


def check(route, inputs, terms_of, dtype, need_dx=True, mask=None, **how):
    """Errors at most 2x (gradients 3x) those of plain PyTorch in the same dtype, plus a floor.

    Plain PyTorch's error is relative to the largest number of an output, and the worst of all
    outputs: at M = r = 1 one output hangs on a single sum, which it may happen to get right. The
    floor is the rounding of the result.
    """
    mask = mask or same_mask(route)

    def plain(*arguments):
        return reference(*arguments, mask=mask)

    truth = run(plain, inputs, terms_of, torch.float64, torch.float64, need_dx, **how)
    theirs = run(plain, inputs, terms_of, dtype, dtype, need_dx, **how)
    with forced_route(route):
        ours = run(lora_grouped, inputs, terms_of, dtype, torch.float32, need_dx, **how)
    judge(route, ours, theirs, truth, dtype)


def judge(route, ours, theirs, truth, dtype):
    """The errors of `check`: outputs of ours and of plain PyTorch in a dtype, and in fp64."""
    assert [t is None for t in ours] == [t is None for t in truth]
    ours, theirs, truth = ([t for t in side if t is not None] for side in (ours, theirs, truth))
    sizes = [exact.abs().max().item() if exact.numel() else 0.0 for exact in truth]
    pairs = zip(theirs, truth, sizes, strict=True)
    relative = max((b - exact).abs().max().item() / size for b, exact, size in pairs if size)
    for i, (mine, exact, size) in enumerate(zip(ours, truth, sizes, strict=True)):
        if exact.numel() == 0:
            continue
        limit = size * ((2 if i == 0 else 3) * relative + 0.5 * torch.finfo(dtype).eps) + 1e-6
        error = (mine - exact).abs()
        rms = error.square().mean().sqrt()
        what = f"{route} {dtype} output {i}: max error {error.max():.2e}, RMS {rms:.2e}"
        assert error.max() <= limit, f"{what}, limit {limit:.2e}"
