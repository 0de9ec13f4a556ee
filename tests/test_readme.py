"""What the README shows works as it stands."""

import re
from pathlib import Path

import fastlora

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_library_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert "'lora': 49152" in capsys.readouterr().out


def test_every_public_name_imports():
    for name in fastlora.__all__:
        assert getattr(fastlora, name).__doc__, name


def test_no_figure_is_missing():
    assert "FIGURES" not in README
