"""What an accelerated model says, how it is restored, and what is around it.

Trainer, sentence-transformers and several processes get the same numbers as without acceleration.
"""

import os
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from models import assert_alike, batch, filled, plain_model, with_lora
from survival import EXACT, accelerated, classes
from torch import nn

import fastlora
from fastlora.interop.swap import Swapped
from fastlora.kernels import route

pytestmark = pytest.mark.filterwarnings("ignore:fastlora.accelerate")


def test_warnings_once(pair):
    """None where nothing stepped aside, one for each reason; the report counts what is fused."""
    ours, _ = pair
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        report = fastlora.accelerate(ours)
        for model in (ours.eval(), ours.train()):
            model(**batch()).loss.backward()
        assert not found
        for _ in range(3):
            ours(**batch(), output_hidden_states=True)
        assert [str(w.message) for w in found] == [
            "fastlora.accelerate does not apply to a call of BertEncoder, run as before: a call "
            "with output_hidden_states needs the padded batch"
        ]
    expected = ["fastlora: PeftModelForSequenceClassification"]
    expected += ["  kernels: {} ({})".format(*route())]
    expected += ["  1 encoder on real tokens", "  4 LoRA layers of PEFT"]
    assert str(report).splitlines() == expected


def test_compiling_is_said(pair):
    fastlora.accelerate(pair[0])
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="does not apply"):
        torch.compile(pair[0].base_model.model.bert.encoder, backend="eager")(
            torch.ones(2, 3, 32, dtype=torch.double)
        )


def test_warnings_once_after_a_second_call(pair):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            fastlora.accelerate(pair[0])
            pair[0](**batch(), output_hidden_states=True)
    assert len(found) == 1


def test_blocks(pair):
    """At the end of a block, and after an exception inside, the model is as it was."""
    ours, theirs = pair
    with pytest.raises(ZeroDivisionError), fastlora.accelerate(ours):
        assert any(isinstance(module, Swapped) for module in ours.modules())
        raise ZeroDivisionError
    assert classes(ours) == classes(theirs)
    fastlora.restore(ours)
    assert_alike(ours, theirs, batch(), **EXACT)


def test_blocks_inside_blocks(pair):
    with fastlora.accelerate(pair[0]):
        with fastlora.accelerate(pair[0]):
            pass
        assert any(isinstance(module, Swapped) for module in pair[0].modules())


def test_real_tokens_taken_back(pair):
    fastlora.accelerate(pair[0])
    assert "real_tokens is False" in str(fastlora.accelerate(pair[0], real_tokens=False))
    found, expected = (m.base_model.model.bert(**batch(labels=False)) for m in pair)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_restoring_under_hooks_of_accelerate(pair):
    """Hugging Face's accelerate puts a forward on each instance, around the one it found."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module

    ours, theirs = pair
    fastlora.accelerate(ours)
    for module in list(ours.modules()):
        add_hook_to_module(module, ModelHook())
    assert_alike(ours, theirs, batch(), **EXACT)
    fastlora.restore(ours)
    assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_after_restoring(pair):
    """It looks for `nn.Linear` by its exact type."""
    fastlora.accelerate(pair[0])
    fastlora.restore(pair[0])
    numbers = []
    for model in pair:
        done = torch.ao.quantization.quantize_dynamic(model.float().eval(), {nn.Linear})
        numbers.append(sum("quantized" in type(m).__module__ for m in done.modules()))
    assert numbers[0] == numbers[1]


TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w3"]


def folder(path, head="Model"):
    """A model and its tokenizer, as sentence-transformers loads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = dict(pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask="[MASK]")
    words = [*special.values(), *(f"w{k}" for k in range(40))]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokens = {f"{name}_token": token for name, token in special.items()}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **tokens
    ).save_pretrained(path)
    model = plain_model(head=head)
    model.config.pad_token_id = 0
    model.save_pretrained(path)
    return str(path)


