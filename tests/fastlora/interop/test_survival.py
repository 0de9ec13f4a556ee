"""What people do to models, done to accelerated ones: the same numbers, or a word about it.

Each test compares an accelerated model with an untouched copy in double precision.
"""

import contextvars
import copy
import io
import pickle
import threading

import pytest
import torch
import transformers as hf
from models import assert_alike, batch, config_of, logits_and_gradients, plain_model, with_lora
from survival import EXACT, accelerated, classes, encoder
from torch import nn

import fastlora
from fastlora.interop.swap import Swapped

pytestmark = pytest.mark.filterwarnings("ignore:fastlora.accelerate")


def masks(mask):
    """By name: what a user may give as a mask, made of one of integers [B, S]."""
    square = mask[:, None, None].expand(4, 1, 9, 9)
    added = (1 - square.double()) * torch.finfo(torch.float64).min
    return {
        "none": None, "ones": mask * 0 + 1, "bool": mask.bool(), "float": mask.float(),
        "left": mask.flip(1), "holes": mask * torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1]),
        "a row of padding": mask * torch.tensor([[1], [1], [0], [1]]), "padding only": mask * 0,
        "4-D": square.bool(), "4-D, a column": square[:, :, :1].bool(), "4-D, added": added,
        "4-D, infinite": added.masked_fill(added < 0, -torch.inf),
        "4-D, -10000": (1 - square.double()) * -1e4, "4-D, one row": square[1:2].bool(),
        "4-D, causal": torch.ones(4, 1, 9, 9).bool().tril(), 
        "4-D, heads": square.expand(4, 4, 9, 9).bool(),
        "4-D, integers": square,
    }  # fmt: skip


MASKS = [
    (name, implementation)
    for name in masks(batch()["attention_mask"])
    for implementation in ("sdpa", "eager")
    if (name, implementation) != ("4-D, integers", "sdpa")  # which PyTorch refuses
]


@pytest.mark.parametrize(("name", "implementation"), MASKS)
def test_masks(name, implementation):
    """Every mask that the model takes gives the same numbers."""
    theirs = with_lora(plain_model(implementation=implementation)).double()
    inputs = batch()
    inputs["attention_mask"] = masks(inputs["attention_mask"])[name]
    assert_alike(accelerated(theirs), theirs, inputs, **EXACT)


def leaves(output):
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return torch.utils._pytree.tree_leaves(output)


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_outputs_asked_for_and_not(family):
    """Hidden states and attentions, by argument and by configuration, as tuples and without."""
    theirs = with_lora(plain_model(family, implementation="eager")).double().eval()
    ours, both = accelerated(theirs), ["output_hidden_states", "output_attentions"]
    asked = [
        {},
        {both[0]: True},
        {},
        {both[1]: True},
        {"return_dict": False},
        dict.fromkeys(both, True),
    ]
    for config in ({}, {both[0]: True}, {both[1]: True}, {"return_dict": False}):
        before = {name: getattr(theirs.config, name) for name in config}
        for settings in (config, {}) if config else ({},):
            for model in (ours, theirs):
                for name, value in (before | settings).items():
                    setattr(model.config, name, value)
            for arguments in asked:
                found, expected = (leaves(m(**batch(), **arguments)) for m in (ours, theirs))
                torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("lengths", [(1,), (5,), (1, 1, 1), (38, 38), (150, 20, 101), (520, 7)])
def test_lengths(lengths):
    """One row or several, without padding, above the lengths of our own attention and above 512."""
    config = config_of("bert")
    config.max_position_embeddings = 600
    theirs = with_lora(hf.BertForSequenceClassification(config)).double()
    assert_alike(accelerated(theirs), theirs, batch("left", lengths), **EXACT)


def test_inputs(pair):
    """Embeddings, positions and segments; gradients of embeddings alone; too long a row."""
    ours, theirs = pair
    fastlora.accelerate(ours)
    assert_alike(ours, theirs, batch() | {"position_ids": torch.arange(9).flip(0)[None]}, **EXACT)
    assert_alike(ours, theirs, batch() | {"token_type_ids": torch.ones(4, 9).long()}, **EXACT)
    inputs, gradients = batch(), []
    embeddings = theirs.get_input_embeddings()(inputs.pop("input_ids")).detach()
    for model in pair:
        given = embeddings.clone().requires_grad_()
        loss = model(**inputs, inputs_embeds=given).loss
        gradients.append(torch.autograd.grad(loss, given)[0])
    torch.testing.assert_close(*gradients, **EXACT)
    with pytest.raises(RuntimeError):
        ours(**batch(lengths=(60,)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_accumulation(pair, reentrant):
    ours, theirs = pair
    fastlora.accelerate(ours)
    for model in pair:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for length in (1, 2, 3):
            (model(**batch(lengths=(9, 3, length, 7))).loss / 3).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "layers", "a query", "first"])
def test_compiled(pair, what):
    """The model compiled after or before it is accelerated, its layers, or one module."""
    ours, theirs = pair
    torch._dynamo.reset()
    layers = encoder(ours).layer
    if what == "first":
        ours.compile(backend="eager")
        ours(**batch())
    fastlora.accelerate(ours)
    parts = {"model": [ours], "layers": layers, "a query": [layers[0].attention.self.query]}
    for module in parts.get(what, []):
        module.compile(backend="eager")
    for side in ("right", "left"):
        assert_alike(ours, theirs, batch(side), rtol=1e-9, atol=1e-9)


