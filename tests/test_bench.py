"""The contenders of the training benchmarks, on tiny models."""

from multiprocessing import Pipe

import pytest
import torch
from race import serve
from tiny import write_data, write_model
from trainers import Job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    model, data = write_model(folder / "model"), write_data(folder / "data")
    return Job(data, str(model), tokens=128, threads=torch.get_num_threads())


@pytest.mark.parametrize("name", ["fastlora", "full fastlora", "peft sdpa", "full eager"])
def test_a_contender_trains(name, job):
    ours, theirs = Pipe()
    for request in ("gemm", ("buckets", 0, 2), "restart", ("random", 0, 2), None):
        ours.send(request)
    serve(theirs, name, job)
    batches, rate, similar, _, shuffled = (ours.recv() for _ in range(5))
    assert batches > 2 and rate > 0
    assert 0 < similar.loss < 9 and 0 < shuffled.loss < 9
    assert similar.computed >= similar.flops > 0
