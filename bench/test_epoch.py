"""A whole epoch over the same examples, fastlora's batches against random ones.

Random order, padded to the longest of each batch, is what users of Hugging Face + PEFT run.
"""

from race import race


def test_epoch(benchmark, job, fastlora):
    group = f"epoch {job.device}: batches as each library makes them, ratio of fastlora to"
    race(benchmark, group, fastlora, "peft sdpa", job, "random", steps=3)
