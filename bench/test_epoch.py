"""A whole epoch over the same examples, fastlora's batches against random ones.

Random order, padded to the longest of each batch, is what users of Hugging Face + PEFT run.
"""

import pytest
from race import race


@pytest.mark.parametrize("name", ["peft sdpa", "full sdpa"])
def test_epoch(benchmark, job, fastlora, name):
    group = f"epoch {job.device}: batches as each library makes them, ratio of fastlora to"
    race(benchmark, group, fastlora, name, job, "random", steps=3)
