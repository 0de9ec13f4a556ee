"""A training step on identical batches: SST, Quora and STS, LoRA r = 32 on query and value.

fastlora against Hugging Face + PEFT (SDPA, eager attention, compiled), full fine-tuning, and
itself with CUDA graphs.
"""

import pytest
from race import race

CONTENDERS = [
    "peft sdpa",
    "peft eager",
    "peft compiled",
    "full fastlora",
    "full sdpa",
    "fastlora graphs",
]
ROUNDS = 13


@pytest.mark.parametrize("name", CONTENDERS)
def test_train_step(benchmark, job, fastlora, name):
    if name.endswith("graphs") and job.device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    group = f"train step {job.device}: identical batches, ratio of fastlora to"
    race(benchmark, group, fastlora, name, job, "buckets", steps=1, rounds=ROUNDS)
