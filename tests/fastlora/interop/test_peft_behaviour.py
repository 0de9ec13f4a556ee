"""PEFT's documented behaviour of LoRA, on accelerated models.

Each test does the same to an accelerated model and to one that stays PEFT's, and compares logits
and every gradient in double precision.
"""

import copy

import peft
import pytest
import torch
import transformers as hf
from models import assert_alike, batch, filled, logits_and_gradients, plain_model, with_lora
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from survival import EXACT, classes

import fastlora

DENSE = ["query", "key", "value", "dense"]
DORA = "adapter 'default' is not plain LoRA but DoraLinearVariant"
BIASES = "adapter 'default' has biases"


def pair_of(targets=None, task=None, **settings):
    """A model that is accelerated, and the same one that is not."""
    theirs = with_lora(plain_model(), targets, task=task, **settings).double().train()
    ours = copy.deepcopy(theirs)
    fastlora.accelerate(ours)
    return ours, theirs


def each(models, change):
    """Do the same to all models, with the same random numbers."""
    for model in models:
        torch.manual_seed(5)
        change(model)


def with_second(models, **settings):
    """Add the adapter "second" to all models."""
    config = LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **settings})
    each(models, lambda model: model.add_adapter("second", copy.deepcopy(config)))
    each(models, lambda model: filled(model.double()))


def assert_logits_alike(ours, theirs, **more):
    inputs = batch(labels=False) | more
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, **EXACT)


