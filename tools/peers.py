"""How other libraries end two attacks of kills.py and damage.py, beside fastlora.

Killed: transformers' Trainer with an adapter of PEFT is killed at a random moment and started again
with its newest checkpoint; its adapter has to be that of a run that was never killed. Damaged: one
bit of an adapter's two files is changed, and PEFT and fastlora load it; the outputs have to be
those of the whole files, or an error or a warning has to say that something is wrong.

    python tools/peers.py --kills 100 --flips 400
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tally import Child, Tally, preload
from tiny import train_arguments, write_data, write_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXTS = ["the good film", "a bad boat sings", "dog"]


def train(model: Path, out: Path) -> int:
    """Train with transformers' Trainer and PEFT, from the newest checkpoint if there is one."""
    import peft
    import torch
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    transformers.set_seed(0)
    base = transformers.BertForSequenceClassification.from_pretrained(model, num_labels=3)
    settings = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "value"])
    ids = torch.randint(5, 24, (96, 10))
    rows = [{"input_ids": row, "labels": row[0] % 3} for row in ids]
    how = {"save_steps": 4, "max_steps": 11, "save_total_limit": 2, "learning_rate": 1e-2}
    given = transformers.TrainingArguments(str(out), use_cpu=True, report_to=[], **how)
    trainer = transformers.Trainer(peft.get_peft_model(base, settings), given, train_dataset=rows)
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(out / "final"))
    return 0


def killed(folder: Path, kills: int, seed: int) -> None:
    """Kill and continue runs of the Trainer, and print how they end."""
    tally, whole, out = Tally("Trainer, killed"), folder / "whole", folder / "killed"
    start = lambda out: Child(lambda: train(folder / "model", out), folder / "output.txt")  # noqa: E731
    begin = time.monotonic()
    assert start(whole).wait() == 0, (folder / "output.txt").read_text()
    seconds = time.monotonic() - begin
    for i in range(kills):
        child = start(out)
        time.sleep(random.Random(f"{seed}-{i}").uniform(0, seconds))
        child.kill()
        child.wait()
        if (child := start(out)).wait():
            tally.add("refused", "")
            print(f"seed {seed}-{i}: {child.text().strip().splitlines()[-1]:.150}")
        else:
            ends = [(run / "final" / WEIGHTS).read_bytes() for run in (whole, out)]
            tally.add("right" if ends[0] == ends[1] else "wrong", f"seed {seed}-{i}")
        shutil.rmtree(out, ignore_errors=True)
    tally.finish()


def loaded(load: Callable[[], object]) -> tuple[object, set[str]]:
    """What loading an adapter gives, or None for an error, and the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return load(), {str(warning.message) for warning in said}
        except Exception:
            return None, set()


def damaged(folder: Path, flips: int, seed: int) -> None:
    """Change bits of an adapter that PEFT and fastlora load, and print how that ends."""
    import peft
    import torch
    import transformers

    import fastlora
    from fastlora.cli import exit_code

    write_data(folder / "data")
    run, ids = folder / "run", torch.arange(5, 23)[None]
    assert exit_code(train_arguments(folder, run, "--lr", "0.02", "--epochs", "2")) == 0

    @torch.no_grad()
    def of_peft() -> bytes:
        encoder = transformers.BertModel.from_pretrained(folder / "model")
        model = peft.PeftModel.from_pretrained(encoder, run / "adapter").eval()
        return model(input_ids=ids).last_hidden_state.numpy().tobytes()

    def of_fastlora() -> str:
        return str(fastlora.load(run, "cpu").predict(TEXTS, "sst"))

    for name, load in (("PEFT", of_peft), ("fastlora", of_fastlora)):
        tally, (whole, usual) = Tally(f"{name}, a bit of its adapter changed"), loaded(load)
        assert whole is not None, name
        for i in range(flips):
            file = run / "adapter" / (WEIGHTS, CONFIG)[i % 2]
            rng, content = random.Random(f"{seed}-{i}"), file.read_bytes()
            place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            found, said = loaded(load)
            verdict = "refused" if found is None or said - usual else "wrong"
            tally.add("right" if found == whole else verdict, f"{file.name}, seed {seed}-{i}")
            file.write_bytes(content)
        tally.finish()


def main() -> int:
    """Make the attacks that the arguments ask for; returns 0, however the peers end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="kills at random moments")
    parser.add_argument("--flips", type=int, default=400, help="changes of an adapter")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    preload()
    with TemporaryDirectory() as name:
        os.environ["FASTLORA_CACHE"] = str(Path(name, "cache"))
        write_model(Path(name, "model"))
        killed(Path(name), given.kills, given.seed)
        damaged(Path(name), given.flips, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
