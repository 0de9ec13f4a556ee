"""Which adapters act: on a model, in a block of code, by rows, and in a recomputation."""

import asyncio
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import (
    LoraConfig,
    Segment,
    UserError,
    inject,
    merge,
    save_adapter,
    set_adapter,
    use_adapter,
)
from fastlora.kernels import forced_route

CONFIGS = {
    "a": LoraConfig(r=2, dropout=0.0, targets="0"),
    "b": LoraConfig(r=5, alpha=40, dropout=0.0, targets="0"),
}
X = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(fill):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    inject(model, CONFIGS)
    return fill(model)


def expected(model, *names, x=X):
    """What adapters that add up give."""
    y = F.linear(x, model[0].weight, model[0].bias)
    for name in names:
        low = x @ model[0].lora_A[name].T @ model[0].lora_B[name].T
        y = y + CONFIGS[name].scale * low
    return y


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["default", "sst", "a b", "ü", "0"])
def test_a_sole_adapter_is_active_whatever_its_name(name, fill):
    model = nn.Sequential(nn.Linear(8, 6))
    layer = inject(model, {name: CONFIGS["a"]})["0"]
    fill(model)
    low = X @ layer.lora_A[name].T @ layer.lora_B[name].T
    same(model(X), F.linear(X, layer.weight, layer.bias) + CONFIGS["a"].scale * low)
    model(X).sum().backward()
    assert layer.lora_B[name].grad.any()


def test_several_adapters_raise_until_some_are_chosen(model, tmp_path):
    for use in (lambda: model(X), lambda: merge(model), lambda: save_adapter(model, tmp_path)):
        with pytest.raises(UserError, match=r"a.*b"):
            use()
    with use_adapter(model, "a"):
        same(model(X), expected(model, "a"))
    with pytest.raises(UserError, match="none is chosen"):
        model(X)
    set_adapter(model, "b")
    same(model(X), expected(model, "b"))


def test_chosen_adapters_add_up_and_none_is_the_base(model):
    for names in (("a",), ("b",), ("a", "b"), ()):
        set_adapter(model, *names)
        same(model(X), expected(model, *names))
        set_adapter(model)
        with use_adapter(model, *names):
            same(model(X), expected(model, *names))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: set_adapter(model, "slip"),
        lambda model: set_adapter(model, "a", "slip"),
        lambda model: use_adapter(model, "slip").__enter__(),
        lambda model: use_adapter(model, rows=["slip"] * 7).__enter__(),
        lambda model: use_adapter(model, rows=["a"] * 6 + [3]).__enter__(),
        lambda model: use_adapter(model, rows=["a", Segment("b", 1, 7)]).__enter__(),
        lambda model: use_adapter(model, rows=[Segment("slip", 0, 4)]).__enter__(),
        lambda model: merge(model, "slip"),
        lambda model: save_adapter(model, "nowhere", "slip"),
    ],
)
def test_an_unknown_name_raises_and_nothing_changes(model, use):
    set_adapter(model, "a")
    with pytest.raises(UserError, match=r"(slip|3|Segment).*'a', 'b'"):
        use(model)
    same(model(X), expected(model, "a"))
    assert model[0].merged == ()


@pytest.mark.parametrize("route", ["reference", "gemm"])
@pytest.mark.parametrize("inner", [(), (3,), (1, 2)])
def test_each_row_has_its_adapter(model, route, inner):
    x = X[(...,) + (None,) * len(inner) + (slice(None),)].expand(7, *inner, 8)
    rows = ["b", "b", None, "a", "b", "a", "a"]
    with forced_route(route), use_adapter(model, rows=rows):
        y = model(x)
    for i, name in enumerate(rows):
        same(y[i], expected(model, *([name] if name else []), x=x[i]))


@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_segments_may_leave_rows_out_and_overlap(model, route):
    segments = [Segment("a", 0, 4), Segment("b", 2, 3), Segment("b", 5, 5)]
    with forced_route(route), use_adapter(model, rows=segments):
        y = model(X)
    for i, names in enumerate([("a",), ("a",), ("a", "b"), ("a",), (), (), ()]):
        same(y[i], expected(model, *names, x=X[i]))


@pytest.mark.parametrize("rows", [["a"] * 6, ["a"] * 8, [Segment("a", 0, 8)]])
def test_rows_that_do_not_fit_the_input_raise(model, rows):
    with use_adapter(model, rows=rows), pytest.raises(UserError, match="leading dimension"):
        model(X)


@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_an_adapter_trains_alike_alone_and_in_company(route, fill):
    configs = {n: LoraConfig(r=r, dropout=0.4, targets="0") for n, r in (("a", 2), ("b", 3))}
    model = nn.Sequential(nn.Linear(8, 6))
    layer = inject(model, configs)["0"]
    fill(model)

    def gradient(x, rows):
        seed = torch.tensor(3)
        with forced_route(route), use_adapter(model, rows=rows, seed=seed):
            loss = model(x)[-3:].square().sum()
        return torch.autograd.grad(loss, layer.lora_A["b"])[0]

    company, alone = gradient(X, ["a"] * 4 + ["b"] * 3), gradient(X[4:], ["b"] * 3)
    torch.testing.assert_close(company, alone)
    assert company.any()


