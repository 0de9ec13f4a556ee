"""A trained run, loaded back: for evaluation, prediction and merging."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from fastlora.bert.weights import load_encoder, save_encoder
from fastlora.data.reading import Rows, encode_rows, read_rows
from fastlora.data.source import Source, resolve
from fastlora.data.tasks import Task
from fastlora.data.tokenizer import Tokenizer
from fastlora.devices import local_device
from fastlora.errors import UserError
from fastlora.files import atomic_folder
from fastlora.lora.files import read_config
from fastlora.lora.merging import merge, unmerge
from fastlora.lora.model import pack
from fastlora.multitask import files as adapters
from fastlora.multitask.model import MultitaskBert
from fastlora.multitask.predictor import predict, predicted_labels
from fastlora.runs.session import ENCODER
from fastlora.training.inputs import adapter_folder
from fastlora.training.setup import PARTS
from fastlora.training.tuner import use_measured_blocks

PROBE = (
    "a moving film, if a little long .",
    "How do I learn to play the guitar?",
    "Two dogs run on the beach.",
    "not good",
)


@dataclass(frozen=True)
class Trained:
    """A model in fp32 and evaluation mode, with what it takes to feed it."""

    model: MultitaskBert
    tokenizer: Tokenizer
    source: Source
    tasks: dict[str, Task]
    settings: dict[str, Any]  # of the run: mode, adapters, pairs, model


@torch.random.fork_rng([])  # layers are drawn before they are read
def load_trained(path: str | Path, device: str = "auto", model: str | None = None) -> Trained:
    """Load a finished run, or its adapter folder; fp32 logits are bit-equal to the trained model's.

    `model` says where the encoder lies, if not where the run found it. Raises UserError when
    anything is missing or belongs to another encoder or tokenizer.
    """
    folder = adapter_folder(Path(path))
    tasks, settings = adapters.read_heads(folder)
    full = settings["mode"] == "full"
    source = resolve(str(folder / ENCODER) if full else model or settings["model"])
    tokenizer = Tokenizer.from_folder(source.folder)
    encoder, _ = load_encoder(source.folder, PARTS)
    use_measured_blocks()
    base = adapters.BaseInfo(source.name, adapters.fingerprint(encoder), tokenizer.fingerprint)
    net = MultitaskBert(encoder, tasks, settings["pairs"])
    names = []
    if settings["mode"] == "lora":
        names = adapters.adapter_names(settings["adapters"], tasks)
        places = {name: adapters.adapter_place(folder, name) for name in names}
        net.adapt({name: read_config(place) for name, place in places.items()})
    adapters.load_all(folder, net.encoder, names, net.heads, base)
    net = net.to(local_device(device)).eval()
    pack(net.encoder)  # nobody else changes its frozen weights
    return Trained(net, tokenizer, source, tasks, settings)


def predict_rows(
    trained: Trained, path: str | Path, task: str | None, quoting: str = "minimal"
) -> tuple[list[tuple[str, str, str]], int]:
    """The id, task and prediction of each row of a file, in its order, and the texts cut.

    Without `task`, a column "task" says whose a row is; rows of all tasks share encoder passes.
    """
    names = [task] if task else list(trained.tasks)
    data, numbers = {}, {}
    for name in names:
        own = trained.tasks[name]
        mixed = () if task else names
        rows = read_rows(path, own, labelled=False, quoting=quoting, mixed=mixed)
        if rows.ids:
            data[name] = encode_rows(rows, own, trained.tokenizer, trained.settings["pairs"])
            numbers[name] = rows.positions
    if not data:
        raise UserError(f"{path}: no rows")
    found: list[tuple[int, str, str, str]] = []
    for name, outputs in predict(trained.model, data).items():
        predictions = predicted_labels(data[name], outputs)
        found += zip(numbers[name], data[name].ids, repeat(name), predictions)
    return [row[1:] for row in sorted(found)], sum(own.truncated for own in data.values())


def merge_encoder(trained: Trained, task: str | None, out: str | Path) -> float:
    """Write the encoder with a task's adapters merged (in fp32) as a Hugging Face folder.

    `task` may be None where all tasks share one adapter. Returns the largest absolute
    difference of logits between the merged and the adapted model. Raises UserError when there is
    nothing to merge, no such adapter, or `out` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; name a new folder or remove it")
    settings, net = trained.settings, trained.model
    if settings["mode"] != "lora":
        raise UserError(f"the run was trained with --mode {settings['mode']}: no adapter")
    shared = settings["adapters"] == "shared"
    if task not in trained.tasks and not (shared and task is None):
        raise UserError(f"--task is {task!r} (the run's tasks are {', '.join(trained.tasks)})")
    probe = {}
    for name, own in trained.tasks.items():
        if shared or name == task:
            texts = tuple([*PROBE[i:], *PROBE[:i]] for i in range(len(own.columns)))
            rows = Rows([str(i) for i in range(len(PROBE))], texts, None, 0, 0)
            probe[name] = encode_rows(rows, own, trained.tokenizer, settings["pairs"])
    before = predict(net, probe)
    merge(net.encoder, *net.adapters(task or next(iter(trained.tasks))))
    after = predict(net, probe)
    with atomic_folder(out) as building:
        save_encoder(net.encoder, building)
        trained.source.copy_tokenizer(building)
    unmerge(net.encoder)
    return max(float(abs(before[n] - after[n]).max()) for n in probe)
