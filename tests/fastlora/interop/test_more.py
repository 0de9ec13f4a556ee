"""What a second tester found: writes, readers and sizes that the first did not think of."""

import contextvars
import copy
import functools
import gc
import threading
import types
import weakref

import peft
import pytest
import torch
import transformers as hf
from models import FAMILIES, assert_alike, batch, config_of, filled, plain_model, with_lora
from models import logits_and_gradients as computed
from survival import EXACT, accelerated, encoder
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore:fastlora.accelerate")

MANY = dict(lengths=(32,) * 19 + (5,))  # rows for which packed weights are used


def rolled(model):
    weight = encoder(model).layer[0].output.dense.weight.data
    weight.copy_(weight.roll(8, 1))


def negated(model):
    encoder(model).layer[0].output.dense.weight.data.neg_()


def negated_key(model):
    encoder(model).layer[0].attention.self.key.weight.data.neg_()


def moved_value_bias(model):
    value = encoder(model).layer[0].attention.self.value
    value.get_parameter("base_layer.bias").detach().numpy()[:] += 1


@pytest.mark.parametrize("write", [rolled, negated, negated_key, moved_value_bias])
def test_packed_weights_follow_writes_that_keep_sums(pair, write):
    ours, theirs = (model.float() for model in pair)  # oneDNN packs no double precision
    fastlora.accelerate(ours)
    ours(**batch(**MANY))
    for model in pair:
        write(model)
    assert_alike(ours, theirs, batch(**MANY), rtol=1e-3, atol=1e-5)


def test_language_model_heads():
    with pytest.raises(fastlora.UserError, match="may read states at padding"):
        fastlora.accelerate(hf.BertLMHeadModel(config_of("bert")))


def mean_of_all(model, input_ids, attention_mask):
    return model.classifier(model.bert(input_ids, attention_mask).last_hidden_state.mean(1))


def note_mean(found, _module, _inputs, output):
    found.append(output.last_hidden_state.mean(1))


@pytest.mark.parametrize("how", ["patch", "hook"])
def test_readers_that_were_put_on_instances(pair, how):
    found, inputs = [], batch(labels=False)
    note = functools.partial(note_mean, found)
    for model in pair:
        inner = model.eval().base_model.model
        if how == "patch":
            inner.forward = types.MethodType(mean_of_all, inner)
        else:
            inner.bert.register_forward_hook(note)
        if model is pair[0]:
            fastlora.accelerate(model)
        result = inner(**inputs)
        found += [result] if how == "patch" else []
    torch.testing.assert_close(*found, **EXACT)


def test_default_device(pair):
    ours, theirs = pair
    fastlora.accelerate(ours)
    inputs, expected = batch(), theirs(**batch()).logits
    with torch.device("meta"):
        torch.testing.assert_close(theirs(**inputs).logits, expected, **EXACT)
        found = ours(**inputs).logits
    torch.testing.assert_close(found, expected, **EXACT)


def test_peft_around_adapters_of_fastlora():
    model = plain_model().double()
    fastlora.inject(model, fastlora.LoraConfig(dropout=0.0, targets=["query", "value"]))
    theirs = with_lora(filled(model)).double().eval()
    assert_alike(accelerated(theirs), theirs, batch(), **EXACT)


def test_packed_weights_are_of_the_cpu(pair):
    fastlora.accelerate(pair[0])
    pair[0](**batch(**MANY))
    layer = encoder(pair[0]).layer[0].output.dense
    assert layer.packed is not None
    assert layer.to("meta").packed_for(torch.empty(900, 48, device="meta")) is None


def test_packed_weights_of_thawed_layers_are_freed(pair):
    ours = pair[0]
    fastlora.accelerate(ours)
    ours(**batch(**MANY))
    assert any(vars(m).get("packed") for m in ours.modules())
    ours.requires_grad_(True)
    ours(**batch(**MANY))
    kept = [vars(m)["packed"] for m in ours.modules() if vars(m).get("packed")]
    assert not any(packed._current for packed in kept)


