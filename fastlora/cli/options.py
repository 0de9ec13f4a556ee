"""The settings of a run and of a search as the command line's options: groups and help texts.

An option that is not given is None, so that a file of settings can be read below the flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Optional, Union, get_args, get_origin

from cyclopts import Group, Parameter

from fastlora.data.tasks import BUILTIN
from fastlora.files import read_toml
from fastlora.lora.config import TARGETS
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.types import check_keys, types_of

_UNIONS = (Union, UnionType)
# In the order of --help.
OPTIONS: dict[str, dict[str, str]] = {
    "Search": {
        "budget": "Time, as 90s, 30m or 2h, after which no short run begins.",
        "trials": "Short runs of learning rate and warmup, 1 or more.",
        "together": "Without effect: trials train one at a time.",
        "join": "Help with the search in --out that another process leads.",
    },
    "LoRA": {
        "r": "Rank of the update, 1 or more.",
        "alpha": "Strength: the update is scaled by alpha / r.",
        "dropout": "Dropout on the update's input, 0 <= p < 1.",
        "rslora": "Scale by alpha / sqrt(r) instead.",
        "targets": f"Matrices to adapt, comma-separated: {', '.join(TARGETS)}.",
        "adapters": "One adapter for all tasks, one each, or both together.",
        "add_to": "Finished run with adapters per task, to which other tasks are added.",
        "mode": "Train adapters, heads on a frozen encoder, or every weight.",
    },
    "Tasks and data": {
        "tasks": "Tasks, comma-separated; by default sst, quora and sts, as in the paper.",
        "data": "Folder of the task files; by default ./data, else the demo corpus.",
        "model": "Folder, hub id, or minilm; by default bert-base-uncased, demo: minilm.",
        "pairs": "Encode a pair as two sentences, or as one [CLS] a [SEP] b [SEP].",
        "sampling": "How often a task is drawn, by its number of examples.",
        "bad_rows": "Whether a malformed row is an error, or skipped and counted.",
        "quoting": "Quotes in CSV and TSV files: around a field, or none: plain characters.",
        "limit": "Use at most this many examples of each task's files.",
    },
    "Optimisation": {
        "epochs": "Passes over the training examples.",
        "max_steps": "Stop after this many steps.",
        "tokens_per_batch": "Real tokens of a step over all processes, 1 or more.",
        "accumulate": "Split each step in this many parts, to save memory.",
        "lr": "Peak learning rate; by default lora 2e-3, full 5e-5, frozen 2e-3.",
        "head_lr": "Peak learning rate of the heads; by default 1e-3, or --lr when frozen.",
        "weight_decay": "AdamW's decay of matrices.",
        "warmup": "Share of the steps that warm up, 0 to 1.",
        "schedule": "Decay after the warmup.",
        "clip": "Largest gradient norm.",
        "seed": "Seed of weights, order and dropout.",
    },
    "Precision and speed": {
        "precision": "Compute type; auto: bf16 or fp16 on a GPU, fp32 on a CPU.",
        "device": "auto, cpu, cuda or cuda:N.",
        "compile": "Compile the encoder with torch.compile.",
        "cuda_graphs": "Replay each step as a CUDA graph, for small batches.",
        "grad_checkpoint": "Less memory, 1.6x the time: backward computes layers again.",
    },
    "Output": {
        "out": "Run folder; an unfinished run in it is continued.",
        "save_every": "Steps between checkpoints; the end of an epoch always saves.",
    },
    "One task's adapter, with --adapters per-task or shared+per-task": {
        name: f"Replaces the common value, for {name} alone." for name in BUILTIN
    },
}
_GROUPS = {title: Group(title, sort_key=i) for i, title in enumerate(OPTIONS)}
OUTPUT = _GROUPS["Output"]


def whole_number(_type: Any, tokens: Sequence[Any]) -> int:
    """An integer option's value. cyclopts itself would round "1.5" to 2."""
    return int(tokens[0].value)


def _split(_type: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    """A list option's value, as "a,b"."""
    return tuple(part for token in tokens for part in token.value.split(",") if part)


def _option(kind: Any, text: str, default: Any, group: Group, negative: str | None = "") -> Any:
    """The annotation of an option, which is None where it is not given; --help names `default`."""
    kind = next((part for part in get_args(kind) if get_origin(kind) in _UNIONS), kind)
    how: dict[str, Any] = {"group": group, "negative": negative}
    if kind is int:
        how["converter"] = whole_number
    if get_origin(kind) is tuple:
        how |= {"converter": _split, "n_tokens": 1}
        default = default and ",".join(default)
    if kind is TaskLoraConfig:
        # "--sst.no-rslora" undoes a common --rslora.
        options = [
            (name, _option(its, text, None, group, None if name == "rslora" else ""), None)
            for name, its in types_of(kind).items()
        ]
        kind, default, how = _dataclass("TaskFlags", options), None, {}
    shown = "" if default is None or default is False else f" [default: {default}]"
    return Annotated[Optional[kind], Parameter(help=text + shown, **how)]  # noqa: UP045


def _dataclass(name: str, options: list[tuple[str, Any, None]]) -> Any:
    # cyclopts passes over classes of the standard library, of which this would be one.
    return make_dataclass(name, options, namespace={"__module__": __name__})


def _flags(settings: type, *names: str) -> Any:
    """A dataclass with an option for each setting that `OPTIONS` describes, or for those named."""
    kinds, defaults = types_of(settings), vars(settings())
    options = [
        (key, _option(kinds[key], text, defaults[key], _GROUPS[title]), None)
        for title, texts in OPTIONS.items()
        for key, text in texts.items()
        if key in (names or kinds)
    ]
    return _dataclass("Flags", options)


TrainFlags = _flags(TrainConfig)
TableFlags = _flags(
    TrainConfig,
    *("data", "model", "bad_rows", "quoting", "limit", "epochs", "tokens_per_batch"),
    *("precision", "device"),
)
EvalFlags = _flags(TrainConfig, "data", "bad_rows", "quoting", "device")
PredictFlags = _flags(TrainConfig, "quoting", "device")
ComputeFlags = _flags(TrainConfig, "precision", "device")
SearchFlags = _flags(SearchConfig)


def given(flags: Any) -> dict[str, Any]:
    """The options that were given, by name; those of a task's adapter as a table."""
    values = {key: value for key, value in vars(flags).items() if value is not None}
    return {key: given(value) if is_dataclass(value) else value for key, value in values.items()}


def settings_from(flags: Any, file: Path | None) -> TrainConfig:
    """The settings of a TOML file, where there is one, with flags before those of the file."""
    table = read_toml(file) if file else {}
    check_keys(table, types_of(TrainConfig), f"{file}: ")
    for key, value in given(flags).items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return TrainConfig.from_table(table)
