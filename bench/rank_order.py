"""Does one run at the largest rank, cut to each smaller one, order ranks as training them does?

    python bench/rank_order.py --data data/ [--task sts] [--seeds 2] [--share 0.5]

`fastlora search` chooses a rank by such cuts (truncation.py). Here every rank is trained, too, on
the same examples, and Spearman's rho says how well the two orders agree. Exits with 1 where rho of
the mean over seeds is under 0.6.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from fastlora.studies.search import train_share
from fastlora.studies.truncation import RANKS, scores_by_rank
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import find_inputs
from fastlora.training.setup import prepare, read_encoder

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
        scores = []
        for rank in RANKS:
            changed = replace(setup.config, seed=seed, r=rank)
            trainer = train_share(setup.narrow(changed), options.share)
            scores.append([s or 0.0 for s in trainer.progress.scores[-1]["scores"].values()])
        retrained.append(np.mean(scores, 1).tolist())
        of_largest = scores_by_rank(trainer.model, setup.dev)
        cut.append([of_largest[rank][0] for rank in RANKS])
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
