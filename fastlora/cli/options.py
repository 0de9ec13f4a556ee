"""The settings of a run and of a search as the command line's options.

Their help texts are in the settings' docstrings. An option that is not given is None, so that
the value in a file of settings applies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass, make_dataclass
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Optional, Union, get_args, get_origin

from cyclopts import CoercionError, Group, Parameter, convert

from fastlora.data.infer import FileTask
from fastlora.files import read_toml
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.types import check_keys, types_of

_UNIONS = (Union, UnionType)
# The groups of options in the order of --help, by the first setting of each.
_TITLES = {
    "budget": "Search",
    "text": "A file of your own",
    "r": "LoRA",
    "tasks": "Tasks and data",
    "epochs": "Optimisation",
    "precision": "Precision and speed",
    "out": "Output",
    "sst": "One task's adapter, with --adapters per-task or shared+per-task",
}
_GROUPS = {name: Group(_TITLES[name], sort_key=i) for i, name in enumerate(_TITLES)}
OUTPUT = _GROUPS["out"]
# What options of other trainers are called here, by a part of their names.
_ELSEWHERE = {"batch": "tokens-per-batch", "learning": "lr", "early-stop": "patience"}
_ELSEWHERE |= {"target": "targets", "output": "out", "lora-alpha": "alpha", "epochs": "epochs"}
_REFUSED = "gains 1 to 2% once the learning rate is tuned, and takes longer; tune --lr in its place"


def name_here(option: str) -> str:
    """The message on an unknown option that other trainers have, or ""."""
    name = option.lower().replace("_", "-")
    hints = [f"did you mean --{_ELSEWHERE[part]}?" for part in _ELSEWHERE if part in name]
    hints += [f"{variant} {_REFUSED}" for variant in ("dora", "pissa", "vera") if variant in name]
    return f"unknown option {option}; {hints[0]}" if hints else ""


def to_number(kind: Any, tokens: Sequence[Any]) -> Any:
    """Parse an option's number; "1.5" is no int, and "1_0", " 5 " and non-ASCII digits are none."""
    text = tokens[0].value
    try:
        if not re.fullmatch("[0-9a-zA-Z.+-]+", text):
            raise ValueError
        return convert(kind, tokens) if kind is timedelta else kind(text)
    except OverflowError as error:
        raise ValueError(f"{text!r} is too large") from error
    except (ValueError, CoercionError):
        expected = {int: "whole number", timedelta: "time, such as 90s, 30m or 2h"}
        raise ValueError(f"{text!r} is no {expected.get(kind, 'number')}") from None


def _split(_type: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    """Split the value of a list option, such as "a,b"."""
    return tuple(part for token in tokens for part in token.value.split(",") if part)


def _option(kind: Any, default: Any, **how: Any) -> Any:
    """The annotation of an option that is None if it is not given; --help shows `default`."""
    kind = next((part for part in get_args(kind) if get_origin(kind) in _UNIONS), kind)
    if kind is TaskLoraConfig:
        return Optional[_TaskFlags]  # noqa: UP045
    if kind in (int, float, timedelta):
        how["converter"] = to_number
    if get_origin(kind) is tuple:
        how |= {"converter": _split, "n_tokens": 1}
        default = default and ",".join(default)
    # "--sst.no-rslora" undoes a common --rslora; other flags have no negation.
    how["negative"] = None if kind is bool and default is None else ""
    shown = default is not None and default is not False
    how["show_default"] = (lambda _: str(default)) if shown else False
    return Annotated[kind, Parameter(**how)]  # not Optional, which would take "none" for None


def _flags(settings: type, *names: str, **how: Any) -> Any:
    """A dataclass with an option for each setting, or for `names`, and the settings' docstring."""
    defaults, options, group = vars(settings()), [], None
    for name, kind in types_of(settings).items():
        group = _GROUPS.get(name, group)
        if name in names or (not names and name != "task"):  # tables of tasks are in files alone
            options.append((name, _option(kind, defaults[name], **{"group": group, **how}), None))
    # cyclopts ignores classes of the standard library, of which this would be one.
    here = {"__module__": __name__, "__doc__": settings.__doc__}
    return make_dataclass("Flags", options, namespace=here)


_TaskFlags = _flags(TaskLoraConfig, group=_GROUPS["sst"], help="Replaces the common value.")
TrainFlags = _flags(TrainConfig)
_OF_TABLES = "data model bad_rows quoting limit epochs tokens_per_batch precision device"
TableFlags = _flags(TrainConfig, *_OF_TABLES.split())
EvalFlags = _flags(TrainConfig, "data", "bad_rows", "quoting", "limit", "device")
PredictFlags = _flags(TrainConfig, "quoting", "device")
ComputeFlags = _flags(TrainConfig, "precision", "device")
FileFlags = _flags(FileTask)
SearchFlags = _flags(SearchConfig)


def given(flags: Any) -> dict[str, Any]:
    """The options that were given, by name; those of a task's adapter as a table."""
    values = {key: value for key, value in vars(flags).items() if value is not None}
    return {key: given(value) if is_dataclass(value) else value for key, value in values.items()}


def settings_from(flags: Any, file: Path | None) -> TrainConfig:
    """The settings of a TOML file, if one is given; the options given replace those of the file."""
    table = read_toml(file) if file else {}
    check_keys(table, types_of(TrainConfig), f"{file}: ")
    for key, value in given(flags).items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return TrainConfig.from_table(table)
