"""A finished run, loaded for prediction, evaluation and merging."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.bert.weights import load_encoder, save_encoder
from fastlora.data.reading import Rows, TaskData, encode_rows
from fastlora.data.source import MODULES, Source, resolve
from fastlora.data.tasks import COURSE_NAMES, Task
from fastlora.data.tokenizer import Tokenizer
from fastlora.devices import local_device, usual_modes
from fastlora.errors import UserError, did_you_mean
from fastlora.files import atomic_folder
from fastlora.lora.files import read_config
from fastlora.lora.model import merge, pack, unmerge
from fastlora.multitask import files as adapters
from fastlora.multitask.metrics import Prediction
from fastlora.multitask.model import MultitaskBert
from fastlora.multitask.predictor import predictions
from fastlora.runs.session import ENCODER
from fastlora.training.checkpoint import load_weights
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import adapter_folder, checkpoint_of
from fastlora.training.setup import PARTS, find_route
from fastlora.training.tuner import use_measured_blocks


@dataclass(frozen=True)
class Trained:
    """A trained model, in fp32 and evaluation mode, with its tokenizer and its run's settings."""

    model: MultitaskBert
    tokenizer: Tokenizer
    source: Source
    tasks: dict[str, Task]
    settings: dict[str, Any]  # the run's "mode", "adapters", "pairs" and "model"

    def task(self, name: str | None) -> Task:
        """The task of this name, or the run's only one; UserError if there is no such task."""
        if name is None and len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        if name not in self.tasks:
            given = "no task is given" if name is None else f"task is {name!r}"
            hint = did_you_mean(COURSE_NAMES.get(str(name), str(name)), self.tasks)
            raise UserError(f"{given} (expected one of {', '.join(self.tasks)}){hint}")
        return self.tasks[name]

    def predict(
        self, texts: Iterable[str | Sequence[str]], task: str | None = None
    ) -> list[Prediction]:
        """The prediction for each text, or for each pair of texts (a, b) if the task is on pairs.

        `task` may be left out if the run has only one. Raises UserError for an unknown task and for
        what is no such text or pair; RunError if an output is not finite or memory does not
        suffice.
        """
        name = self.task(task).name
        return predictions(self.model, {name: self.encode(texts, name)})[name]

    def encode(self, texts: Iterable[str | Sequence[str]], task: str) -> TaskData:
        """The tokens of texts or pairs of a task; UserError as `predict`."""
        chosen = self.task(task)
        width = len(chosen.columns)
        if isinstance(texts, str):
            raise UserError(f"texts is {texts!r:.60} (expected a list of texts)")
        rows = [[row] if isinstance(row, str) else row for row in texts]
        for i, row in enumerate(rows):
            whole = isinstance(row, (list, tuple)) and len(row) == width
            if not (whole and all(isinstance(text, str) for text in row)):
                expected = "a list of strings" if width == 1 else "a list of pairs of strings"
                raise UserError(f"element {i} of texts is {row!r:.60} (texts has to be {expected})")
        columns = tuple([row[i].strip() for row in rows] for i in range(width))
        read = Rows([str(i) for i in range(len(rows))], columns, None, skipped=0, empty=0)
        return encode_rows(read, chosen, self.tokenizer, self.settings["pairs"])


@usual_modes()
@torch.random.fork_rng([])  # new layers draw random weights before theirs are read
def load(
    path: str | Path, device: str | torch.device = "auto", model: str | Path | None = None
) -> Trained:
    """Load a finished run by its folder, by its adapter folder, or with a checkpoint's weights.

    In fp32, the logits are bit-equal to those of the model that was trained. `model` is the
    encoder's name or folder, by default that of the run. Raises UserError if a file is missing or
    belongs to another encoder or tokenizer.
    """
    folder = adapter_folder(Path(path))
    tasks, settings = adapters.read_heads(folder)
    TrainConfig.from_table(settings)  # raises for a value that no run has
    full = settings["mode"] == "full"
    source = resolve(str(folder / ENCODER) if full else model or settings["model"])
    tokenizer = Tokenizer.from_folder(source.folder)
    encoder, _ = load_encoder(source.folder, PARTS)
    use_measured_blocks()
    hashes = adapters.fingerprint(encoder), adapters.config_fingerprint(encoder.config)
    base = adapters.BaseInfo(source.name, *hashes, tokenizer.fingerprint)
    net = MultitaskBert(encoder, tasks, settings["pairs"])
    if settings["mode"] == "lora":
        names = adapters.adapter_names(settings["adapters"], tasks)
        net.adapt({name: read_config(adapters.adapter_place(folder, name)) for name in names})
    adapters.load_all(folder, net, tasks, base)
    if checkpoint := checkpoint_of(path):
        load_weights(checkpoint, net)
    find_route(where := local_device(str(device)), "fp32")  # raises for a wrong FASTLORA_ROUTE
    net = net.to(where).eval()
    pack(net.encoder)  # which is safe because nobody else changes its frozen weights
    return Trained(net, tokenizer, source, tasks, settings)


@contextmanager
def merged_weights(trained: Trained, task: str) -> Iterator[None]:
    """A block in which a task's adapters, if it has any, are merged into the encoder, in fp32."""
    if names := trained.model.adapters(task):
        merge(trained.model.encoder, *names)
    try:
        yield
    finally:
        unmerge(trained.model.encoder)


@usual_modes()
def merge_encoder(trained: Trained, task: str | None, out: Path) -> None:
    """Write the encoder with a task's adapters merged, in fp32, as a Hugging Face folder.

    It has the modules of a SentenceTransformer, such as pooling, if the run's encoder has them.
    `task` may be None if all tasks share one adapter. Raises UserError if the run has no such
    adapter, or if `out` is not empty.
    """
    check_empty(out)
    if trained.settings["mode"] != "lora":
        raise UserError(f"the run was trained with --mode {trained.settings['mode']}: no adapter")
    if task is None and trained.settings["adapters"] == "shared":
        task = next(iter(trained.tasks))
    with merged_weights(trained, trained.task(task).name), atomic_folder(out) as building:
        save_encoder(trained.model.encoder, building)
        trained.source.copy_tokenizer(building, *MODULES)


def check_empty(folder: Path) -> None:
    """Raise UserError if a path is a file, or a folder that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; name a new folder or remove it")
