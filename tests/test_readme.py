"""What the README shows works as it stands."""

import re
from pathlib import Path

import fastlora

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_library_example_runs(capsys, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "'lora': 49152, 'other trainable': 1538" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_every_public_name_imports():
    for name in fastlora.__all__:
        assert getattr(fastlora, name).__doc__, name


def test_no_figure_is_missing():
    assert "FIGURES" not in README
