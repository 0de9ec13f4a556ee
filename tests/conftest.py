"""Where tests run: kernels in Triton's interpreter without a GPU, folders in two processes."""

import os
from pathlib import Path

# For the programs that tests start, too: so small shapes gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks at its import
IN_A_RUN = "PYTEST_XDIST_WORKER" in os.environ or "PYTEST_CURRENT_TEST" in os.environ


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Whole folders run in two processes; not by addopts, for benchmarks refuse to run so.

    A GPU's tests share its memory, so they run in one.
    """
    alone = IN_A_RUN or torch.cuda.is_available() or config.getoption("capture") == "no"
    alone |= config.getoption("usepdb") or not all(Path(arg).is_dir() for arg in config.args)
    if not alone and config.getoption("numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"
