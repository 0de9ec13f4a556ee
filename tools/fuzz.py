"""Give every reader damaged and unusual files, seeded, and look how it ends.

A reader has to return what the file says, or to raise a UserError or RunError of one line. Anything
else is wrong: another exception, a minute without an end, or content that the file does not have,
which an independent reading of the same bytes or a checksum tells.

    python tools/fuzz.py --count 2000
    python tools/fuzz.py --only cache-17     # one input again, by its seed
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzz_inputs import csv_text, mutate, mutate_json, toml_text
from tally import Tally, TimeUp, preload, time_limit
from tiny import write_data, write_model

REFUSED = "refused"
NOTHING = argparse.Namespace()  # no options on the command line
Reader = Callable[[random.Random], object]


def expect(condition: bool, what: str) -> None:
    """Raise AssertionError unless a reader's result is right."""
    if not condition:
        raise AssertionError(what)


class Readers:
    """A reader for each kind of file, on files of a tiny run in a folder.

    Each makes one input from a random generator, reads it, and checks what came out.
    """

    def __init__(self, folder: Path) -> None:
        from fastlora.data.tasks import BUILTIN
        from fastlora.data.token_cache import load_tasks
        from fastlora.data.tokenizer import Tokenizer
        from fastlora.runs.session import run_training
        from fastlora.training.config import TrainConfig

        self.folder, self.tasks = folder, BUILTIN
        os.environ["FASTLORA_CACHE"] = str(folder / "cache")
        self.model, self.data = write_model(folder / "model"), write_data(folder / "data")
        self.out = folder / "run"
        shared = {"model": str(self.model), "data": self.data, "device": "cpu", "max_steps": 6}
        settings = {**shared, "tasks": ("sst", "sts"), "save_every": 3, "tokens_per_batch": 256}
        run_training(TrainConfig(**settings, out=self.out), quiet=True)
        self.tokenizer = Tokenizer.from_folder(self.model)
        self.load = lambda: load_tasks(self.data, [BUILTIN["sts"]], "dev", self.tokenizer)["sts"]
        shutil.rmtree(folder / "cache")
        self.cached = self.load()
        [self.cache] = (folder / "cache" / "tokens").glob("*/tokens.npz")
        self.kept: dict[Path, bytes] = {}

    def all(self) -> dict[str, Reader]:
        """The readers, by name."""
        return {name: getattr(self, f"read_{name}") for name in NAMES}

    def damaged(self, path: Path, rng: random.Random) -> bytes:
        """Write a damaged form of a file in its place, and return its bytes."""
        original = self.kept.setdefault(path, path.read_bytes())
        if path.suffix == ".json" and rng.random() < 0.6:
            content = mutate_json(rng, original)
        else:
            content = mutate(rng, original)
        path.write_bytes(content)
        return content

    def restore(self) -> None:
        """Put back what `damaged` has replaced."""
        for path, content in self.kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def read_csv(self, rng: random.Random) -> None:
        """A table in one of many spellings, whole or damaged, in its reader."""
        from fastlora.data.reading import read_rows

        rows, content, suffix = csv_text(rng)
        whole = rng.random() < 0.5
        content = content if whole else mutate(rng, content)
        path = self.folder / f"rows{suffix}"
        path.write_bytes(content)
        rule = rng.choice(("error", "skip"))
        found = read_rows(path, self.tasks["sst"], bad_rows=rule)
        texts, labels = found.texts[0], found.labels
        assert labels is not None
        if whole:
            expect([*zip(texts, labels, strict=True)] == rows, f"read {texts} for {rows}")
        expect(set(labels) <= {0, 1, 2, 3, 4}, f"labels {set(labels)}")
        expect(len(texts) == len(labels) == len(found.ids), "columns of different lengths")

    def read_jsonl(self, rng: random.Random) -> None:
        """A JSONL file, whole or damaged; json.loads says what its lines hold."""
        from fastlora.data.reading import read_rows

        lines = [{"id": f"i{i}", "sentence": f"good {i}", "sentiment": i % 5} for i in range(4)]
        content = b"\n".join(json.dumps(line).encode() for line in lines)
        parts = content.split(b"\n")
        place = rng.randrange(4)
        change = mutate_json if rng.random() < 0.5 else mutate
        parts[place] = change(rng, parts[place])
        path = self.folder / "rows.jsonl"
        path.write_bytes(b"\n".join(parts))
        found = read_rows(path, self.tasks["sst"], bad_rows=rng.choice(("error", "skip")))
        texts = []
        for line in path.read_text("utf-8-sig").split("\n"):
            with suppress(ValueError, KeyError, TypeError):
                texts.append(str(json.loads(line)["sentence"]).strip())
        expect(set(found.texts[0]) <= {*texts, "true", "false"}, f"read {found.texts[0]}")

    def read_toml(self, rng: random.Random) -> None:
        """Settings; tomlkit says what the file holds, and a file written of them gives the same."""
        import tomlkit

        from fastlora.cli.options import settings_from
        from fastlora.runs.folder import write_config

        content = toml_text(rng)
        content = content if rng.random() < 0.4 else mutate(rng, content)
        path = self.folder / "settings.toml"
        path.write_bytes(content)
        config = settings_from(NOTHING, path)
        table = config.to_table()
        for key, value in tomlkit.parse(content.decode("utf-8-sig")).unwrap().items():
            found = table.get(key, value)
            # A whole number may be given as a rate, which is a float.
            same = found == (float(value) if isinstance(found, float) else value)
            expect(same or isinstance(value, dict), f"{key} is {found!r} for {value!r}")
        write_config(self.folder / "again.toml", config)
        again = settings_from(NOTHING, self.folder / "again.toml")
        expect(again == config, "settings that were written are read differently")

    def read_run(self, rng: random.Random) -> None:
        """The files that bind a run to its settings and inputs: run.toml, inputs.json, result."""
        from fastlora.cli.options import settings_from
        from fastlora.files import read_json
        from fastlora.runs.folder import check_run
        from fastlora.runs.session import read_result

        inputs, result = read_json(self.out / "inputs.json"), read_result(self.out)
        name = rng.choice(("run.toml", "inputs.json", "result.json"))
        self.damaged(self.out / name, rng)
        if name == "run.toml":
            settings_from(NOTHING, self.out / name)
        elif name == "inputs.json":
            check_run(self.out, inputs)
            expect(read_json(self.out / name) == inputs, "other inputs were accepted")
        else:
            expect(read_result(self.out) == result, "another result was accepted")

    def read_adapter(self, rng: random.Random) -> None:
        """The files of a finished run's adapter and heads, which have checksums."""
        from fastlora.multitask.files import read_heads

        folder = self.out / "adapter"
        whole = read_heads(folder)
        names = ("adapter_config.json", "adapter_model.safetensors", "heads.json")
        self.damaged(folder / rng.choice((*names, "heads.safetensors")), rng)
        expect(read_heads(folder) == whole, "other heads were accepted")

    def read_peft(self, rng: random.Random) -> None:
        """An adapter of PEFT's format by itself; json.loads says what its settings are."""
        from fastlora.bert.weights import load_encoder
        from fastlora.lora.files import load_adapter
        from fastlora.lora.layer import lora_layers

        folder = self.out / "adapter"
        names = ("adapter_config.json", "adapter_model.safetensors")
        self.damaged(folder / rng.choice(names), rng)
        self.encoder = getattr(self, "encoder", None) or load_encoder(self.model)[0]
        import copy

        model = copy.deepcopy(self.encoder)
        load_adapter(model, folder)
        says = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        for layer in lora_layers(model).values():
            own = layer.settings["default"]
            patterns = says.get("rank_pattern") or says.get("alpha_pattern")
            same = (own.r, own.alpha) == (says["r"], says["lora_alpha"])
            expect(bool(patterns) or same, f"{own} of {says}")
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                expect(bool(factor.isfinite().all()), "a factor that is not finite")

    def read_safetensors(self, rng: random.Random) -> None:
        """Tensors; their bytes have to be those at the offsets of the file's header."""
        import torch

        from fastlora.tensors import read_tensors

        path = self.out / "adapter" / "heads.safetensors"
        content = self.damaged(path, rng)
        tensors, _ = read_tensors(path)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        for name, tensor in tensors.items():
            start, stop = header[name]["data_offsets"]
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            expect(raw == content[8 + size + start : 8 + size + stop], f"tensor {name}")

    def read_checkpoint(self, rng: random.Random) -> None:
        """The newest checkpoint; an older one is used, or what its state says is checked."""
        import torch

        from fastlora.training.checkpoint import MANIFEST, _digests, latest_checkpoint
        from fastlora.training.checkpoint import load_checkpoint as load

        folder = self.out / "checkpoints"
        whole = max(folder.glob("step-*"))
        self.kept |= {path: path.read_bytes() for path in whole.iterdir() if path not in self.kept}
        name = rng.choice(("state.json", "model.safetensors", "optim.safetensors", MANIFEST))
        self.damaged(whole / name, rng)
        if rng.random() < 0.5:
            used = latest_checkpoint(folder)
            same = all(path.read_bytes() == self.kept[path] for path in whole.iterdir())
            says = json.loads(self.kept[whole / MANIFEST])
            alike = name == MANIFEST and _json_or_none(whole / MANIFEST) == says
            expect(used != whole or same or alike, "a damaged checkpoint was used")
            return
        if name != MANIFEST:  # damage from before the manifest was written
            (whole / MANIFEST).write_text(json.dumps(_digests(whole)))
        expect(latest_checkpoint(folder) is not None, "none was found")
        model, optimizer = self._trainer()
        load(whole, model, optimizer, torch.amp.GradScaler("cpu", enabled=False), self.inputs)

    def _trainer(self) -> tuple:
        from fastlora.files import read_json
        from fastlora.training.config import TrainConfig
        from fastlora.training.inputs import find_inputs
        from fastlora.training.optimizer import make_optimizer
        from fastlora.training.setup import build_model, prepare

        if not hasattr(self, "trainer"):
            shared = {"model": str(self.model), "data": self.data, "device": "cpu"}
            config = TrainConfig(**shared, tasks=("sst", "sts"))
            setup = prepare(config, find_inputs(config))
            model = build_model(setup, setup.inputs.tasks, setup.config)[0]
            self.trainer = model, make_optimizer(model, config)
            self.inputs = read_json(self.out / "inputs.json")
        return self.trainer

    def read_cache(self, rng: random.Random) -> None:
        """The token cache, whose damaged files are made anew."""
        import numpy as np

        self.damaged(self.cache, rng)
        found = self.load()
        for mine, whole in zip(found.columns, self.cached.columns, strict=True):
            same = np.array_equal(mine.ids, whole.ids) and np.array_equal(mine.types, whole.types)
            expect(same and np.array_equal(mine.offsets, whole.offsets), "other tokens")
        expect(found.ids == self.cached.ids, "other ids")
        expect(np.array_equal(found.labels, self.cached.labels), "other labels")

    def read_tokenizer(self, rng: random.Random) -> None:
        """A model's folder, with its configuration and vocabulary or tokenizer.json."""
        from fastlora.data.tokenizer import Tokenizer

        files = [self.model / "config.json"]
        if rng.random() < 0.7:
            path = self.model / "tokenizer.json"
            if path not in self.kept:
                self.tokenizer._backend.save(str(path))
            files = [path]
        self.damaged(files[0], rng)
        try:
            tokenizer = Tokenizer.from_folder(self.model)
            ids = tokenizer.encode(["the good film", "", "x" * 99]).ids
            expect(bool(((ids >= 0) & (ids < 24)).all()), f"ids {ids} of 24")
        finally:
            (self.model / "tokenizer.json").unlink(missing_ok=True)
            self.kept[files[0]] = self.kept[files[0]]

    def read_encoder(self, rng: random.Random) -> None:
        """A model's configuration and weights, as the encoder they are built to."""
        from fastlora.bert.weights import load_encoder

        self.damaged(self.model / rng.choice(("config.json", "model.safetensors")), rng)
        model, _ = load_encoder(self.model)
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        expect(finite, "weights that are not finite")

    def read_metrics(self, rng: random.Random) -> None:
        """The log of a run, of which the lines that can be read are kept."""
        from fastlora.training import metrics_log

        path = self.folder / "log" / "metrics.jsonl"
        path.parent.mkdir(exist_ok=True)
        values = {"epoch": 0, "lr": 0.1, "loss": {"sst": 1.5}}
        lines = [json.dumps({"step": step, **values}).encode() for step in range(1, 7)]
        place = rng.randrange(6)
        lines[place] = (mutate_json if rng.random() < 0.5 else mutate)(rng, lines[place])
        path.write_bytes(b"\n".join(lines) + b"\n")
        metrics_log.Metrics(path.parent, 4).close()
        kept = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        expect(all(entry["step"] <= 4 for entry in kept), "lines of later steps were kept")
        wanted = [{"step": step, **values} for step in range(1, 5) if step != place + 1]
        expect(all(entry in kept for entry in wanted), "whole lines were lost")


