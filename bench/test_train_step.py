"""A training step on identical batches: SST, Quora and STS, LoRA r = 32 on query and value.

fastlora against Hugging Face + PEFT (SDPA, eager attention), full fine-tuning, and itself with
CUDA graphs; test_accelerate.py has PEFT compiled.
"""

import pytest
from race import race

CONTENDERS = [
    "peft sdpa",
    "peft eager",
    "full fastlora",
    "full sdpa",
    "fastlora graphs",
]
ROUNDS = 9


@pytest.mark.parametrize("name", CONTENDERS)
def test_train_step(benchmark, job, fastlora, name):
    if name.endswith("graphs") and job.device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    group = f"train step {job.device}: identical batches, ratio of fastlora to"
    race(benchmark, group, fastlora, name, job, "buckets", steps=1, rounds=ROUNDS)