SETTINGS = {
    "rank-stabilised": dict(use_rslora=True),
    "ranks by pattern": dict(rank_pattern={"query": 3}, alpha_pattern={"value": 32}),
    "PiSSA": dict(init_lora_weights="pissa"),
    "OLoRA": dict(init_lora_weights="olora"),
    "Gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "all biases": dict(bias="all"),
    "biases of LoRA": dict(bias="lora_only"),
    "some layers": dict(layers_to_transform=[1]),
    "layers excluded": dict(exclude_modules=r".*encoder\.layer\.0.*"),
    "token indices": dict(trainable_token_indices={"word_embeddings": [4, 5, 6]}),
    "layers again": dict(layer_replication=[(0, 2), (0, 2)]),
    "all linear": dict(targets="all-linear"),
    "a pooler saved": dict(modules_to_save=["pooler"]),
    "dense layers saved": dict(modules_to_save=["intermediate"]),
    "a query saved": dict(targets=["value"], modules_to_save=["query"]),
}
# What keeps PEFT's own forward, and what the report says of it.
KEPT = {
    "DoRA": (dict(use_dora=True), DORA),
    "bias of LoRA": (dict(lora_bias=True), BIASES),
    "embeddings": (dict(targets=["query", "word_embeddings"]), "no fused form of Embedding"),
    "parameters": (
        dict(targets=["value"], target_parameters=["query.weight"]),
        "no fused form of ParamWrapper",
    ),
    "attention saved": (
        dict(targets=["dense"], modules_to_save=["attention.self"]),
        "its layers have attention that fastlora does not know",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_plain_lora(name):
    """Every setting that is still plain LoRA is fused, and restored without a trace."""
    theirs = with_lora(plain_model(), **SETTINGS[name]).double().train()
    ours = copy.deepcopy(theirs)
    assert not fastlora.accelerate(ours).kept
    assert_alike(ours, theirs, batch(), **EXACT)
    fastlora.restore(ours)
    assert classes(ours) == classes(theirs)
    assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.filterwarnings("ignore:fastlora.accelerate")
def test_settings_that_keep_pefts_own_forward(name):
    """What is more than plain LoRA computes as before, and the report says why."""
    settings, reason = KEPT[name]
    theirs = with_lora(plain_model(), **settings).double().train()
    ours = copy.deepcopy(theirs)
    report = fastlora.accelerate(ours)
    assert any(reason in why for why in report.kept.values())
    assert reason in str(report)
    assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(target_modules=["query"]),
        peft.IA3Config(target_modules=["query", "key"], feedforward_modules=["key"]),
        peft.AdaLoraConfig(target_modules=["query"], total_step=10),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        peft.OFTConfig(target_modules=["query"], oft_block_size=8),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.filterwarnings("ignore:fastlora.accelerate")
def test_other_methods_of_peft(config):
    """An encoder with adapters of another kind runs on real tokens and computes the same."""
    theirs = peft.get_peft_model(plain_model(), copy.deepcopy(config)).double().train()
    ours = copy.deepcopy(theirs)
    fastlora.accelerate(ours)
    assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.parametrize("settings", [{}, dict(use_dora=True), dict(target_modules=DENSE)])
@pytest.mark.filterwarnings("ignore:fastlora.accelerate")
def test_adapters_come_and_go_after_acceleration(settings):
    """Adapters added, chosen alone or together, switched off and deleted."""
    models = ours, theirs = pair_of()
    with_second(models, **settings)
    assert_alike(ours, theirs, batch(), **EXACT)
    for chosen in ("second", ["default", "second"]):
        each(models, lambda model, chosen=chosen: model.base_model.set_adapter(chosen))
        assert_alike(ours, theirs, batch(), **EXACT)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_logits_alike(ours, theirs)
    fastlora.accelerate(ours)  # what has been added becomes fused, too
    assert_alike(ours, theirs, batch(), **EXACT)
    each(models, lambda model: model.delete_adapter("default"))
    assert_alike(ours, theirs, batch(), **EXACT)
    fastlora.restore(ours)
    assert classes(ours) == classes(theirs)


@pytest.mark.filterwarnings("ignore:fastlora.accelerate")
def test_merging_and_unmerging():
    """Merged adapters are in the base; disabling them unmerges, as PEFT does."""
    models = ours, theirs = pair_of(DENSE)
    each(models, lambda model: model.merge_adapter())
    assert_logits_alike(ours, theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_logits_alike(ours, theirs)
    each(models, lambda model: model.merge_adapter())
    each(models, lambda model: model.unmerge_adapter())
    assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.parametrize("how", ["merge", "merge safely", "unload"])
def test_taking_adapters_off(how):
    """What is left is transformers' model, accelerated until it is restored."""

    def bare(model):
        if how == "unload":
            return model.unload()
        return model.merge_and_unload(safe_merge=how == "merge safely")

    ours, theirs = map(bare, pair_of(DENSE))
    assert_logits_alike(ours, theirs)
    fastlora.restore(ours)
    assert classes(ours) == classes(theirs)
    assert_logits_alike(ours, theirs)


@pytest.mark.parametrize("combination", ["linear", "svd", "cat", "ties"])
def test_weighted_adapters(combination):
    models = ours, theirs = pair_of()
    with_second(models, r=8)
    density = {} if combination in ("linear", "svd", "cat") else {"density": 0.5}
    names, weights = ["default", "second"], [0.7, 0.3]
    each(models, lambda m: m.add_weighted_adapter(names, weights, "both", combination, **density))
    each(models, lambda model: model.set_adapter("both"))
    assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.filterwarnings("ignore:fastlora.accelerate")
def test_batches_of_mixed_adapters():
    """`adapter_names` chooses an adapter for each row, in inference."""
    ours, theirs = pair_of()
    with_second((ours, theirs))
    each((ours, theirs), lambda model: model.eval())
    assert_logits_alike(ours, theirs, adapter_names=["default", "second", "__base__", "second"])
    assert_logits_alike(ours, theirs)


def test_scales_changed_later():
    """A scale that is set or rescaled after acceleration counts."""
    models = ours, theirs = pair_of()
    layers = [m for model in models for m in model.modules() if hasattr(m, "scale_layer")]
    each(layers, lambda layer: layer.scale_layer(0.5))
    assert_alike(ours, theirs, batch(), **EXACT)
    with rescale_adapter_scale(ours, 2.0), rescale_adapter_scale(theirs, 2.0):
        assert_alike(ours, theirs, batch(), **EXACT)


def test_state_dicts():
    """Names stay PEFT's, and what is loaded counts, by PEFT's functions and by PyTorch's."""
    models = ours, theirs = pair_of(modules_to_save=["pooler"])
    adapter = get_peft_model_state_dict(ours)
    assert list(adapter) == list(get_peft_model_state_dict(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    doubled = {name: value * 2 for name, value in adapter.items()}
    each(models, lambda model: set_peft_model_state_dict(model, doubled))
    assert_alike(ours, theirs, batch(), **EXACT)
    for assign in (False, True):
        state = {name: value * 1.1 for name, value in theirs.state_dict().items()}
        each(models, lambda m, a=assign, s=state: m.load_state_dict(s, assign=a))
        assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_saved_adapters_load(when, low_memory, tmp_path):
    """Saved while accelerated, loaded onto a base that is accelerated before, after or never."""
    ours, theirs = pair_of()
    ours.save_pretrained(tmp_path)
    base = plain_model().double()
    if when == "before":
        fastlora.accelerate(base)
    options = dict(is_trainable=True, low_cpu_mem_usage=low_memory)
    loaded = PeftModel.from_pretrained(base, tmp_path, **options).double().train()
    if when != "never":
        fastlora.accelerate(loaded)
    assert_alike(loaded, theirs, batch(), **EXACT)
    each((ours, theirs), lambda m: m.load_adapter(tmp_path, "x", low_cpu_mem_usage=low_memory))
    each((ours, theirs), lambda model: model.double().base_model.set_adapter(["default", "x"]))
    assert_alike(ours, theirs, batch(), **EXACT)


def test_merged_models_are_saved_as_transformers(tmp_path):
    ours, theirs = (model.eval() for model in pair_of(DENSE))
    ours.merge_and_unload().save_pretrained(tmp_path)
    loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path).double().eval()
    assert_logits_alike(loaded, theirs)


def test_hot_swapped_adapters(tmp_path):
    """Weights that are written into the adapter's own parameters count."""
    models = ours, theirs = pair_of()
    other = copy.deepcopy(theirs)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.7)
    other.save_pretrained(tmp_path)
    each(models, lambda model: hotswap_adapter(model, tmp_path, "default"))
    assert_alike(ours, theirs, batch(), **EXACT)
    assert_alike(ours, other, batch(), rtol=1e-6, atol=1e-6)


def test_adapters_of_transformers_itself():
    """`add_adapter`, `disable_adapters`, `enable_adapters` and `delete_adapter` without PEFT's."""
    theirs = plain_model().double()
    models = ours, _ = copy.deepcopy(theirs), theirs
    fastlora.accelerate(ours)
    config = LoraConfig(r=4, target_modules=["query", "value"])
    each(models, lambda model: model.add_adapter(copy.deepcopy(config), "a"))
    each(models, lambda model: filled(model.double()))
    fastlora.accelerate(ours)
    assert_alike(ours, theirs, batch(), **EXACT)
    for change in ("disable_adapters", "enable_adapters"):
        each(models, lambda model, change=change: getattr(model, change)())
        assert_logits_alike(ours, theirs)
    each(models, lambda model: model.delete_adapter("a"))
    assert_logits_alike(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "half base", "half base and adapters"])
@pytest.mark.filterwarnings("ignore:fastlora.accelerate")
def test_half_precision(how, dtype):
    """Types of gradients are PEFT's, and values are within the type's error of them."""
    autocast, base = how == "autocast", plain_model()
    config = LoraConfig(r=8, target_modules=DENSE, task_type="SEQ_CLS")
    base = base if autocast else base.to(dtype)
    cast = how == "half base"
    theirs = filled(peft.get_peft_model(base, config, autocast_adapter_dtype=cast)).train()
    ours = copy.deepcopy(theirs)
    fastlora.accelerate(ours)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found, expected = (logits_and_gradients(model, batch()) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        error = (found[name].float() - value.float()).norm() / value.float().norm()
        assert error < 64 * torch.finfo(dtype).eps / 4, name


def test_trainable_base_weights():
    ours, theirs = pair_of()
    each((ours, theirs), lambda model: model.requires_grad_(True))
    assert_alike(ours, theirs, batch(), **EXACT)


def test_what_peft_says_of_itself():
    """Text, status and configuration are those of the model as it was."""
    ours, theirs = pair_of()
    assert str(ours) == str(theirs)
    assert ours.get_model_status() == theirs.get_model_status()
    assert ours.get_layer_status() == theirs.get_layer_status()


def test_dropout_of_one():
    """PEFT takes lora_dropout=1.0: the adapter gives nothing."""
    assert_alike(*pair_of(dropout=1.0), batch(), **EXACT)


def test_trainable_scales():
    """`layer.scaling[name]` may be a tensor, and autograd sees it in PEFT's forward."""
    gradients = []
    for model in pair_of():
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        for layer in model.modules():
            if hasattr(layer, "scale_layer"):
                layer.scaling["default"] = scale
        model(**batch(labels=False)).logits.sum().backward()
        gradients.append(scale.grad)
    torch.testing.assert_close(*gradients)


def test_nothing_to_accelerate_changes_nothing():
    """UserError leaves the model as it was."""
    config = LoraConfig(target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    before = classes(model)
    with pytest.raises(fastlora.UserError):
        fastlora.accelerate(model)
    assert classes(model) == before
