"""The entry points `fastlora` and `fastlora-train`: from arguments to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import cyclopts

from fastlora.cli.commands import app
from fastlora.errors import Interrupted, RunError, UserError
from fastlora.files import read_toml


def _sources(arguments: list[str]) -> list[cyclopts.config.Dict]:
    """The TOML file of --config or --resume, as the source of options not given as flags."""
    sources = []
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("--config", "--resume"):
            path = Path(value or " ".join(arguments[i + 1 : i + 2]))
            file = path / "run.toml" if flag == "--resume" else path
            table = {k: v for k, v in read_toml(file).items() if k != "task"}
            sources.append(
                cyclopts.config.Dict(table, source=str(file), use_commands_as_keys=False)
            )
    return sources


def _guarded(command: Callable[[], None]) -> int:
    """Run a command; returns its exit code (see errors.py)."""
    try:
        command()
    except UserError as error:
        return _fail(2, error)
    except (RunError, OSError) as error:
        return _fail(1, error)
    except Interrupted:
        return 130
    return 0


def _fail(code: int, error: object) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def main(arguments: list[str] | None = None) -> None:
    """The `fastlora` command."""
    given = sys.argv[1:] if arguments is None else arguments
    # torchrun needs "--" before our flags, and some Pythons pass it on.
    given = given[1:] if given[:1] == ["--"] else given

    def command() -> None:
        app.config = _sources(given)
        app(given)

    code = _guarded(command)
    sys.stdout.flush()
    sys.exit(code)


def train_main() -> None:
    """The `fastlora-train` command: `fastlora train`."""
    main(["train", *sys.argv[1:]])
