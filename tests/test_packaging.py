"""What gets installed, and that our folder names do not get in Hugging Face's way."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomlkit

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomlkit.parse((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"].values()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy: setuptools writes into its source folder, and reads it back."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist"]
    command = [sys.executable, "-m", "pip", "wheel", *options, source]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_wheel_has_one_top_level(wheel):
    top = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert top == {"fastlora"}


def test_wheel_holds_every_module(wheel):
    for package, folder in SETUPTOOLS["package-dir"].items():
        for module in (ROOT / folder).rglob("*.py"):
            inside = module.relative_to(ROOT / folder).as_posix()
            assert f"{package.replace('.', '/')}/{inside}" in wheel


def test_wheel_holds_the_demo_corpus(wheel):
    shipped = {
        f"fastlora/data/demo/{path.name}" for path in (ROOT / "fastlora/data/demo").iterdir()
    }
    assert len(shipped) == 6
    assert shipped <= set(wheel)


def test_package_list_equals_tree():
    found = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *below)))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)
    stray = [m for folder in FOLDERS for m in (ROOT / folder).rglob("*.py")]
    assert [m for m in stray if not (m.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", ["kernels", "bert"])
def test_top_level_import_is_refused(name):
    command = [sys.executable, "-c", f"import {name}"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"fastlora.{name}" in last
    assert "not 'python -m pytest'" in last


def test_transformers_imports_beside_our_kernels_folder():
    spec = importlib.util.find_spec("kernels")
    # Hugging Face's own package of this name may be installed; ours must not be found.
    assert spec is None or not Path(spec.origin).is_relative_to(ROOT), (
        "the repository root is on sys.path: run 'pytest', not 'python -m pytest'"
    )
    from transformers import BertModel

    assert BertModel.__module__.startswith("transformers.")


@pytest.mark.parametrize("folder", ["tests", "bench"])
def test_no_init_files_beside_the_packages(folder):
    assert list((ROOT / folder).rglob("__init__.py")) == []
