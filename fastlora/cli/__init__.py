"""The entry points `fastlora` and `fastlora-train`: from arguments to an exit code."""

from __future__ import annotations

import os
import sys

from fastlora.errors import Interrupted, RunError, UserError


def exit_code(arguments: list[str]) -> int:
    """Run a command; an error is one line on standard error.

    Returns 0 for success, 1 for a run that failed, 2 for wrong usage, configuration or data, 130
    for an interrupted command, and 141 where the reader of standard output has closed it.
    """
    try:
        # Imported here, so that Ctrl-C during the import is an interruption like any other.
        from cyclopts.exceptions import CycloptsError, UnknownOptionError, UnusedCliTokensError

        from fastlora.cli.commands import app
        from fastlora.cli.options import name_here

        try:
            if os.environ.get("WORLD_SIZE", "1") != "1" and arguments[:1] != ["train"]:
                raise UserError("only training runs in several processes; start without torchrun")
            app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
        except BrokenPipeError:
            # The code of a process that SIGPIPE ends. Output that is still buffered is discarded.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (UserError, CycloptsError, RunError, OSError, MemoryError) as error:
            hint = "a list has commas, as in --tasks sst,quora,sts"
            text = str(error) or "out of memory"
            text += f" {hint}" * isinstance(error, UnusedCliTokensError)
            if isinstance(error, UnknownOptionError):
                text = name_here(str(error.token.keyword or error.token.value)) or text
            print("error:", " ".join(text.split()), file=sys.stderr)
            return 2 if isinstance(error, (UserError, CycloptsError)) else 1
    except (Interrupted, KeyboardInterrupt):
        return 130
    return 0


def main(arguments: list[str] | None = None) -> None:
    """The `fastlora` command."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY))  # None if closed
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    # A path may have characters that the terminal's encoding lacks.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # torchrun needs "--" before our flags, and some Pythons pass it on.
    sys.exit(exit_code(given[1:] if given[:1] == ["--"] else given))


def train_main() -> None:
    """The `fastlora-train` command: `fastlora train`."""
    main(["train", *sys.argv[1:]])
