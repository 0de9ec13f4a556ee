"""Checks that settings have the types of their dataclass; nothing is rounded or guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastlora.errors import UserError, did_you_mean, in_place_of
from fastlora.lora.config import check

# By a setting's type: the types of values that are accepted, and their name in messages.
_ACCEPTED: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "text"),
    tuple: ((list, tuple), "a list of names"),
    Path: ((str, Path), "a path"),
    Mapping: (Mapping, "tables [task.NAME]"),
}


@cache
def types_of(settings: Any) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    return get_type_hints(settings)


def check_types(settings: Any) -> None:
    """Convert each field of a frozen dataclass as `as_type` does; UserError for another type."""
    for name, kind in types_of(settings.__class__).items():
        object.__setattr__(settings, name, as_type(name, getattr(settings, name), kind))


def check_keys(table: Mapping[str, Any], known: Mapping[str, Any], where: str = "") -> dict:
    """Return the values of a table, each in the type that `known` gives for its key.

    Raises UserError, whose text begins with `where`, for an unknown key or another type.
    """
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known)[2:] or f"expected {', '.join(known)}"
            raise UserError(f"{where}{key} is no setting ({hint})")
    return {key: as_type(f"{where}{key}", value, known[key]) for key, value in table.items()}


def as_type(name: str, value: Any, kind: Any) -> Any:
    """Return the value of the setting `name` as `kind`; UserError for a value of another type.

    Text becomes a path, a list a tuple, a table the dataclass that it describes.
    """
    options, origin = get_args(kind), get_origin(kind) or kind
    if NoneType in options:
        return None if value is None else as_type(name, value, options[0])
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        with in_place_of(UserError, UserError, f"{name}."):
            return origin(**check_keys(value, types_of(kind)))
    if origin is Literal:
        check(value in options, name, value, f"one of {', '.join(options)}")
        return value
    accepted, expected = _ACCEPTED.get(origin, (origin, f"a {origin.__name__}"))
    ok = isinstance(value, accepted) and (origin is bool or not isinstance(value, bool))
    if origin is float:
        ok = ok and math.isfinite(value)
    if origin is tuple:
        ok = ok and all(isinstance(item, str) for item in value)
    ok = ok and not (origin in (str, Path) and "\0" in str(value))  # never in a path
    check(ok, name, value, expected)
    return origin(value) if origin in (int, float, tuple, Path) else value
