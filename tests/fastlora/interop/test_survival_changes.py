"""What changes a model before it is accelerated, or after: the same numbers, or a word about it.

Each test does the same to an accelerated model and to one that is not.
"""

import copy
import pickle

import peft
import pytest
import torch
import transformers as hf
from models import assert_alike, batch, config_of, filled, plain_model, with_lora
from survival import EXACT, accelerated, classes, encoder
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.bert import modeling_bert

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore:fastlora.accelerate")


class Mixing(nn.Module):
    """A layer around another one that looks at neighbouring tokens."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        y = self.inner(*inputs)
        return y + y.roll(1, 1)


class MixingOutput(modeling_bert.BertOutput):
    """A class of one's own for a part of transformers' layers."""

    def forward(self, *inputs):
        y = super().forward(*inputs)
        return y + y.roll(1, 1)


class Doubled(nn.Linear):
    """A linear layer that computes more, as quantised ones do."""

    def forward(self, input):
        return 2 * super().forward(input)


class Tripled(modeling_bert.BertSelfAttention):
    def forward(self, *inputs, **more):
        found, weights = super().forward(*inputs, **more)
        return 3 * found, weights


class NoDropout(nn.Module):
    """transformers reads an attention's `dropout.p`, and never calls it."""

    p = 0.0

    def forward(self, x):
        return 0 * x


def attention(model):
    return encoder(model).layer[0].attention.self


def another_attention(model):
    encoder(model).layer[0].attention.self = modeling_bert.BertSelfAttention(model.config).double()


def another_layer(model):
    encoder(model).layer.append(modeling_bert.BertLayer(model.config).double())


def fewer_layers(model):
    encoder(model).layer = encoder(model).layer[:1]


def mixing(model):
    encoder(model).layer[0].output = Mixing(encoder(model).layer[0].output)


def mixing_class(model):
    encoder(model).layer[0].output.__class__ = MixingOutput


def doubled(model):
    encoder(model).layer[0].intermediate.dense.__class__ = Doubled
    attention(model).query.base_layer.__class__ = Doubled


def tripled(model):
    attention(model).__class__ = Tripled


def shared(model):
    encoder(model).layer[1] = encoder(model).layer[0]


def shared_linear(model):
    attention(model).value = encoder(model).layer[0].attention.output.dense = attention(model).query


def normalised(model):
    parametrizations.weight_norm(encoder(model).layer[0].intermediate.dense)
    parametrizations.weight_norm(attention(model).query.lora_A["default"])


def spectral(model):
    parametrizations.spectral_norm(encoder(model).layer[0].intermediate.dense)


def spectral_query(model):
    parametrizations.spectral_norm(attention(model).query.base_layer)


def data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.05)
        parameter.data = parameter.data * 1.02


def eager(model):
    model.base_model.model.set_attn_implementation("eager")


def sharper(model):
    attention(model).scaling *= 3


def causal(model):
    """Attention that sees no later tokens, as some make of an encoder."""
    for layer in encoder(model).layer:
        layer.attention.self.is_causal = True


def no_dropout(model):
    attention(model).dropout = NoDropout()


def monte_carlo(model):
    """Dropout in evaluation, as many do it; transformers' attention does not take part."""
    model.eval()
    attention(model).dropout.train().p = 0.5


def all_dropped(model):
    encoder(model).layer[0].output.dropout.p = 1.0


AROUND = [
    ("before", shared), ("before", shared_linear), ("before", doubled), ("before", tripled),
    ("before", eager), ("before", normalised),
    ("after", fewer_layers), ("after", data), ("after", normalised), ("after", eager),
    ("before", mixing),
    ("after", mixing),
    ("before", mixing_class),
    ("after", another_attention),
    ("after", another_layer),
    ("after", spectral),
    ("after", spectral_query),
    ("before", sharper),
    ("before", causal),
    ("before", no_dropout),
    ("before", monte_carlo),
    ("before", all_dropped),
]  # fmt: skip


@pytest.mark.parametrize(("when", "change"), AROUND)
def test_changed_models(pair, when, change):
    ours, theirs = pair
    if when == "after":
        fastlora.accelerate(ours)
    for model in pair:
        torch.manual_seed(3)
        change(model)
    if when == "before":
        fastlora.accelerate(ours)
    full = change in (all_dropped, causal, data)
    assert_alike(ours, theirs, batch(lengths=(32,) * 20) if full else batch(), **EXACT)


def dense(model):
    return encoder(model).layer[0].output.dense


