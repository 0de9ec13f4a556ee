"""Encoders built as RoBERTa is, with tokenizers of byte-level BPE and SentencePiece's Unigram."""

import json

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors, trainers

from fastlora.data.tokenizer import Tokenizer
from fastlora.multitask.predictor import predict
from fastlora.runs.export import export
from fastlora.runs.session import run_training
from fastlora.runs.trained import load, merge_encoder

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
CORPUS = ["the good film is not good .", "a bad dog sings , a café sleeps ?", "two cats see 東京"]
TEXTS = [
    "a good film",
    "",
    "<s> x</s> <mask> <pad>café",
    "the dog  sleeps " * 30,
    "東京 🎬 two\tcats",
]


def byte_level_bpe():
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIAL, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def unigram():
    tokenizer = Backend(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"unk_token": "<unk>", "show_progress": False}
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
    ids = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single, pair, ids)
    return tokenizer


@pytest.fixture(params=["Roberta", "XLMRoberta"])
def base(request, tmp_path):
    """A folder with random weights, saved with the head and the names of pre-training."""
    folder, kind = tmp_path / "base", request.param
    tokenizer = byte_level_bpe() if kind == "Roberta" else unigram()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=42,
        type_vocab_size=1,
        initializer_range=0.1,
    )
    getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": f"{kind}Tokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def padded(encoded, padding=1):
    rows = torch.from_numpy(encoded.ids).long().split(encoded.lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def test_a_run_from_the_first_token_to_the_merged_folder(base, tiny_config, tiny_data, tmp_path):
    ours, theirs = Tokenizer.from_folder(base), transformers.AutoTokenizer.from_pretrained(base)
    for texts in ((TEXTS,), (TEXTS, TEXTS[::-1])):
        expected = theirs(*texts, truncation=True, max_length=40, padding=True)["input_ids"]
        encoded = ours.encode(*texts)
        assert padded(encoded).tolist() == expected
        assert not encoded.types.any() and encoded.truncated == len(texts)

    config = tiny_config(model=str(base), pairs="joint", max_steps=2, lr=5e-3, targets=("all",))
    run_training(config, quiet=True)
    trained = load(config.out, "cpu")
    merge_encoder(trained, None, tmp_path / "merged")

    model = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert type(model).__name__.startswith(type(theirs).__name__.removesuffix("Tokenizer"))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    tensors = {"return_tensors": "pt"}
    batch = again(TEXTS, truncation=True, max_length=40, padding=True, **tensors)
    found = trained.model.encoder(batch["input_ids"], batch["attention_mask"]).hidden_states
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    for layer, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a[real] - b[real]).abs().max() <= 1e-5, f"hidden state {layer}"

    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    logits = predict(trained.model, {"quora": trained.encode(pairs, "quora")})["quora"]
    batch = again(TEXTS, TEXTS[::-1], max_length=40, padding=True, truncation=True, **tensors)
    for merged in (True, False):
        export(trained, "quora", out := tmp_path / f"merged {merged}", merged)
        classes = transformers.AutoConfig.from_pretrained(out)
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
            out if merged else base, config=classes
        )
        if not merged:
            classifier = peft.PeftModel.from_pretrained(classifier, out)
        with torch.no_grad():
            found = classifier.eval()(**batch).logits
        assert (found - torch.from_numpy(logits)).abs().max() <= 1e-5
