"""Does one run at the largest rank, cut to each smaller one, order ranks as training them does?

    python bench/rank_order.py --data data/ [--task sts] [--seeds 2] [--share 0.5]

`fastlora search` chooses a rank by such cuts (ranks.py). Here every rank is trained, too, side by
side on the same examples, and Spearman's rho says how well the two orders agree. Exits with 1 where
rho of the mean over seeds is under 0.6.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from fastlora.console import Log
from fastlora.studies.truncation import RANKS, sweep
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import find_inputs
from fastlora.training.setup import prepare, read_encoder
from fastlora.training.side_by_side import side_by_side

LEAST = 0.6


def main() -> int:
    """Train, cut, print both orders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the CS224N files")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--task", default="sts")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "fp16", "bf16"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.5, help="of the examples, as in search")
    options = parser.parse_args()
    config = TrainConfig(
        data=options.data,
        model=options.model,
        tasks=(options.task,),
        precision=options.precision,
    )
    inputs = find_inputs(config)
    setup = replace(prepare(config, inputs), loaded=read_encoder(inputs.source))
    cut, retrained = [], []
    for seed in range(options.seeds):
        configs = [replace(setup.config, seed=seed, r=rank) for rank in RANKS]
        trainer = side_by_side(setup, configs, Log(quiet=True))
        trainer.total = round(options.share * trainer.total)
        retrained.append([score or 0.0 for score in trainer.run().scores.values()])
        found = sweep(trainer, len(RANKS) - 1)
        cut.append([found[rank][0] for rank in RANKS])
        print(f"seed {seed}: rho {_rho(cut[-1], retrained[-1]):.2f}", flush=True)
    means = np.mean(cut, 0), np.mean(retrained, 0)
    print(f"{'rank':>6}{'cut':>10}{'retrained':>12}")
    for rank, one, other in zip(RANKS, *means, strict=True):
        print(f"{rank:6}{one:10.4f}{other:12.4f}")
    rho = _rho(*means)
    print(f"rho of the means {rho:.2f} (expected {LEAST} or more)")
    return int(not rho >= LEAST)  # constant scores have no order: rho is NaN


def _rho(cut: Sequence[float], retrained: Sequence[float]) -> float:
    return float(spearmanr(cut, retrained).statistic)


if __name__ == "__main__":
    sys.exit(main())