def test_packed_weights_follow_merges_and_writes():
    """Batches of many tokens run on packed copies of frozen weights, as long as they are frozen."""
    plain = plain_model()  # in single precision, for oneDNN packs no other
    theirs = with_lora(plain, ["output.dense"])
    ours, inputs = accelerated(theirs), batch(lengths=(32,) * 20)
    ours(**inputs)
    assert dense(ours).base_layer.packed is not None
    for change in (
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: dense(model).base_layer.weight.data.mul_(1.5),
        lambda model: dense(model).base_layer.weight.detach().numpy().fill(0.01),
        lambda model: model.double().float(),
        lambda model: dense(model).base_layer.weight.requires_grad_(),
    ):
        for model in (ours, theirs):
            change(model)
        assert_alike(ours, theirs, inputs, rtol=1e-3, atol=1e-5)
    assert dense(ours).base_layer.packed is None


class Mean(nn.Module):
    """A head that reads all states, at padding, too."""

    def __init__(self, outputs):
        super().__init__()
        self.dense = nn.Linear(32, outputs)

    def forward(self, states):
        return self.dense(states.mean(1))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_heads_that_have_been_replaced(family):
    model = plain_model(family)
    if family == "bert":
        model.bert.pooler = Mean(32)
    else:
        model.classifier = Mean(2)
    theirs = with_lora(model).double()
    assert_alike(accelerated(theirs), theirs, batch(), **EXACT)


def test_heads_that_may_read_padding():
    """They keep the square, and the report says so; real_tokens says that they do not."""

    class Own(hf.BertForSequenceClassification):
        pass

    heads = ("ForQuestionAnswering", "ForMaskedLM", "ForTokenClassification")
    for model in (*(plain_model(head=head) for head in heads), Own(config_of("bert"))):
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).double()
        ours = copy.deepcopy(theirs)
        report = fastlora.accelerate(ours)
        assert "may read states at padding" in str(report)
        found, expected = (m(**batch(labels=False)) for m in (ours, theirs))
        torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), **EXACT)
        assert (
            "encoder on real tokens" in fastlora.accelerate(ours, real_tokens=True).fused.values()
        )


def test_encoders_with_decoders():
    """The encoder runs on real tokens, the decoder as it was; both get the same gradients."""
    config = config_of("bert")
    config.is_decoder = config.add_cross_attention = True
    parts = hf.BertModel(config_of("bert")), hf.BertLMHeadModel(config)
    model = hf.EncoderDecoderModel(encoder=parts[0], decoder=parts[1])
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 1
    theirs = filled(peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))).double()
    ours = copy.deepcopy(theirs)
    assert list(fastlora.accelerate(ours).kept.values()) == ["it is a decoder"]
    inputs = batch(labels=False)
    assert_alike(ours, theirs, inputs | {"labels": inputs["input_ids"]}, **EXACT)


def test_unused_cross_attention(pair):
    """An encoder of BERT ignores the states of another; ours raises."""
    fastlora.accelerate(pair[0])
    states = torch.randn(4, 9, 32).double()
    found, expected = (
        m.base_model.model.bert(**batch(labels=False), encoder_hidden_states=states) for m in pair
    )
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)


def test_causal_by_argument(pair):
    """transformers hands `is_causal` down to PyTorch's attention."""
    fastlora.accelerate(pair[0])
    inputs = batch(lengths=(12,) * 6, labels=False) | {"is_causal": True}
    found, expected = (m.base_model.model.bert(**inputs).pooler_output for m in pair)
    torch.testing.assert_close(found, expected)


def test_configuration_that_has_been_replaced(pair):
    fastlora.accelerate(pair[0])
    shapes = []
    for model in pair:
        bert = model.base_model.model.bert
        bert.config = copy.deepcopy(bert.config)
        bert.config.output_hidden_states = True
        shapes.append([states.shape for states in bert(**batch(labels=False)).hidden_states])
    assert shapes[0] == shapes[1]


def test_adapters_of_fastlora():
    """`inject` before or after `accelerate`."""
    theirs = plain_model().double()
    later = accelerated(theirs)
    for model in (theirs, later):
        torch.manual_seed(3)
        layers = fastlora.inject(model, fastlora.LoraConfig(r=4, dropout=0.0))
        for layer in layers.values():
            nn.init.constant_(layer.lora_B["default"], 0.1)
    ours = copy.deepcopy(theirs)
    report = fastlora.accelerate(ours)
    assert "4 LoRA layers of fastlora" in str(report)
    for model in (ours, later, copy.deepcopy(later)):
        assert_alike(model, theirs, batch(), **EXACT)
    fastlora.restore(ours)
    assert classes(ours) == classes(theirs)


def test_adapters_of_fastlora_are_pickled():
    model = accelerated(plain_model())
    fastlora.inject(model, fastlora.LoraConfig())
    pickle.loads(pickle.dumps(model))
