"""`fastlora.train`: a training run from Python, on a folder, a file, or examples in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastlora.data.infer import FileTask, Kind, task_of_file
from fastlora.data.tasks import BUILTIN, check_name
from fastlora.errors import UserError
from fastlora.files import atomic_folder
from fastlora.runs.folder import DATA, default_folder
from fastlora.runs.session import read_result, run_training
from fastlora.runs.trained import Trained, load
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import find_inputs, with_file

Text = str | tuple[str, str]
Label = str | float | bool | Sequence[str]
_DROP = "leave out examples without a text or label, as pandas' dropna() does"


@dataclass(frozen=True)
class Dataset:
    """The examples of a task: N texts, or pairs of texts (a, b), and a label for each.

    Labels are names, booleans or whole numbers (classes), other numbers (a regression), or lists of
    names (several labels); `kind` says otherwise. Without dev examples, a tenth of each class is
    the dev split. `metric` and `class_weights` are those of a task's table.

    Raises UserError for texts or labels of another kind, and if their numbers differ.
    """

    texts: Iterable[Text]
    labels: Iterable[Label]
    dev_texts: Iterable[Text] | None = None
    dev_labels: Iterable[Label] | None = None
    kind: Kind | None = None
    metric: str | None = None
    class_weights: str | Mapping[str, float] | None = None
    splits: dict[str, list[dict[str, Any]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        splits = {"train": _records("", self.texts, self.labels)}
        if self.dev_texts is not None or self.dev_labels is not None:
            splits["dev"] = _records("dev_", self.dev_texts or (), self.dev_labels or ())
        if len({len(record) for records in splits.values() for record in records}) > 1:
            raise UserError("some texts are strings and others pairs (expected one of the two)")
        object.__setattr__(self, "splits", splits)

    def write(self, folder: Path, name: str) -> tuple[Path, FileTask]:
        """Write a JSONL file of each split; returns the training file, and how to train on it."""
        files = {split: folder / f"{name}-{split}.jsonl" for split in self.splits}
        for split, file in files.items():
            file.write_text("\n".join(map(json.dumps, self.splits[split])), encoding="utf-8")
        columns = tuple(column for column in self.splits["train"][0] if column != "label")
        how = (self.kind, self.metric, self.class_weights)
        return files["train"], FileTask(columns, "label", files.get("dev"), *how)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and each task's dev score with the weights that were kept."""

    folder: Path
    scores: dict[str, float | None]
    device: str = "auto"

    @cached_property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """All metrics that fit, by task."""
        return read_result(self.folder)["metrics"]

    @cached_property
    def predictor(self) -> Trained:
        """The trained model, as `fastlora.load` gives it."""
        return load(self.folder, self.device)


def train(
    data: str | Path | Mapping[str, Dataset] | None = None,
    model: str | Path | None = None,
    tasks: str | Sequence[str] | None = None,
    *,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train as `fastlora-train` does; an unfinished run in `out` is continued.

    Args:
        data: A folder of task files; a CSV, TSV or JSONL file; or datasets by task, which are
            written to `data/` in the run folder. By default as for `fastlora-train`.
        model: Folder, hub id, or "minilm".
        tasks: Tasks of a folder, by default those of the paper.
        quiet: Print nothing.
        **settings: Those of `TrainConfig`, such as `r=8` and `epochs=3`; for a file also `text`,
            `label`, `dev`, `kind`, `metric` and `class_weights`, as for `fastlora-train FILE`.

    Raises:
        UserError: before training, if settings or data are wrong.
        RunError: if the run fails.
    """
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks
    of_file = {f.name: settings.pop(f.name) for f in fields(FileTask) if f.name in settings}
    given = {"model": model, "tasks": tasks, **settings}
    config = TrainConfig.from_table({k: v for k, v in given.items() if v is not None})
    config = replace(config, out=config.out or default_folder(config))
    why = "as given"
    if isinstance(data, (str, Path)) and not Path(data).is_dir():
        config, why = with_file(config, Path(data), FileTask(**of_file))
    elif of_file:
        raise UserError(f"{min(of_file)} is given (expected a file as data)")
    elif data is None or isinstance(data, (str, Path)):
        config = replace(config, data=None if data is None else Path(data))
    else:
        config, why = _with_datasets(config, data), "the datasets given"
    result = run_training(config, find_inputs(config, why), quiet=quiet)
    assert result is not None and config.out is not None
    return Run(config.out.absolute(), result.scores, config.device)


def _with_datasets(config: TrainConfig, datasets: Mapping[str, Dataset]) -> TrainConfig:
    """The configuration that trains on datasets, which are written to its run folder.

    Raises UserError, and writes nothing, where a task cannot be made of one, and where the folder
    has other data.
    """
    if config.tasks or config.data or not isinstance(datasets, Mapping) or not datasets:
        expected = "a folder, a file, or datasets by task, and then no tasks beside them"
        raise UserError(f"data is a {type(datasets).__name__} (expected {expected})")
    assert config.out is not None
    folder, tables = config.out.absolute() / DATA, dict(config.task)
    with atomic_folder(folder) as building:
        for name, dataset in datasets.items():
            check_name(name)
            if name in BUILTIN:
                raise UserError(f"task {name!r} is built in; choose another name")
            if not isinstance(dataset, Dataset):
                file = "a file is data by itself: train('FILE.csv', text='COLUMN', label='COLUMN')"
                raise UserError(f"task {name!r} is {dataset!r:.60} (expected a Dataset; {file})")
            file, how = dataset.write(building, name)
            _, task, _ = task_of_file(file, how, config.quoting, config.bad_rows, name)
            tables[name] = task.to_table()
        given, there = ({f.name: f.read_bytes() for f in x.glob("*")} for x in (building, folder))
        if there not in ({}, given):
            raise UserError(f"{folder}: holds the data of another run; use a new out")
    return replace(config, data=folder, tasks=tuple(datasets), task=tables)


def _records(part: str, texts: Iterable[Any], labels: Iterable[Any]) -> list[dict[str, Any]]:
    """The examples of a split in JSON's types; UserError for one without a text or a label."""
    if isinstance(texts, str) or isinstance(labels, str):
        raise UserError(f"{part}texts and {part}labels are lists (expected no single string)")
    texts, labels = list(texts), list(labels)
    if len(texts) != len(labels) or not texts:
        counts = f"{len(texts):,} {part}texts and {len(labels):,} {part}labels"
        raise UserError(f"there are {counts} (expected equally many, one or more)")
    records = []
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        pair = isinstance(text, (tuple, list)) and len(text) == 2
        if not all(isinstance(x, str) for x in (text if pair else [text])):
            found = f"{part}texts[{i}] is {text!r:.60}"
            raise UserError(f"{found} (expected a string, or a pair of strings); {_DROP}")
        label = label.item() if hasattr(label, "item") else label  # of NumPy or PyTorch
        names = isinstance(label, (tuple, list, set)) and all(isinstance(x, str) for x in label)
        number = isinstance(label, (int, float)) and abs(label) < math.inf
        if not (names or number or isinstance(label, str)):
            found = f"{part}labels[{i}] is {label!r:.60}"
            raise UserError(f"{found} (expected text, a number, a boolean, or names); {_DROP}")
        columns = {"first": text[0], "second": text[1]} if pair else {"text": text}
        records.append(columns | {"label": sorted(label) if names else label})
    return records