def test_exported_and_traced(pair):
    """The graph is right for other masks than the one that it was made with."""
    ours, theirs = (model.eval() for model in pair)
    fastlora.accelerate(ours)
    made, other = batch(labels=False), batch("left", labels=False)
    exported = torch.export.export(ours.base_model.model, (), dict(made)).module()
    torch.testing.assert_close(exported(**other).logits, theirs(**other).logits)
    ours.config.return_dict = False
    traced = torch.jit.trace(ours.base_model.model, tuple(made.values()))
    torch.testing.assert_close(traced(*other.values())[0], theirs(**other).logits)


def test_copies(pair):
    """Copies are accelerated, and each is restored alone, without a trace."""
    ours, theirs = pair
    fastlora.accelerate(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for model in (*copies, torch.load(file, weights_only=False), ours):
        assert any(isinstance(module, Swapped) for module in model.modules())
        assert_alike(model, theirs, batch(), **EXACT)
        fastlora.restore(model)
        assert [*map(repr, classes(model))] == [*map(repr, classes(theirs))]
        for mine, other in zip(model.modules(), theirs.modules(), strict=True):
            assert vars(mine).keys() == vars(other).keys()


def test_types_and_modes(pair):
    ours, theirs = pair
    fastlora.accelerate(ours)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(ours(**batch()).logits, theirs(**batch()).logits, **EXACT)
    for dtype in (torch.bfloat16, torch.half, torch.float32, torch.double):
        found, expected = (logits_and_gradients(m.to(dtype), batch()) for m in pair)
        for name, value in expected.items():
            assert found[name].dtype == dtype
            error = (found[name] - value).float().norm() / value.float().norm()
            assert error < 16 * torch.finfo(dtype).eps, name


def test_threads_and_two_models(pair):
    ours, theirs = (model.eval() for model in pair)
    fastlora.accelerate(ours)
    models, wrong = [ours, ours, accelerated(theirs)], []
    inputs = [batch(lengths=(9, 3, 1, k + 2), labels=False) for k in range(6)]
    expected = [theirs(**given).logits for given in inputs]

    def work(model):
        for given, value in list(zip(inputs, expected, strict=True)) * 3:
            wrong.append(not torch.allclose(model(**given).logits, value, rtol=1e-10, atol=1e-10))

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(work, m)) for m in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 3 * 18 and not any(wrong)


def seen_by_hooks(model, how, before):
    """The shapes that hooks in the first layer see; accelerated before or after it has them."""
    found, layer = [], encoder(model).layer[0].output

    def note(module, given, *rest):
        if module is layer:
            found.append((rest or given)[0][0].shape if how != "forward" else rest[0].shape)

    if before:
        fastlora.accelerate(model)
    if how == "global":
        hook = nn.modules.module.register_module_forward_pre_hook(note)
    elif how == "patch":
        forward = layer.forward
        layer.forward = lambda *given: (found.append(given[0].shape), forward(*given))[1]
    else:
        hook = getattr(layer, f"register_{how}_hook")(note)
    model(**batch()).loss.backward()
    if how == "global":
        hook.remove()
    return found


@pytest.mark.parametrize(
    "how",
    [
        "forward", "forward_pre", "full_backward",
        "global",
        "full_backward_pre",
        "patch",
    ],
)  # fmt: skip
def test_hooks_see_the_square(pair, how):
    """Hooks on modules of the encoder see the padded square, or find that somebody said so."""
    ours, theirs = pair
    expected = seen_by_hooks(theirs, how, before=False)
    assert seen_by_hooks(ours, how, before=True) == expected


def differentiated(model, how):
    """Gradients of the adapters' weights, or of those of their logits, in one way or another."""
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    trained, inputs = [p for p in model.parameters() if p.requires_grad], batch()

    def loss(weights):
        return torch.func.functional_call(model, weights, (), inputs).loss

    if how == "call":
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        return torch.autograd.grad(loss(leaves), [*leaves.values()])
    if how == "grad":
        return [*torch.func.grad(loss)(weights).values()]
    if how == "jvp":
        return torch.func.jvp(loss, (weights,), (weights,))
    if how == "vmap":
        twice = {name: torch.stack([value, value * 2]) for name, value in weights.items()}
        return torch.func.vmap(loss, randomness="different")(twice)
    if how == "batched":
        logits, ones = model(**inputs).logits, torch.eye(8).double().view(8, 4, 2)
        return torch.autograd.grad(logits, trained, ones, is_grads_batched=True)
    first = torch.autograd.grad(model(**inputs).loss, trained, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), trained)


@pytest.mark.parametrize("how", ["call", "grad", "jvp", "vmap"])
def test_transformations(how):
    """What eager attention and PEFT can do under torch.func and autograd."""
    theirs = with_lora(plain_model(implementation="eager")).double()
    found, expected = (differentiated(model, how) for model in (accelerated(theirs), theirs))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["batched", "twice"])
def test_what_attention_has_no_form_of_raises(how):
    """A gradient's gradient, and many gradients at once; on the square they are PEFT's."""
    theirs = with_lora(plain_model(implementation="eager")).double()
    ours = accelerated(theirs)
    with pytest.raises(RuntimeError):
        differentiated(ours, how)
    fastlora.accelerate(ours, real_tokens=False)
    found, expected = (differentiated(model, how) for model in (ours, theirs))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["grad", "jvp", "vmap", "trace"])
def test_transformations_with_much_dropout(how, monkeypatch):
    """From 16,384 elements on, dropout is fastlora's own."""
    theirs = with_lora(plain_model(dropout=0.1, implementation="eager")).train()
    inputs = batch(lengths=(32,) * 20)
    monkeypatch.setitem(globals(), "batch", lambda: inputs)
    for model in (theirs, accelerated(theirs)):
        if how == "trace":
            model.config.return_dict = False
            given = inputs["input_ids"], inputs["attention_mask"]
            torch.jit.trace(model.base_model.model, given, check_trace=False)
        else:
            differentiated(model, how)
