import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastlora.bert.weights import load_encoder, save_encoder
from fastlora.errors import UserError

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**TINY))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tensors(folder):
    return load_file(folder / "model.safetensors")


def load(folder, tensors=None):
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load_encoder(folder)


def test_plain_checkpoint_is_copied_exactly(folder, tensors):
    model, notes = load(folder)
    assert notes == []
    assert not model.training
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_pretraining_checkpoint_of_old_names(folder, tensors):
    def old(name):
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

    saved = {old(name): tensor for name, tensor in tensors.items()}
    saved["bert.embeddings.position_ids"] = torch.arange(16)[None]
    saved["cls.predictions.bias"] = torch.zeros(50)
    saved["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    saved["classifier.weight"] = torch.zeros(2, 32)
    model, notes = load(folder, saved)
    assert torch.equal(model.state_dict()[QUERY], tensors[QUERY])
    assert notes == ["ignored the 3 tensors of its heads"]


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
def test_robertas_are_loaded_and_saved_under_their_names(tmp_path, kind):
    torch.manual_seed(0)
    sizes = {**TINY, "type_vocab_size": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    theirs = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    theirs.save_pretrained(tmp_path / "old")
    model, notes = load_encoder(tmp_path / "old")
    heads, pooler = notes
    assert heads == "ignored the 5 tensors of its heads" and "no pooler" in pooler
    save_encoder(model, tmp_path / "new")
    again = transformers.AutoModel.from_pretrained(tmp_path / "new").eval()
    assert type(again).__name__ == f"{kind}Model"
    ids = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 1]])
    expected = theirs.roberta(ids, ids.ne(1)).last_hidden_state
    for reader in (again, model):
        found = reader(ids, ids.ne(1)).last_hidden_state
        torch.testing.assert_close(found[ids != 1], expected[ids != 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", sorted(TINY.keys() - {"num_attention_heads"} | {"type_vocab_size"}))
def test_sizes_are_compared_with_the_file_before_the_model_is_built(folder, key):
    values = json.loads((folder / "config.json").read_text()) | {key: 2**31 - 8}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"values \(config.json says .* or more"):
        load_encoder(folder)


def test_half_precision_is_loaded_as_fp32(folder, tensors):
    model, _ = load(folder, {name: tensor.half() for name, tensor in tensors.items()})
    assert model.get_parameter(QUERY).dtype == torch.float32
    assert torch.equal(model.get_parameter(QUERY), tensors[QUERY].half().float())


def test_missing_pooler_is_noted_and_always_the_same(folder, tensors):
    bare = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    model, notes = load(folder, bare)
    torch.manual_seed(3)
    again, _ = load(folder)
    assert len(notes) == 1 and "no pooler" in notes[0]
    weight = model.pooler.dense.weight
    assert 0.015 < weight.std() < 0.025 and not model.pooler.dense.bias.any()
    assert torch.equal(weight, again.pooler.dense.weight)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: t.pop("pooler.dense.bias"), r"'pooler\.dense\.bias' is missing"),
        (lambda t: t.pop(QUERY), f"'{QUERY}' is missing"),
        (lambda t: t.update(classifier=torch.zeros(2, 32)), "'classifier' is unexpected"),
        (lambda t: t.update({QUERY: torch.zeros(32, 31)}), rf"'{QUERY}' .*\[32, 31\].*\[32, 32\]"),
        (lambda t: t.update({QUERY: torch.zeros(32, 32).char()}), r"is torch\.int8"),
        (lambda t: t[QUERY][3, 5:6].fill_(float("nan")), "not finite"),
        (lambda t: t.update({"bert." + QUERY: t[QUERY].clone()}), "twice"),
    ],
)
def test_tensors_are_refused_by_name(folder, tensors, change, cause):
    change(tensors)
    with pytest.raises(UserError, match=rf"model\.safetensors: tensor .*{cause}"):
        load(folder, tensors)


def test_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as safetensors"):
        load(folder)


def test_save_encoder_is_a_hugging_face_folder(folder, tmp_path):
    model, _ = load(folder)
    query = model.get_submodule(QUERY.removesuffix(".weight"))
    query.register_parameter("lora_A", torch.nn.Parameter(torch.ones(2, 32)))
    ids = torch.arange(10)[None]
    before = model(ids).last_hidden_state
    save_encoder(model, str(tmp_path / "out"))  # strings and Paths alike

    theirs, report = transformers.BertModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert (theirs(ids).last_hidden_state - before).abs().max() <= 1e-5

    del query.lora_A
    again, notes = load(str(tmp_path / "out"))
    assert notes == []
    found, expected = again.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
