"""PEFT reads our folders and we read PEFT's: the outputs are equal."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers

from fastlora import LoraConfig, inject, load_adapter, lora_layers, save_adapter
from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel
from fastlora.bert.weights import load_encoder
from fastlora.data.source import resolve
from fastlora.errors import UserError
from fastlora.lora.config import TARGETS
from fastlora.lora.files import read_config

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
FAMILIES = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "max_position_embeddings": 20},
    "Albert": {**SIZES, "embedding_size": 8},
    "DistilBert": DISTIL,
    "MPNet": {**SIZES, "max_position_embeddings": 20},
}
IDS = torch.arange(3, 33).view(3, 10)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PATTERNS = {"rank_pattern": {"key": 2, "value": 6}, "alpha_pattern": {r"layer\.1\..*query": 5}}


def classifier(family="Bert"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], num_labels=3)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


def train(model, seed=1):
    """Give what trains values, so that it changes what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                p.normal_(0, 0.3, generator=generator)
    return model.eval()


@torch.no_grad()
def output(model):
    found = model(IDS)
    return found.last_hidden_state if hasattr(found, "last_hidden_state") else found.logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def their_reading(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing and unexpected tensors
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize(
    "settings",
    [
        LoraConfig(r=4, alpha=6, rslora=True),
        LoraConfig(r=4, targets=("key", "output")),
        LoraConfig(r=4, targets=("ffn_output", "query")),
        LoraConfig(r=4, alpha=2.5, targets=tuple(TARGETS)),
        LoraConfig(r=4, targets="all"),
        LoraConfig(r=4, targets=r".*layer\.1\..*(query|dense)"),
        LoraConfig(r=4, targets=("query", "key", "value"), **PATTERNS),
    ],
)
@pytest.mark.parametrize("heads", [("classifier",), ("classifier", "pooler"), ("LayerNorm",)])
def test_peft_reads_ours(settings, heads, tmp_path):
    base = classifier()
    model = copy.deepcopy(base)
    inject(model, settings, train=heads)
    save_adapter(train(model), tmp_path)
    theirs = their_reading(base, tmp_path)
    found = {name.rpartition(".lora_A")[0] for name in theirs.state_dict() if ".lora_A." in name}
    assert found == {f"base_model.model.{name}" for name in lora_layers(model)}
    close(output(theirs), output(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["query", "value"], "use_rslora": True},
        {"target_modules": ["query", "key", "value", "dense"], "exclude_modules": ["key"]},
        {"target_modules": ["attention.output.dense", "intermediate.dense", "output.dense"]},
        {"target_modules": r".*\.attention\.self\.(query|value)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["query", "key", "value"], **PATTERNS},
        {"target_modules": ["query"], "init_lora_weights": "gaussian"},
        {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]},
    ],
)
def test_we_read_pefts(settings, tmp_path):
    base = classifier()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=10, **settings)
    theirs = train(peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path)
    load_adapter(base, tmp_path)
    close(output(base), output(theirs))
    if "rank_pattern" not in settings:
        found = read_config(tmp_path)
        assert (found.r, found.alpha, found.dropout) == (4, 10.0, 0.0)
        assert found.rslora == bool(settings.get("use_rslora"))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_classifiers_go_both_ways(family, tmp_path):
    """Their heads are called differently: PEFT's "classifier" is "pre_classifier", too."""
    base = classifier(family)
    ours = copy.deepcopy(base)
    heads = [name for name, _ in base.named_children() if name.endswith("classifier")]
    layers = inject(ours, LoraConfig(r=4, alpha=10), train=heads)
    save_adapter(train(ours), tmp_path / "ours")
    close(output(their_reading(copy.deepcopy(base), tmp_path / "ours")), output(ours))
    ends = sorted({name.rpartition(".")[2] for name in layers})
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=10, target_modules=ends)
    theirs = train(peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(base, tmp_path / "theirs")
    close(output(base), output(theirs))


def test_transformers_reads_ours_as_a_classifier(tmp_path):
    base = classifier()
    base.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(base)
    inject(model, LoraConfig(r=4), train=("classifier",))
    save_adapter(train(model), tmp_path / "adapter", base_model=str(tmp_path / "base"))
    found = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=3
    )
    close(output(found.eval()), output(model))


def test_settings_of_pefts_folders_have_our_short_names(tmp_path):
    every = [*("query", "key", "value"), *("attention.output.dense", "intermediate.dense")]
    config = peft.LoraConfig(target_modules=[*every, "output.dense"])
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    assert read_config(tmp_path) == LoraConfig(r=8, alpha=8, dropout=0, targets=tuple(TARGETS))


def test_minbert_and_peft_read_each_other(tmp_path):
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    ours = BertModel(BertConfig(**SIZES)).eval()
    ours.load_state_dict(theirs.state_dict())
    inject(ours, LoraConfig(r=4))
    save_adapter(train(ours), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    close(output(their_reading(copy.deepcopy(theirs), tmp_path)), output(ours))
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"])
    adapted = train(peft.get_peft_model(theirs, config), seed=2)
    adapted.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    close(output(ours), output(adapted))


def test_minilm_with_peft(tmp_path):
    source = resolve("minilm")
    model = load_encoder(source.folder)[0]
    inject(model, LoraConfig(r=32, alpha=16))
    save_adapter(train(model), tmp_path, base_model=source.name)
    theirs = transformers.BertModel.from_pretrained(source.folder)
    close(output(their_reading(theirs, tmp_path)), output(model))


def test_a_new_head_that_stays_frozen_gives_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"froze classifier of Bert.* train=\('classifier',\)\)"):
        inject(model := classifier(), LoraConfig(r=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, LoraConfig(r=4), train=("classifier",))
        save_adapter(model, tmp_path)
        load_adapter(classifier(), tmp_path)  # which makes the head trainable
        torch.nn.init.normal_((pretrained := classifier()).classifier.bias)
        inject(pretrained, LoraConfig(r=4))
        (without := classifier()).classifier = torch.nn.Identity()
        inject(without, LoraConfig(r=4))


def test_settings_of_peft_itself_are_refused_with_a_hint():
    with pytest.raises(UserError, match=r"'peft.*LoraConfig' .*fastlora.LoraConfig.*accelerate"):
        inject(classifier(), peft.LoraConfig(r=4))