def sentence_model(path, *modules, **settings):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    parts = [Transformer(folder(path), **settings), *modules]
    model = SentenceTransformer(modules=parts, device="cpu")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["query", "value"]))
    return filled(model.double())


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean"])
def test_sentence_transformers(pooling, tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling

    theirs = sentence_model(tmp_path, Pooling(32, pooling_mode=pooling))
    ours = accelerated(theirs)
    for value in ("sentence_embedding", "token_embeddings"):
        found, expected = (m.encode(TEXTS, output_value=value) for m in (ours, theirs))
        torch.testing.assert_close(list(found), list(expected), **EXACT)


class Mean(nn.Module):
    """A module of one's own, which reads the states at padding."""

    def forward(self, features, **_):
        return features | {"sentence_embedding": features["token_embeddings"].mean(1)}


@pytest.mark.parametrize("reader", ["CNN", "one's own"])
def test_sentence_transformers_that_read_padding(reader, tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import CNN, Pooling

    modules = [CNN(32, 8), Pooling(24)] if reader == "CNN" else [Mean()]
    theirs = sentence_model(tmp_path, *modules)
    found, expected = (m.encode(TEXTS) for m in (accelerated(theirs), theirs))
    torch.testing.assert_close(found, expected, **EXACT)


def test_multi_vector_encoders_with_query_expansion(tmp_path):
    pytest.importorskip("sentence_transformers", "6.2")
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    expansion = {"strategy": "fixed", "attend": False, "length": 12}
    part = Transformer(folder(tmp_path), query_expansion=expansion)
    model = MultiVectorEncoder(modules=[part, MultiVectorMask()], device="cpu").double()
    with pytest.raises(fastlora.UserError, match="MultiVectorEncoder may read states at padding"):
        fastlora.accelerate(model)


def test_cross_encoders(tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import CrossEncoder

    theirs = CrossEncoder(folder(tmp_path, "ForSequenceClassification"), device="cpu")
    theirs.add_adapter(peft.LoraConfig(r=4, target_modules=["query", "value"]))
    filled(theirs.double())
    ours = accelerated(theirs)
    found, expected = (m.predict([(a, a) for a in TEXTS]) for m in (ours, theirs))
    torch.testing.assert_close(found, expected, **EXACT)
    fastlora.restore(ours)
    assert classes(ours) == classes(theirs)


def rows():
    """Sequences of several lengths, padded by the collator as Trainer's own would."""
    batches = [batch(lengths=(k % 7 + 2,)) for k in range(64)]
    return [
        {name: value[0].tolist() for name, value in inputs.items()} | {"labels": k % 2}
        for k, inputs in enumerate(batches)
    ]


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": 1, "attention_mask": 0}
    padded = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in pad.items()
    }
    return padded | {"labels": torch.tensor([row["labels"] for row in rows])}


def train(model, path, resume=False, **settings):
    from transformers import Trainer, TrainingArguments

    every = dict.fromkeys(("eval_steps", "save_steps"), 20)
    every |= dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, seed=1)
    settings = {"max_steps": 50, "load_best_model_at_end": True, **every, **quiet, **settings}
    arguments = TrainingArguments(str(path), learning_rate=5e-3, **settings)
    trainer = Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=rows(), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=str(path / "checkpoint-20") if resume else None)
    found = [e[k] for e in trainer.state.log_history for k in ("loss", "eval_loss") if k in e]
    return torch.tensor(found), torch.tensor(trainer.predict(rows()).predictions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, dict(max_steps=20, gradient_checkpointing=True, gradient_accumulation_steps=2)],
)
def test_trainer(settings, tmp_path):
    """The same losses, predictions and files; going on from the middle gives them, too."""
    pytest.importorskip("accelerate")
    theirs = with_lora(plain_model())
    ours = accelerated(theirs)
    found, expected = (
        train(model, tmp_path / name, **settings)
        for name, model in (("ours", ours), ("theirs", theirs))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    files = [sorted(p.relative_to(q) for p in q.rglob("*")) for q in sorted(tmp_path.iterdir())]
    assert files[0] == files[1]
    if not settings:
        again, _ = train(accelerated(with_lora(plain_model())), tmp_path / "ours", resume=True)
        torch.testing.assert_close(again[-30:], expected[0][-30:], rtol=1e-4, atol=1e-4)


PROCESSES = """
import copy, os, sys, torch, torch.distributed as dist, fastlora
from models import batch, plain_model, with_lora
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

def gradients(model):
    for k in range(2):
        model(**{n: v[rank::2] for n, v in batch(lengths=(9, 3, k + 1, 7)).items()}).loss.backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for p in model.parameters() if p.grad is not None]

def shard(model):
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)

rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
for wrap in (DistributedDataParallel, shard):
    for first in (True, False) if wrap is DistributedDataParallel else (True,):
        theirs = with_lora(plain_model()).double()
        ours = copy.deepcopy(theirs)
        if first:
            fastlora.accelerate(ours)
        ours, theirs = wrap(ours), wrap(theirs)
        if not first:
            fastlora.accelerate(ours)
        for a, b in zip(*(gradients(m) for m in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        print("agrees", flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """DDP, around or inside acceleration, and FSDP2 after it give PEFT's gradients."""
    environment = {**os.environ, "FASTLORA_ROUTE": "reference"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", PROCESSES, str(tmp_path / "store")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert done.stdout.count("agrees") == 6, done.stderr[-3000:]
