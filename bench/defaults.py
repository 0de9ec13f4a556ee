"""The evidence for the defaults of targets and learning rate.

    python bench/defaults.py --data data/ --out studies

Trains SST, Quora, STS and CFIMDB together on MiniLM-L6, two epochs on parts of the files, with
seeds 0, 1 and 2, and writes a table as `fastlora reproduce` does: OUT/defaults/defaults.csv.
CFIMDB's reviews are long, so fewer of them are used. The same command continues where it stopped.
"""

import argparse
import shutil
from pathlib import Path

from fastlora.data.tasks import BUILTIN
from fastlora.studies.grid import reproduce
from fastlora.studies.paper_tables import TABLES, Row, Table
from fastlora.training.config import DEFAULT_TASKS, TrainConfig
from fastlora.training.inputs import find_inputs
from fastlora.training.stopping import Stop

TASKS = (*DEFAULT_TASKS, "cfimdb")
ROWS, REVIEWS, SEEDS = 2000, 300, 3
TRIED = [  # targets, r, alpha, learning rate
    (("query", "value"), 8, 16, 2e-3),
    (("query", "value"), 8, 16, 1e-3),
    (("all",), 8, 16, 2e-3),
    (("all",), 8, 16, 1e-3),
    (("all",), 8, 16, 5e-4),
]


def row(targets, r, alpha, lr):
    """The row of a combination of settings."""
    return Row(
        f"{'-'.join(targets)}-r{r}-alpha{alpha}-lr{lr:g}",
        f"lr {lr:g}",
        f"{' and '.join(targets)}, r={r}, alpha {alpha}",
        {"targets": targets, "r": r, "alpha": alpha, "lr": lr},
    )


def cut(data, folder):
    """Copy the four tasks' files to a folder, of CFIMDB's training file the first reviews only."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in map(BUILTIN.get, TASKS):
        for split in ("train", "dev"):
            shutil.copyfile(data / task.files[split], folder / task.files[split])
    file = folder / BUILTIN["cfimdb"].files["train"]
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[: REVIEWS + 1]), encoding="utf-8")  # and the header
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the course's files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    args = parser.parse_args()
    title = "targets and learning rate: where the defaults come from"
    TABLES["defaults"] = Table(title, TASKS, [row(*tried) for tried in TRIED])
    config = TrainConfig(
        data=cut(args.data, args.out / "data"),
        model="minilm",
        tasks=TASKS,
        limit=ROWS,
        epochs=2,
        precision="bf16",
        out=args.out,
    )
    reproduce(["defaults"], config, find_inputs(config), SEEDS, quiet=False, stop=Stop())
