"""One call of a LoRALinear, wherever a linear layer and a low-rank pair beside it can be called.

A situation is a function of a layer and an input [6, features]; it gives values and gradients,
which are compared with plain PyTorch's, on every route.
"""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pattern(y):
    """A gradient for y, the same numbers in any type."""
    return (torch.arange(y.numel(), device=y.device) * 37 % 17 - 8).div(8).to(y.dtype).view(y.shape)


def trained(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def through(layer, x, call=None):
    """The output, and the gradients of the input and of all that trains."""
    x = x.clone().requires_grad_()
    y = layer(x) if call is None else call(layer, x)
    return [y], torch.autograd.grad(y, [x, *trained(layer)], pattern(y))


def accumulated(layer, x, call=None, times=1):
    """The same by `backward`."""
    x = x.clone().requires_grad_()
    y = layer(x) if call is None else call(layer, x)
    for _ in range(times):
        y.backward(pattern(y), retain_graph=True)
    return [y], [x.grad, *(p.grad for p in trained(layer))]


def changed_in_part(layer, x):
    y = layer(x)
    y[:, 3] = 0
    return y


INPUTS = {
    "a batch": lambda layer, x: layer(x),
    "one row": lambda layer, x: layer(x[:1]),
    "a vector": lambda layer, x: layer(x[0]),
    "three dimensions": lambda layer, x: layer(x.view(2, 3, -1)),
    "five dimensions": lambda layer, x: layer(x.view(1, 3, 1, 2, -1)),
    "an expanded row": lambda layer, x: layer(x[:1].expand(4, -1)),
    "an expanded middle dimension": lambda layer, x: layer(x[:, None].expand(-1, 3, -1)),
    "an expanded feature": lambda layer, x: layer(x[:, :1].expand_as(x)),
    "a transposed input": lambda layer, x: layer(x.T.contiguous().T),
    "swapped leading dimensions": lambda layer, x: layer(x.view(2, 3, -1).transpose(0, 1)),
    "every second feature": lambda layer, x: layer(x.repeat_interleave(2, 1)[:, ::2]),
    "every second row": lambda layer, x: layer(x[::2]),
    "no rows": lambda layer, x: layer(x[:0]),
    "no rows in three dimensions": lambda layer, x: layer(x[:0].view(2, 0, x.shape[-1])),
    "two calls in one graph": lambda layer, x: layer(x) * layer(2 * x),
    "an output changed in place": lambda layer, x: layer(x).mul_(2).relu_(),
    "an output changed in part": changed_in_part,
    "a checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
}


def under_autocast(dtype):
    def run(layer, x):
        with torch.autocast(DEVICE, dtype):
            return through(layer, x)

    return run


def with_trainable(*names):
    def run(layer, x):
        for name, p in layer.named_parameters():
            p.requires_grad_(any(part in name for part in names))
        return through(layer, x)

    return run


def without_gradients(layer, x):
    with torch.no_grad():
        first = layer(x)
    with torch.inference_mode():
        return [first, layer(x).clone()], []


def after_inference_mode(layer, x):
    with torch.inference_mode():
        layer(x)
    return through(layer, x)


def input_without_gradient(layer, x):
    y = layer(x)
    return [y], torch.autograd.grad(y, trained(layer), pattern(y))


def gradient_penalty(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x).tanh()
    (slope,) = torch.autograd.grad(y, x, pattern(y), create_graph=True)
    penalty = y.sum() + 10 * (slope.norm(dim=-1) - 1).square().mean()
    return [y, slope], torch.autograd.grad(penalty, [x, *trained(layer)])


def third_derivatives(layer, x):
    x = x.clone().requires_grad_()
    value = layer(x).sigmoid().sum()
    for _ in range(2):
        slopes = torch.autograd.grad(value, [x, *trained(layer)], create_graph=True)
        value = sum(slope.square().sum() for slope in slopes)
    return [value], torch.autograd.grad(value, [x, *trained(layer)])


def batched_gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    several = torch.stack([pattern(y), 2 * pattern(y).roll(1)])
    return [y], torch.autograd.grad(y, [x, *trained(layer)], several, is_grads_batched=True)


def parameters(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


def loss(layer, values, x):
    y = functional_call(layer, values, (x,))
    return (pattern(y) * y.tanh()).sum()


def func_grad(layer, x):
    found = grad(lambda *a: loss(layer, *a), argnums=(0, 1))(parameters(layer), x)
    return [], [*found[0].values(), found[1]]


def gradients_per_sample(layer, x):
    one = grad(lambda *a: loss(layer, *a))
    return [], list(vmap(one, in_dims=(None, 0))(parameters(layer), x).values())


def an_ensemble(layer, x):
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters(layer).items()}
    return [vmap(lambda p: functional_call(layer, p, (x,)))(stacked)], []


def jacobians(layer, x):
    found = jacrev(layer)(x), hessian(lambda row: layer(row).tanh())(x[0])
    return [], [*found, torch.autograd.functional.jacobian(layer, x, vectorize=True)]


def forward_mode(layer, x):
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, x.roll(1, 0)))
        return list(torch.autograd.forward_ad.unpack_dual(y)), []


def on_meta(layer, x):
    y = layer.to("meta")(x.to("meta"))
    assert y.is_meta and y.dtype == x.dtype
    return [torch.tensor(y.shape)], []