def test_rates_near_one():
    """At which masks of 8 bits cannot drop."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    config = peft.LoraConfig(lora_dropout=0.999, target_modules=["0"])
    with pytest.raises(fastlora.UserError, match="unknown kind of dropout, or a rate near 1"):
        fastlora.accelerate(peft.get_peft_model(model, config))
    layer = fastlora.kernels.Dropout(0.999)
    assert 0.0008 < (layer(torch.ones(1000, 500)) != 0).float().mean() < 0.0012


ODD = [
    dict(hidden_size=30, num_attention_heads=1, intermediate_size=7, num_hidden_layers=1),
    dict(hidden_size=6, num_attention_heads=6, intermediate_size=3, num_hidden_layers=2),
]


def odd_model(family, sizes):
    torch.manual_seed(0)
    if family == "distilbert":
        names = ("dim", "n_heads", "hidden_dim", "n_layers")
        sizes = dict(zip(names, sizes.values(), strict=True)) | {"sinusoidal_pos_embds": True}
    if family == "electra":
        sizes = sizes | {"embedding_size": 12}
    config = config_of(family)
    config = type(config)(**{**config.to_dict(), "vocab_size": 10, **sizes})
    config.max_position_embeddings = 150
    model = getattr(hf, f"{FAMILIES[family][2]}ForSequenceClassification")(config)
    return with_lora(model, lora_alpha=-300, bias="lora_only").double().train()


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_sizes(family):
    """One head, heads of one number, r above the width, a negative scale, a handful of words."""
    for sizes in ODD:
        theirs = odd_model(family, sizes)
        ours = accelerated(theirs)
        for lengths in ((4,), (120, 2, 1), (32,) * 20 + (3,)):
            inputs = batch("left", lengths)
            for name in ("input_ids", "attention_mask"):  # and padding in each row
                inputs[name] = nn.functional.pad(inputs[name] % 10, (2, 0))
            assert_alike(ours, theirs, inputs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", ["bert", "mpnet", "distilbert"])
@pytest.mark.parametrize(
    "trained", ["LayerNorm layer_norm embedding attention_bias bias", "k. key k_lin"]
)
def test_partly_trained(family, trained):
    theirs = with_lora(plain_model(family), bias="all").double().train()
    for name, parameter in theirs.named_parameters():
        if any(part in name for part in trained.split()):
            parameter.requires_grad_()
    ours = accelerated(theirs)
    for inputs in (batch("left"), batch(**MANY)):
        assert_alike(ours, theirs, inputs, rtol=1e-9, atol=1e-9)


def moments(model, inputs, first):
    """Mean and variance of logits and gradients over seeds."""
    found = {}
    for seed in range(first, first + 200):
        torch.manual_seed(seed)
        for name, value in computed(model, inputs).items():
            found.setdefault(name, []).append(value.double().flatten())
    stacks = {name: torch.stack(values) for name, values in found.items()}
    return {name: (values.mean(0), values.var(0)) for name, values in stacks.items()}


@pytest.mark.slow
def test_two_adapters_with_dropouts_of_their_own():
    """The numbers have PEFT's mean and variance."""
    theirs = with_lora(plain_model(), dropout=0.3, task=None).train()
    theirs.add_adapter(
        "b", peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["query", "key", "output.dense"])
    )
    filled(theirs).base_model.set_adapter(["default", "b"])
    ours = moments(accelerated(theirs), batch(), 1000)
    for name, (mean, variance) in moments(theirs, batch(), 0).items():
        error = ((variance + ours[name][1]) / 200).sqrt()
        some = error > 1e-9
        assert ((mean - ours[name][0]) / error)[some].square().mean().sqrt() < 2, name
        assert 0.6 < ours[name][1].sum() / variance.sum() < 1.6 or not some.any(), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_draw_the_same_masks(reentrant):
    """With dropout and packed weights, the gradients are those without checkpoints."""
    model = accelerated(with_lora(plain_model(dropout=0.1), dropout=0.1)).train()
    model.enable_input_require_grads()
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        found.append(computed(model, batch(**MANY)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_selective_checkpoints_and_saved_tensors(pair):
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    ours, theirs = pair
    fastlora.accelerate(ours)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        assert_alike(ours, theirs, batch(**MANY), **EXACT)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    for model in pair:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    assert_alike(ours, theirs, batch(**MANY), **EXACT)


def test_grad_mode_changes_no_mask():
    """As losses of sentence-transformers need that compute an embedding twice."""
    model = accelerated(with_lora(plain_model(dropout=0.1), dropout=0.1)).train()
    for inputs in (batch(), batch(**MANY)):
        found = []
        for graph in (False, True):
            torch.manual_seed(0)
            with torch.set_grad_enabled(graph):
                found.append(model(**inputs).logits.detach())
        torch.testing.assert_close(*found)


def test_moving_averages(pair):
    """A copy that averages is made after packing."""
    found = []
    fastlora.accelerate(pair[0])
    for model in pair:
        model(**batch(**MANY))
        average = AveragedModel(model)
        for factor in (1.1, 1.2):
            average(**batch(**MANY))
            torch._foreach_mul_([p.detach() for p in model.parameters()], factor)
            average.update_parameters(model)
        found += [average.train()(**batch(**MANY)).logits]
    torch.testing.assert_close(*found, **EXACT)
    assert_alike(*pair, batch(**MANY), **EXACT)


def test_threads_that_pack_at_once(pair):
    ours, theirs = pair
    fastlora.accelerate(ours)
    inputs = [batch(lengths=(32,) * (19 + k)) for k in range(3)]
    expected, wrong = [theirs(**given).logits for given in inputs], []

    def work():
        for given, value in zip(inputs, expected, strict=True):
            found = ours(**given)
            found.loss.backward()
            wrong.append(not torch.allclose(found.logits, value, rtol=1e-10, atol=1e-10))

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 9 and not any(wrong)


def test_models_are_freed_without_the_collector():
    model = with_lora(plain_model()).train()
    fastlora.accelerate(model)
    model(**batch(**MANY)).loss.backward()
    parts = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(part() is not None for part in parts)
    finally:
        gc.enable()


def test_losses_of_sentence_transformers(tmp_path):
    """Several losses, with their own ways to call the model."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    from sentence_transformers.sentence_transformer.modules import Pooling
    from test_survival_around import sentence_model

    theirs = sentence_model(tmp_path, Pooling(32, pooling_mode="mean")).eval()
    ours, guide = accelerated(theirs), copy.deepcopy(theirs)
    first = theirs.preprocess([f"w{k} w{k + 1}" for k in range(12)])
    second = theirs.preprocess(["w3 " * (k % 5 + 1) + f"w{k}" for k in range(12)])
    makes = [
        losses.MultipleNegativesRankingLoss,
        functools.partial(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=5),
        functools.partial(losses.GISTEmbedLoss, guide=guide),
        lambda m: losses.MatryoshkaLoss(m, losses.MultipleNegativesRankingLoss(m), [32, 8]),
    ]
    for make in makes:
        gradients = []
        for model in (copy.deepcopy(ours), copy.deepcopy(theirs)):
            make(model)([dict(first), dict(second)], torch.zeros(12)).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert gradients[0]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