NAMES = tuple(name.removeprefix("read_") for name in vars(Readers) if name.startswith("read_"))


def _json_or_none(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        return None


def verdict_of(read: Reader, rng: random.Random) -> tuple[str, str]:
    """How a reader ends on one input: the verdict, and what it said."""
    from fastlora.errors import RunError, UserError

    try:
        with time_limit(60):
            read(rng)
        return "right", ""
    except (UserError, RunError) as error:
        return (REFUSED if len(str(error).splitlines()) == 1 else "wrong"), str(error)
    except KeyboardInterrupt:
        raise
    except (BaseException, TimeUp) as error:  # the tokenizers' Rust panics are BaseExceptions
        return "wrong", f"{type(error).__name__}: {error}"


def main() -> int:
    """Read the inputs that the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="inputs, over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one input by its seed, such as cache-17")
    given = parser.parse_args()
    preload()
    warnings.simplefilter("ignore")
    csv.field_size_limit(1 << 20)
    with TemporaryDirectory() as folder:
        readers, tally = Readers(Path(folder)).all(), Tally("fuzz")
        tallies = {name: Tally(f"  {name}") for name in readers}
        seeds = (
            [given.only]
            if given.only
            else [
                f"{NAMES[i % len(NAMES)]}-{given.seed + i // len(NAMES)}"
                for i in range(given.count)
            ]
        )
        for seed in seeds:
            name = seed.partition("-")[0]
            noise, sys.stderr = sys.stderr, io.StringIO()  # Rust prints its panics' messages itself
            verdict, said = verdict_of(readers[name], random.Random(seed))
            sys.stderr = noise
            readers[name].__self__.restore()
            tallies[name].counts[verdict] += 1
            tally.add(verdict, f"seed {seed}: {said:.300}")
            if given.only:
                print(f"{verdict}: {said}")
        for each in tallies.values():
            each.finish()
        return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
