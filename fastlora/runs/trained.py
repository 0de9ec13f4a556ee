"""A finished run, loaded for evaluation, prediction and merging."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from fastlora.bert.weights import load_encoder, save_encoder
from fastlora.data.reading import encode_rows, read_content, read_rows
from fastlora.data.source import Source, resolve
from fastlora.data.tasks import Task
from fastlora.data.tokenizer import Tokenizer
from fastlora.devices import local_device, usual_modes
from fastlora.errors import UserError
from fastlora.files import atomic_folder
from fastlora.lora.files import read_config
from fastlora.lora.model import merge, pack, unmerge
from fastlora.multitask import files as adapters
from fastlora.multitask.model import MultitaskBert
from fastlora.multitask.predictor import predict, predicted_labels
from fastlora.runs.session import ENCODER
from fastlora.training.inputs import adapter_folder
from fastlora.training.setup import PARTS
from fastlora.training.tuner import use_measured_blocks


@dataclass(frozen=True)
class Trained:
    """A trained model, in fp32 and evaluation mode, with its tokenizer and its run's settings."""

    model: MultitaskBert
    tokenizer: Tokenizer
    source: Source
    tasks: dict[str, Task]
    settings: dict[str, Any]  # the run's "mode", "adapters", "pairs" and "model"


@usual_modes()
@torch.random.fork_rng([])  # new layers draw random weights before theirs are read
def load_trained(
    path: str | Path, device: str | torch.device = "auto", model: str | Path | None = None
) -> Trained:
    """Load a finished run from its folder, or from its adapter folder.

    In fp32, the logits are bit-equal to those of the model that was trained. `model` is the
    encoder's name or folder, by default that of the run. Raises UserError if a file is missing or
    belongs to another encoder or tokenizer.
    """
    folder = adapter_folder(Path(path))
    tasks, settings = adapters.read_heads(folder)
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
    net = net.to(local_device(str(device))).eval()
    pack(net.encoder)  # which is safe because nobody else changes its frozen weights
    return Trained(net, tokenizer, source, tasks, settings)


def predict_rows(
    trained: Trained, path: str | Path, task: str | None, quoting: str = "minimal"
) -> tuple[list[tuple[str, str, str]], int]:
    """The id, task and prediction of each row of a file or a pipe, in its order.

    Also returns how many texts were truncated. If `task` is None, the column "task" of the file
    names the task of each row. Raises UserError if the file has no rows.
    """
    names, pairs = [task] if task else list(trained.tasks), trained.settings["pairs"]
    data, positions = {}, {}
    content = Path(path).read_bytes() if Path(path).is_fifo() else read_content(path)
    rules: dict[str, Any] = {"content": content, "labelled": False, "quoting": quoting}
    for name in names:
        mixed = () if task else names
        rows = read_rows(path, trained.tasks[name], mixed=mixed, **rules)
        if rows.ids:
            positions[name] = rows.positions
            data[name] = encode_rows(rows, trained.tasks[name], trained.tokenizer, pairs)
    if not data:
        raise UserError(f"{path}: no rows")
    predictions: list[tuple[int, str, str, str]] = []
    for name, outputs in predict(trained.model, data).items():
        labels = predicted_labels(data[name], outputs)
        predictions += zip(positions[name], data[name].ids, repeat(name), labels)
    truncated = sum(examples.truncated for examples in data.values())
    return [row[1:] for row in sorted(predictions)], truncated


@usual_modes()
def merge_encoder(trained: Trained, task: str | None, out: Path) -> None:
    """Merge a task's adapters into the encoder, in fp32, and write it as a Hugging Face folder.

    `task` may be None if all tasks share one adapter. Raises UserError if the run has no such
    adapter, or if `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; name a new folder or remove it")
    settings, net = trained.settings, trained.model
    if settings["mode"] != "lora":
        raise UserError(f"the run was trained with --mode {settings['mode']}: no adapter")
    if task is None and settings["adapters"] == "shared":
        task = next(iter(trained.tasks))
    if task not in trained.tasks:
        raise UserError(f"--task is {task!r} (the run's tasks are {', '.join(trained.tasks)})")
    merge(net.encoder, *net.adapters(task))
    with atomic_folder(out) as building:
        save_encoder(net.encoder, building)
        trained.source.copy_tokenizer(building)
    unmerge(net.encoder)
