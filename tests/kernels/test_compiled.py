"""Runs tests/kernels/compiled in a process of its own: this one interprets kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="pytest collects them natively here"
)
def test_compiled_kernels(capsys):
    folder = Path(__file__).parent / "compiled"
    found = subprocess.run(
        [Path(sys.executable).with_name("pytest"), "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=folder.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        print("\n" + found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
