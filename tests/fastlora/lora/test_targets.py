"""Which linear layers a target means, and what a model's family gets by default."""

import pytest
import torch
import transformers
from torch import nn

from fastlora import LoraConfig, UserError, inject, lora_layers
from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
IDS = torch.arange(3, 11)[None]
# The family, its sizes, how deep its layers are repeated, and the ends of the default targets.
FAMILIES = {
    "Bert": (SIZES, 2, ("self.query", "self.value")),
    "Roberta": (SIZES, 2, ("self.query", "self.value")),
    "Electra": ({**SIZES, "embedding_size": 8}, 2, ("self.query", "self.value")),
    "Albert": ({**SIZES, "embedding_size": 8}, 1, ("attention.query", "attention.value")),
    "DistilBert": (DISTIL, 2, ("attention.q_lin", "attention.v_lin")),
    "MPNet": (SIZES, 2, ("attn.q", "attn.v")),
    "DebertaV2": (SIZES, 2, ("self.query_proj", "self.value_proj")),
    "ModernBert": ({**SIZES, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2}, 2, ("attn.Wqkv",)),
}


def family(name, head="Model"):
    torch.manual_seed(0)
    sizes = FAMILIES[name][0] | ({} if head == "Model" else {"num_labels": 3})
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}{head}")(config).eval()


def minbert():
    return BertModel(BertConfig(**SIZES, max_position_embeddings=16))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gets_its_query_and_value_and_trains(name, fill):
    model = family(name)
    plain = model(IDS)[0]
    layers = inject(model, LoraConfig(dropout=0.0))
    _, depth, ends = FAMILIES[name]
    assert len(layers) == depth * len(ends)
    assert all(layer.endswith(ends) for layer in layers)
    assert torch.equal(model(IDS)[0], plain)
    fill(model)
    adapted = model(IDS)[0]
    assert not torch.allclose(adapted, plain)
    adapted.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("target", ["all", "all-linear"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_means_all_linear_layers_but_the_head(name, target):
    model = family(name, "ForSequenceClassification")
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    heads = [n for n in linears if "classifier" in n.split(".")[0]]
    assert heads and list(inject(model, LoraConfig(targets=target))) == [
        n for n in linears if n not in heads
    ]


def test_all_leaves_out_what_trains_whole_and_output_embeddings():
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    layers = inject(model, LoraConfig(targets="all"), train=("layer.1.output",))
    assert all(name.startswith("bert.encoder.layer") for name in layers)
    assert len(layers) == 11 and "bert.encoder.layer.1.output.dense" not in layers
    assert not hasattr(model.get_output_embeddings(), "lora_A")
    assert model.bert.encoder.layer[1].output.dense.weight.requires_grad


@pytest.mark.parametrize(
    ("targets", "per_layer"),
    [
        (("query", "value"), 2),
        (("output",), 1),
        (("ffn_output",), 1),
        (("query", "key", "value", "output", "intermediate", "ffn_output"), 6),
    ],
)
def test_short_names_of_berts_matrices_hit_them(targets, per_layer):
    layers = inject(minbert(), LoraConfig(targets=targets))
    assert len(layers) == 2 * per_layer
    if targets == ("ffn_output",):
        assert set(layers) == {f"encoder.layer.{i}.output.dense" for i in range(2)}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("encoder.layer.0.attention.self.key", ["encoder.layer.0.attention.self.key"]),
        ("1.attention.self.key", ["encoder.layer.1.attention.self.key"]),
        ("self.key", [f"encoder.layer.{i}.attention.self.key" for i in range(2)]),
        (
            r".*layer\.1.*\.(key|value)",
            [f"encoder.layer.1.attention.self.{n}" for n in ("key", "value")],
        ),
        ("pooler.dense", ["pooler.dense"]),
        (
            ("pooler.dense", r".*\.0\..*\.query"),
            ["encoder.layer.0.attention.self.query", "pooler.dense"],
        ),
    ],
)
def test_a_target_is_a_name_an_end_or_a_regular_expression(target, expected):
    for make in (minbert, lambda: family("Bert")):
        model = make()
        assert list(inject(model, LoraConfig(targets=target))) == expected
        assert list(lora_layers(model)) == expected


@pytest.mark.parametrize("target", ["nothing", "uery", "encoder", "self.", "*", "layer.0", ""])
def test_a_target_that_means_no_linear_layer_is_refused_with_the_names_there_are(target):
    model = minbert()
    with pytest.raises(
        UserError, match=r"matches no linear layer.*attention\.self\.query"
    ) as found:
        inject(model, LoraConfig(targets=target))
    assert repr(target) in str(found.value)
    assert all(p.requires_grad for p in model.parameters())


def test_patterns_give_layers_ranks_and_alphas_of_their_own():
    config = LoraConfig(
        r=4,
        alpha=8,
        targets=("query", "key", "value"),
        rank_pattern={"key": 2, r"layer\.1\..*\.value": 6},
        alpha_pattern={"encoder.layer.0.attention.self.query": 5},
    )
    layers = inject(minbert(), config)
    found = {
        n: (m.lora_A["default"].shape[0], m.settings["default"].scale) for n, m in layers.items()
    }
    start = "encoder.layer.{}.attention.self.{}".format
    assert found == {
        start(0, "query"): (4, 5 / 4),
        start(0, "key"): (2, 8 / 2),
        start(0, "value"): (4, 8 / 4),
        start(1, "query"): (4, 8 / 4),
        start(1, "key"): (2, 8 / 2),
        start(1, "value"): (6, 8 / 6),
    }


def test_what_is_no_model_and_no_settings_of_ours():
    peft = pytest.importorskip("peft")
    with pytest.raises(UserError, match="model is 'str'"):
        inject("model", LoraConfig())
    with pytest.raises(UserError, match=r"config is 'peft\..*LoraConfig"):
        inject(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig())