def test_scopes_nest_and_end_with_an_exception(model):
    set_adapter(model, "a")
    with use_adapter(model, "b"):
        with pytest.raises(RuntimeError), use_adapter(model, "a", "b"):
            same(model(X), expected(model, "a", "b"))
            raise RuntimeError
        same(model(X), expected(model, "b"))
    same(model(X), expected(model, "a"))


def test_a_scope_of_one_model_leaves_another_alone(model, fill):
    other = nn.Sequential(nn.Linear(8, 6))
    inject(other, CONFIGS)
    set_adapter(fill(other), "b")
    with use_adapter(model, "a"):
        same(other(X), expected(other, "b"))


def test_two_threads_use_adapters_of_their_own(model):
    barrier, found = threading.Barrier(2), {}

    def work(name):
        with use_adapter(model, name):
            for _ in range(20):
                barrier.wait()
                found[name] = model(X)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        same(found[name], expected(model, name))


def test_asynchronous_tasks_use_adapters_of_their_own(model):
    async def work(name):
        with use_adapter(model, name):
            await asyncio.sleep(0)
            return model(X)

    async def both():
        return await asyncio.gather(work("a"), work("b"))

    for name, y in zip("ab", asyncio.run(both()), strict=True):
        same(y, expected(model, name))


def forward(model, checkpointed):
    return checkpoint(model, X, use_reentrant=False) if checkpointed else model(X)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_a_prediction_between_forward_and_backward_changes_nothing(model, route, checkpointed):
    """Also when it is the first that ever chose another adapter."""
    with forced_route(route):
        expected(model, "a").square().sum().backward()
        wanted = gradients(model)
        set_adapter(model, "a")
        y = forward(model, checkpointed)
        with use_adapter(model, "b"), torch.no_grad():
            model(X)
        y.square().sum().backward()
        found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4)


def by_scope(model, name):
    with use_adapter(model, name):
        return forward(model, True)


def by_setting(model, name):
    set_adapter(model, name)
    return forward(model, True)


def in_nested_checkpoints(model, name):
    with use_adapter(model, name):
        return checkpoint(
            lambda x: checkpoint(model, x, use_reentrant=False), X, use_reentrant=False
        )


@pytest.mark.parametrize("run", [by_scope, by_setting, in_nested_checkpoints])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_recomputation_uses_the_adapters_of_its_forward_pass(model, run, in_thread):
    loss = expected(model, "a").square().sum() + 3 * expected(model, "b").square().sum()
    loss.backward()
    wanted = gradients(model)
    first, second = run(model, "a"), run(model, "b")
    loss = first.square().sum() + 3 * second.square().sum()
    if in_thread:
        thread = threading.Thread(target=loss.backward)
        thread.start(), thread.join()
    else:
        with use_adapter(model, "b"):  # which the recomputation is not of
            loss.backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4)


def test_rows_are_recomputed_as_rows(model):
    def run(checkpointed):
        with use_adapter(model, rows=["a"] * 3 + [None] + ["b"] * 3):
            y = forward(model, checkpointed)
        y.square().sum().backward()
        return gradients(model)

    wanted, found = run(False), run(True)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_reentrant_recomputation_that_cannot_know_raises(model):
    x = X.clone().requires_grad_()
    with use_adapter(model, "a"):
        y = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(UserError, match="use_reentrant=False"):
        y.sum().backward()


def test_a_backward_hook_may_choose_for_itself(model):
    set_adapter(model, "a")
    seen = []

    def hook(_):
        with use_adapter(model, "b"), torch.no_grad():
            seen.append(model(X))

    y = model(X)
    y.register_hook(hook)
    y.sum().backward()
    same(seen[0], expected(model, "b"))
    assert set(gradients(model)) == {"0.lora_A.a", "0.lora_B.a"}


def test_a_compiled_model_follows_the_choice(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for name in "ab":
        set_adapter(model, name)
        same(compiled(X), expected(model, name))
    for name in "ab":
        with use_adapter(model, name):
            same(compiled(X), expected(model, name))
    same(compiled(X), expected(model, "b"))


def test_a_sole_adapter_acts_trains_and_merges_and_slips_of_the_pen_raise(fill):
    """The shared case fail_06, whose own code set `layer.routing`, which is gone."""
    model = nn.Sequential(nn.Linear(8, 6))
    layer = inject(model, {"sst": CONFIGS["a"]})["0"]
    fill(model)
    delta = layer.settings["sst"].scale * layer.lora_B["sst"] @ layer.lora_A["sst"]
    wanted = F.linear(X, layer.weight + delta, layer.bias)
    same(model(X), wanted)
    assert model(X).requires_grad
    with pytest.raises(UserError, match="sst2"), use_adapter(model, rows=[Segment("sst2", 0, 4)]):
        pass
    with pytest.raises(UserError, match="sst2"):
        merge(model, "sst2")
    merge(model)
    assert layer.merged == ("sst",)
    same(model(X), wanted)
