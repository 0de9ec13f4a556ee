"""Each family accelerated, against PEFT: logits and every gradient, masks of either side."""

import copy

import pytest
import torch
from models import (
    FAMILIES,
    assert_alike,
    batch,
    linear_targets,
    logits_and_gradients,
    plain_model,
    with_lora,
)

import fastlora

EXACT = dict(rtol=1e-10, atol=1e-10)


def everything(family):
    """A model of the family with LoRA on all linear layers of the encoder."""
    model = plain_model(family)
    return with_lora(model, linear_targets(model))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_query_and_value_in_double_precision(family, side, implementation):
    if family == "mpnet" and implementation == "sdpa":
        pytest.skip("transformers has no such attention of MPNet")
    theirs = with_lora(plain_model(family, implementation=implementation)).double().train()
    ours = copy.deepcopy(theirs)
    report = fastlora.accelerate(ours)
    assert "encoder on real tokens" in report.fused.values()
    assert not report.kept
    assert_alike(ours, theirs, batch(side), **EXACT)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_in_double_precision(family, side):
    theirs = everything(family).double().train()
    ours = copy.deepcopy(theirs)
    report = fastlora.accelerate(ours)
    assert list(report.fused.values()).count("LoRA layer of PEFT") == 2 * 6
    assert_alike(ours, theirs, batch(side), **EXACT)


def error(model, inputs, truth):
    """Of logits and each gradient: the norm of the difference to the truth."""
    found = logits_and_gradients(model, inputs)
    return {name: (found[name].double() - value).norm() for name, value in truth.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_is_as_right_as_pefts(family):
    """Errors against double precision are at most twice PEFT's, thrice in gradients."""
    theirs, inputs = everything(family).train(), batch("left", (30, 3, 1, 17, 24, 11))
    truth = logits_and_gradients(copy.deepcopy(theirs).double(), inputs)
    ours = copy.deepcopy(theirs)
    fastlora.accelerate(ours)
    mine, other = error(ours, inputs, truth), error(theirs, inputs, truth)
    for name, value in truth.items():
        rounding = torch.finfo(torch.float32).eps * value.norm()
        factor = 2 if name == "logits" else 3
        assert mine[name] <= max(factor * other[name], rounding), name


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_dropout_keeps_the_mean_loss(family):
    """The mean loss over draws is PEFT's within its error."""
    theirs = with_lora(plain_model(family, dropout=0.1), dropout=0.1).train()
    ours, inputs, losses = copy.deepcopy(theirs), batch(), []
    fastlora.accelerate(ours)
    # Each row has masks of its own, so twenty copies of the batch are twenty draws.
    labels = inputs.pop("labels").repeat(20)
    inputs = {name: value.repeat(20, 1) for name, value in inputs.items()}
    for model in (theirs, ours):
        rows = []
        for seed in range(5):
            torch.manual_seed(seed)
            with torch.no_grad():
                logits = model.train()(**inputs).logits
            rows.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        losses.append(torch.cat(rows).view(100, 4).mean(1))
    error = sum(loss.var() / len(loss) for loss in losses) ** 0.5
    assert losses[1].std() > 0.3 * losses[0].std() > 0
    assert abs(losses[0].mean() - losses[1].mean()) < 4 * error


@pytest.mark.parametrize("family", FAMILIES)
def test_models_without_adapters(family):
    theirs = plain_model(family).double().eval()
    ours = copy.deepcopy(theirs)
    fastlora.accelerate(ours)
    assert_alike(ours, theirs, batch("left"), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_adapters(family):
    from peft import LoraConfig

    theirs = plain_model(family).double()
    theirs.add_adapter(LoraConfig(r=4, target_modules=[*FAMILIES[family][:2]], lora_dropout=0.0))
    ours = copy.deepcopy(theirs)
    fastlora.accelerate(ours)
    assert_alike(ours, theirs, batch(), **EXACT)


def test_modernbert_and_deberta_get_their_lora_layers_fused():
    import transformers as hf

    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(intermediate_size=48, max_position_embeddings=40, pad_token_id=1)
    modern = hf.ModernBertConfig(**sizes, global_attn_every_n_layers=1, sep_token_id=2)
    deberta = hf.DebertaV2Config(
        **sizes, relative_attention=True, pos_att_type=["p2c", "c2p"], hidden_dropout_prob=0.0
    )
    deberta.attention_probs_dropout_prob = 0.0
    for model, targets in (
        (hf.ModernBertForSequenceClassification(modern), ["Wqkv", "Wo"]),
        (hf.DebertaV2ForSequenceClassification(deberta), ["query_proj", "value_proj"]),
    ):
        theirs = with_lora(model, targets).double().eval()
        ours = copy.deepcopy(theirs)
        report = fastlora.accelerate(ours)
        assert set(report.fused.values()) == {"LoRA layer of PEFT"}
        assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM", "ForMultipleChoice"])
def test_other_heads(head):
    theirs = plain_model(head=head).double().eval()
    ours, inputs = copy.deepcopy(theirs), batch(labels=False)
    fastlora.accelerate(ours, real_tokens=True)
    if head == "ForMultipleChoice":
        inputs = {name: value.view(2, 2, -1) for name, value in inputs.items()}
        real = slice(None)
    else:
        real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours(**inputs).logits[real], theirs(**inputs).logits[real], **EXACT)


def test_states_at_padding_are_zeros_in_a_bare_model():
    theirs = plain_model(head="Model").double().eval()
    ours, inputs = copy.deepcopy(theirs), batch(labels=False)
    fastlora.accelerate(ours)
    found, expected = ours(**inputs), theirs(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        found.last_hidden_state[real], expected.last_hidden_state[real], **EXACT
    )
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, **EXACT)
    assert not found.last_hidden_state[~real].any()
