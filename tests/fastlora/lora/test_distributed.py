"""Two processes train one adapted model as one process does, on every route."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """By DDP and by FSDP2."""
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    command = [sys.executable, script, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for how in ("ddp", "fsdp"):
        assert done.stdout.count(f"{how} agrees") == 2