def jagged(layer, x):
    parts = [x[:2].clone().requires_grad_(), x[2:].clone().requires_grad_()]
    y = layer(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
    assert y.is_nested
    y = y.values()
    return [y], torch.autograd.grad(y, [*parts, *trained(layer)], pattern(y))


class OwnTensor(torch.Tensor):
    pass


def subclass_of_tensor(layer, x):
    y = layer(x.as_subclass(OwnTensor))
    assert type(y) is OwnTensor
    return [y.as_subclass(torch.Tensor)], []


def counted_flops(layer, x):
    with FlopCounterMode(display=False) as counter:
        values, gradients = accumulated(layer, x)
    return [*values, torch.tensor(counter.get_total_flops())], gradients


def compiled(layer, x):
    torch._dynamo.reset()
    return through(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)


def compiled_for_evaluation(layer, x):
    torch._dynamo.reset()
    fast = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        return [fast(x), fast(x[:3])], []


def exported(layer, x):
    batch = torch.export.Dim("batch", min=2, max=64)
    fixed = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    return [fixed(x), fixed(x[:3])], []


def jit_traced(layer, x):
    traced = torch.jit.trace(layer, x)
    return [traced(x), traced(x[:3])], []


def saved_on_cpu(layer, x):
    with torch.autograd.graph.save_on_cpu():
        return through(layer, x)


SITUATIONS = {
    **{name: lambda layer, x, call=call: through(layer, x, call) for name, call in INPUTS.items()},
    "an fp64 module": through,
    "an fp16 module": through,
    "a bf16 module": through,
    "fp16 autocast": under_autocast(torch.float16),
    "bf16 autocast": under_autocast(torch.bfloat16),
    "fp64 under autocast": under_autocast(torch.bfloat16),
    "a trainable bias": with_trainable("lora_", "bias"),
    "a trainable weight": with_trainable("lora_", "weight"),
    "everything trainable": with_trainable(""),
    "nothing trainable": with_trainable(),
    "only A trainable": with_trainable("lora_A"),
    "only B trainable": with_trainable("lora_B"),
    "only the bias trainable": with_trainable("bias"),
    "no gradients": without_gradients,
    "training after inference mode": after_inference_mode,
    "an input without gradient": input_without_gradient,
    "backward twice": lambda layer, x: accumulated(layer, x, times=2),
    "a reentrant checkpoint": lambda layer, x: accumulated(
        layer, x, lambda layer, x: checkpoint(layer, x, use_reentrant=True)
    ),
    "a gradient penalty": gradient_penalty,
    "third derivatives": third_derivatives,
    "batched gradients": batched_gradients,
    "torch.func.grad": func_grad,
    "gradients per sample": gradients_per_sample,
    "vmap": lambda layer, x: ([vmap(layer)(x), vmap(layer, 1, 1)(x.view(2, 3, -1))], []),
    "an ensemble by vmap": an_ensemble,
    "jvp": lambda layer, x: (list(jvp(layer, (x,), (x.roll(1, 0),))), []),
    "Jacobians": jacobians,
    "forward-mode derivatives": forward_mode,
    "the meta device": on_meta,
    "jagged sentences": jagged,
    "a subclass of Tensor": subclass_of_tensor,
    "a FLOP counter": counted_flops,
    "torch.compile": compiled,
    "torch.compile for evaluation": compiled_for_evaluation,
    "torch.export": exported,
    "torch.jit.trace": jit_traced,
    "tensors saved on the CPU": saved_on_cpu,
}
DTYPES = {
    "an fp64 module": torch.float64,
    "an fp16 module": torch.float16,
    "a bf16 module": torch.bfloat16,
    "fp64 under autocast": torch.float64,
}
# No kernel takes fp64.
ON_REFERENCE = {"an fp64 module", "fp64 under autocast"}
if DEVICE == "cpu":
    # Triton's interpreter has a silently wrong bf16; a CPU's compiler sees PyTorch's operations
    # whatever the route.
    ON_REFERENCE |= {"a bf16 module", "bf16 autocast"}
    ON_REFERENCE |= {"torch.compile", "torch.compile for evaluation"}
# What the compiler sees of these kinds, it sees of another.
CASES = [
    (kind, name)
    for kind in ("injected", "packed", "built", "subclass", "peft")
    for name in SITUATIONS
    if not ("compile" in name and kind in ("built", "peft"))
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_call_gives_what_plain_pytorch_gives(kind, name, like_plain):
    like_plain(SITUATIONS[name], kind, "reference", DTYPES.get(name, torch.float32))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in ("injected", "packed")
        for name in SITUATIONS
        # How a weight is packed has nothing to do with an input's shape.
        if name not in ON_REFERENCE and not (kind == "packed" and name in INPUTS)
    ],
)
def test_so_do_triton_kernels(kind, name, like_plain):
    like_plain(SITUATIONS[name], kind, "gemm", DTYPES.get(name, torch.float32))


@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_factors_that_change_between_forward_and_backward_raise(route, like_plain):
    def run(layer, x):
        y = layer(x)
        with torch.no_grad():
            for p in trained(layer):
                p.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        return [y], []

    like_plain(run, "injected", route)


@pytest.mark.parametrize("wrong", [torch.ones(2, 12), torch.ones(2, 13, dtype=torch.int64)])
@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_an_input_that_does_not_fit_raises(route, wrong, like_plain):
    def run(layer, x):
        with pytest.raises((RuntimeError, ValueError)):
            layer(wrong.to(DEVICE))
        return [x], []

    like_plain(run, "injected", route)
