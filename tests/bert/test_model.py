import pytest
import torch
import transformers

from fastlora.bert.config import BertConfig
from fastlora.bert.layout import Layout
from fastlora.bert.model import ACTIVATIONS, BertModel
from fastlora.bert.weights import load_encoder

# references.md: "Hello, my dog is cute" through MiniLM-L6, fp32.
HELLO = [101, 7592, 1010, 2026, 3899, 2003, 10140, 102]
MEAN = [-0.10032, -0.183047, 0.611251, 0.445258, -0.369016]
FIRST = [0.023017, -0.010278, 0.220136, 0.521736, -0.11702]


@pytest.fixture(scope="module")
def minilm_pair(minilm):
    theirs = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager").eval()
    return load_encoder(minilm)[0], theirs


def random_pair(**changes):
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**changes)).eval()
    config = {k: v for k, v in theirs.config.to_dict().items() if k in BertConfig.__annotations__}
    ours = BertModel(BertConfig(**config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def roberta_pair(kind="XLMRoberta", **changes):
    """A RoBERTa of ours and of transformers with the same random weights."""
    torch.manual_seed(0)
    sizes = {**TINY, "type_vocab_size": 1, "initializer_range": 0.1, **changes}
    theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
    config = {k: v for k, v in theirs.config.to_dict().items() if k in BertConfig.__annotations__}
    ours = BertModel(BertConfig(**config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs.eval()


def padded_batch(vocab, width=24, types=False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocab, (4, width), generator=generator)
    lengths = torch.tensor([width, 1, width // 2, 3])
    mask = (torch.arange(width) < lengths[:, None]).long()
    segments = (torch.arange(width) >= lengths[:, None] // 2).long() * mask
    return {"input_ids": ids * mask, "attention_mask": mask} | (
        {"token_type_ids": segments} if types else {}
    )


@torch.no_grad()
def assert_same(pair, **inputs):
    """Every hidden state at the real tokens, and the pooler output, to 1e-5 absolute."""
    ours, theirs = (model.eval() for model in pair)
    found = ours(**inputs)
    expected = theirs(**inputs, output_hidden_states=True)
    mask = inputs.get("attention_mask")
    real = torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()
    assert len(found.hidden_states) == len(expected.hidden_states)
    for layer, (a, b) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
        assert (a[real] - b[real]).abs().max() <= 1e-5, f"hidden state {layer}"
        assert not a[~real].any()
    assert torch.equal(found.last_hidden_state, found.hidden_states[-1])
    first = real[:, 0]  # ours reads zeros at padding
    assert (found.pooler_output - expected.pooler_output)[first].abs().max() <= 1e-5


@pytest.mark.parametrize("types", [False, True])
def test_minilm_with_padding(minilm_pair, types):
    assert_same(minilm_pair, **padded_batch(30522, types=types))


def test_minilm_golden_values(minilm_pair):
    output = minilm_pair[0](torch.tensor([HELLO]))
    torch.testing.assert_close(
        output.last_hidden_state[0].mean(0)[:5], torch.tensor(MEAN), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        output.last_hidden_state[0, 0, :5], torch.tensor(FIRST), atol=1e-5, rtol=0
    )


def test_golden_values_do_not_depend_on_padding(minilm_pair):
    ids = torch.tensor([HELLO + [0] * 5, HELLO + [7] * 5])
    mask = torch.tensor([[1] * 8 + [0] * 5] * 2)
    first = minilm_pair[0](ids, mask).last_hidden_state[:, 0, :5]
    torch.testing.assert_close(first, torch.tensor([FIRST, FIRST]), atol=1e-5, rtol=0)


def test_bert_base_shape():
    small = {"vocab_size": 500, "num_hidden_layers": 2}
    assert_same(random_pair(**small), **padded_batch(500, width=12, types=True))


TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


def test_no_mask_and_a_single_token():
    pair = random_pair(**TINY)
    assert_same(pair, input_ids=torch.arange(30).view(2, 15))
    assert_same(pair, input_ids=torch.tensor([[7]]))
    assert_same(pair, input_ids=torch.tensor([[7]]), attention_mask=torch.ones(1, 1).long())


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_every_activation(act):
    assert_same(random_pair(**TINY, hidden_act=act), **padded_batch(60))


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_roberta_counts_positions_of_real_tokens(kind, side):
    batch = padded_batch(60)
    batch["input_ids"][batch["attention_mask"] == 0] = 1
    batch = {name: v.flip(1) if side == "left" else v for name, v in batch.items()}
    assert_same(roberta_pair(kind), **batch)


def test_roberta_gives_a_padding_token_in_a_text_no_position_of_its_own():
    assert_same(roberta_pair(), input_ids=torch.tensor([[0, 7, 1, 8, 2], [0, 1, 1, 9, 2]]))
    # Only the ids before a token decide its position, so what stands at padding does not matter.
    ours, _ = roberta_pair(pad_token_id=5)
    mask, ids = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 7, 2, 5], [0, 7, 2, 3]])
    first, second = (ours(row[None], mask).last_hidden_state for row in ids)
    assert torch.equal(first, second)


def test_robertas_positions_leave_room_for_its_padding():
    ours, theirs = roberta_pair(max_position_embeddings=34)
    assert_same((ours, theirs), input_ids=torch.full((1, 32), 9))
    with pytest.raises(ValueError, match=r"length 33 \(expected 1 to 32\)"):
        ours(torch.full((1, 33), 9))


def test_robertas_with_two_types():
    assert_same(roberta_pair(type_vocab_size=2), **padded_batch(60, types=True))


def test_the_longest_sequence_and_one_more():
    ours, theirs = random_pair(**TINY)
    assert_same((ours, theirs), input_ids=torch.full((1, 32), 9))
    with pytest.raises(ValueError, match=r"length 33 \(expected 1 to 32\)"):
        ours(torch.full((1, 33), 9))


@pytest.mark.parametrize("training", [False, True])
def test_no_rows_and_no_tokens(training):
    ours, _ = random_pair(**TINY)
    ours.train(training)
    for mask in (None, torch.ones(0, 7).long()):
        output = ours(torch.ones(0, 7).long(), mask)
        assert [state.shape for state in output.hidden_states] == [(0, 7, 32)] * 3
        assert output.pooler_output.shape == (0, 32)
        output.pooler_output.sum().backward()
    for rows in (0, 2):
        with pytest.raises(ValueError, match=r"length 0 \(expected 1 to 32\)"):
            ours(torch.ones(rows, 0).long())


@pytest.mark.parametrize("length", [6, 120])  # on either side of `LONG`
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("empty", [[0], [1], [2], [0, 1, 2]])
def test_rows_of_padding_only(empty, training, length):
    """They give zeros and leave the other rows, and all gradients, alone."""
    changes = {"max_position_embeddings": 120, "attention_probs_dropout_prob": 0.0}
    ours, theirs = random_pair(**(TINY | changes), hidden_dropout_prob=0.0)
    ids, weights = torch.randint(5, 60, (3, length)), torch.randn(3, length, 32)
    mask = (torch.arange(length) < torch.tensor([[length], [3], [1]])).long()
    mask[empty] = 0
    kept = [row for row in range(3) if row not in empty]
    output = ours.train(training)(ids, mask)
    assert not output.last_hidden_state[empty].any()
    assert output.pooler_output.isfinite().all()
    (output.last_hidden_state * weights).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
    if kept:
        expected = theirs.train(training)(ids[kept], mask[kept])
        states = expected.last_hidden_state * mask[kept, :, None]
        (states * weights[kept]).sum().backward()
        torch.testing.assert_close(output.last_hidden_state[kept], states, rtol=0, atol=1e-5)
        found, wanted = (m.encoder.layer[0].attention.self.key.weight.grad for m in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_no_row_of_padding_only_fills_up_tokens():
    """On some devices attention to nothing is NaN, which would spread in the gradients."""
    mask = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]])
    assert Layout.of(mask, mask.shape, 5).index.tolist() == [3, 6, 7, 4, 5]
    assert Layout.of(mask, mask.shape, 9).index.tolist() == [3, 6, 7, 4, 5, 8]


def test_training_gradients_match():
    ours, theirs = random_pair(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = padded_batch(60, types=True)
    real = batch["attention_mask"].bool()
    for model in (ours, theirs):
        model.train()
        output = model(**batch)
        (output.last_hidden_state[real].square().sum() + output.pooler_output.sum()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        # One row of the padding token may differ: transformers embeds what we never touch.
        rows = slice(1, None) if "word_embeddings" in name else slice(None)
        found, wanted = parameter.grad[rows], expected[name].grad[rows]
        assert (found - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6, name
