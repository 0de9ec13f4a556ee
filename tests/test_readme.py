"""What the README shows works as it stands."""

import re
from pathlib import Path

import fastlora
from fastlora.interop.swap import Swapped

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXISTING, LIBRARY = re.findall(r"```python\n(.*?)```", README, re.S)


def test_existing_script_runs(capsys):
    found = {}
    exec(compile(EXISTING, "README.md", "exec"), found)
    out = capsys.readouterr().out
    assert "1 encoder on real tokens" in out and "4 LoRA layer" in out
    assert not any(isinstance(module, Swapped) for module in found["model"].modules())


def test_library_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(LIBRARY, "README.md", "exec"), {})
    assert "'lora': 49152, 'other trainable': 1538" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_every_public_name_imports():
    for name in fastlora.__all__:
        assert getattr(fastlora, name).__doc__, name


def test_no_figure_is_missing():
    assert "FIGURES" not in README
