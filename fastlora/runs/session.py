"""One training run, from a configuration to the files in its folder: `fastlora-train`."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from fastlora.bert.weights import save_encoder
from fastlora.console import Log
from fastlora.data.tasks import BUILTIN, Task
from fastlora.devices import usual_modes
from fastlora.errors import Interrupted, UserError
from fastlora.files import atomic_folder, read_sealed, read_toml, write_sealed
from fastlora.lora.files import read_config
from fastlora.lora.model import parameter_report
from fastlora.multitask import files as adapters
from fastlora.multitask import predictor
from fastlora.multitask.files import BaseInfo
from fastlora.multitask.metrics import metrics
from fastlora.multitask.model import MultitaskBert
from fastlora.runs import folder as folders
from fastlora.runs.report import throughput, trained_share, write_report
from fastlora.training.checkpoint import check_finite, trainable
from fastlora.training.config import TaskLoraConfig, TrainConfig
from fastlora.training.distributed import World
from fastlora.training.inputs import Inputs, adapter_folder, find_inputs
from fastlora.training.loop import Result, Trainer, owner
from fastlora.training.setup import Setup, build_model, find_route, prepare, to_compute, training
from fastlora.training.stopping import Stop

ENCODER = "encoder"
WRITTEN = {"lora": "adapter and heads", "frozen": "heads", "full": "encoder and heads"}


@usual_modes()
def run_training(
    config: TrainConfig,
    inputs: Inputs | None = None,
    *,
    quiet: bool = False,
    dry_run: bool = False,
    stop: Stop | None = None,
) -> Result | None:
    """Train a configuration, or continue the unfinished run in `config.out`; returns its result.

    With `dry_run`, builds the model, prints what would be trained, writes nothing and returns None.
    The process's signal handlers, memory settings and random state are left as they are.

    Raises:
        UserError: before training, if the configuration or the data are wrong.
        RunError: if the run cannot continue.
        Interrupted: if `stop` asked for it; the state is saved, and the command that continues the
            run is printed.
    """
    setup = replace(prepare(config, inputs or find_inputs(config)), stop=stop or Stop())
    return run_prepared(setup, quiet=quiet, dry_run=dry_run)


def run_prepared(
    setup: Setup, *, quiet: bool = False, brief: bool = False, dry_run: bool = False
) -> Result | None:
    """As `run_training`, from a prepared setup; with `brief`, only the progress bar is shown."""
    world = World(setup.device)
    log = Log(quiet or not world.first, brief)
    folder = Path(setup.config.out or folders.default_folder(setup.config))
    with closing(world), training(setup):
        model, base, notes = _build(setup)
        counts = parameter_report(model)
        parts = f"LoRA {counts['lora']:,}, heads and others {counts['other trainable']:,}"
        share = f"{trained_share(counts)[1]:.2f}%: {parts}; frozen {counts['frozen']:,}"
        device, *others = run_description(setup, world)
        banner, remarks = [device, ("trainable", share), *others], [("note", n) for n in notes]
        if dry_run:
            place = setup.config.out or "a new folder in runs/"
            log.fields([*banner, ("run", f"{place} (dry run: nothing is written)"), *remarks])
            return None
        hashes = folders.fingerprints(setup, base.encoder_sha256, base.encoder_config_sha256)
        setup = replace(setup, fingerprints=hashes)
        with folders.open_run(folder, setup.config, hashes) if world.first else nullcontext():
            world.barrier()
            if is_finished(folder):
                return _report_finished(folder, setup.config.keep, log)
            if world.first:
                log.file = folder / "train.log"
                # Some settings may change in a continued run.
                folders.write_config(folder / folders.SETTINGS, setup.config)
            log.fields([*banner, ("run", str(folder)), *remarks])
            to_compute(model, setup.config, setup.device)
            result = _train(Trainer(setup, model, folder, world, log), folder, base)
            world.barrier()
    if brief and setup.stop.asked:
        raise Interrupted  # this run is complete, but the study's next runs must not start
    return result


def _train(trainer: Trainer, folder: Path, base: BaseInfo) -> Result:
    """Train from the start, or from the newest checkpoint, and write the results."""
    log = trainer.log
    if trainer.resume():
        log.line(f"continuing after step {trainer.progress.step}")
    try:
        result = trainer.run()
    except Interrupted:
        log.line(f"stopped after step {trainer.progress.step}, saved; continue with:")
        log.line(f"  fastlora-train --resume {quote(str(folder))}")
        raise
    if trainer.world.first:
        _finish(trainer, result, folder, base)
    return result


def is_finished(folder: Path) -> bool:
    """Whether a run is finished: its folder has the file that is written last."""
    return (folder / "adapter" / "README.md").is_file()


def _report_finished(folder: Path, keep: str, log: Log) -> Result:
    """Print the scores of a finished run, and return its result; UserError for another `keep`."""
    if (kept := read_toml(folder / folders.SETTINGS).get("keep", keep)) != keep:
        raise UserError(f"{folder}: this run is finished, with keep {kept!r}; use a new --out")
    record = read_result(folder)
    log.line(f"{folder}: this run is finished; its scores are:")
    log.table(*record["table"])
    return Result(**{field.name: record[field.name] for field in fields(Result)})


def read_result(folder: Path) -> dict[str, Any]:
    """The content of result.json in the folder of a finished run; UserError if it is damaged."""
    if not is_finished(folder):
        raise UserError(f"{folder}: holds no finished run (expected the folder of one)")
    return read_sealed(folder / "result.json")


def _build(setup: Setup) -> tuple[MultitaskBert, BaseInfo, list[str]]:
    """The model, with the frozen adapters and heads of the run of --add-to if there is one.

    Also returns the identity of its encoder and tokenizer, and notes on the encoder's checkpoint.
    Raises UserError if that run has no adapters per task, or already has one of the new tasks.
    """
    config, new, source = setup.config, setup.inputs.tasks, setup.inputs.source
    earlier: dict[str, Task] = {}
    if config.add_to:
        folder = adapter_folder(config.add_to)
        earlier, settings = adapters.read_heads(folder)
        for key, value in (("mode", "lora"), ("adapters", "per-task"), ("pairs", config.pairs)):
            if settings[key] != value:
                mismatch = f"trained with {key} {settings[key]!r}, not {value!r}"
                raise UserError(f"{config.add_to}: {mismatch}")
        if again := earlier.keys() & new:
            raise UserError(f"{config.add_to}: has task {min(again)!r}; name new ones with --tasks")
        for name in earlier:
            adapter = read_config(adapters.adapter_place(folder, name))
            config = config.with_task_settings(name, TaskLoraConfig.of(adapter))
    model, encoder_sha256, notes = build_model(setup, {**earlier, **new}, config)
    config_sha256 = adapters.config_fingerprint(model.encoder.config)
    base = BaseInfo(source.name, encoder_sha256, config_sha256, setup.tokenizer.fingerprint)
    if earlier:
        adapters.load_all(folder, model, earlier, base)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and owner(name) not in earlier)
    return model, base, notes


def run_description(setup: Setup, world: World) -> list[tuple[str, str]]:
    """A run's device, model, data and numbers of examples, as the banner's (name, text)."""
    inputs, device = setup.inputs, setup.device
    kernels, reason = find_route(device, setup.config.precision)
    hardware = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = folders.describe_gpu(device.index or 0)
    if world.size > 1:
        hardware += f", {world.size} processes"
    examples = []
    for task, train in setup.train.items():
        dev = setup.dev[task]
        line = f"{task} {len(train):,} train, {len(dev):,} dev"
        for kind in ("skipped", "truncated", "empty"):
            line += f", {getattr(train, kind) + getattr(dev, kind)} {kind}"
        examples.append(line)
    return [
        ("device", f"{hardware}, {setup.config.precision}, kernels: {kernels} ({reason})"),
        ("model", f"{inputs.model} ({inputs.why_model}) from {inputs.source.folder}"),
        ("data", f"{inputs.folder} ({inputs.why_data})"),
        *(("task", task.description) for name, task in inputs.tasks.items() if name not in BUILTIN),
        ("examples", "; ".join(examples)),
    ]


def _finish(trainer: Trainer, result: Result, folder: Path, base: BaseInfo) -> None:
    """Write the trained weights by the run's mode, and the predictions, scores and report.

    Raises RunError, and writes nothing, if a trained value is not finite.
    """
    setup, model, log = trainer.setup, trainer.model, trainer.log
    config, source = setup.config, setup.inputs.source
    check_finite(trainable(model), result.steps)
    settings = {key: getattr(config, key) for key in ("mode", "adapters", "pairs", "model")}
    with atomic_folder(folder / "adapter") as building:
        if config.mode == "full":
            save_encoder(model.encoder, building / ENCODER)
            source.copy_tokenizer(building / ENCODER)
            base = replace(base, encoder_sha256=adapters.fingerprint(model.encoder))
        adapters.save_all(building, model, base, settings)
    # A run that was stopped after its last step, and then continued, has predicted nothing yet.
    outputs = trainer.outputs or predictor.predict(model, setup.dev, trainer.dev_features)
    for name, data in setup.dev.items():
        predictor.write_predictions(folder / "predictions" / f"{name}-dev.csv", data, outputs[name])
    record: dict[str, Any] = {
        "history": trainer.progress.scores,
        "parameters": parameter_report(model),
        "table": predictor.score_table(model, setup.dev, outputs, "dev"),
        "metrics": {n: metrics(d.task, outputs[n], d.labels) for n, d in setup.dev.items()},
        **vars(result),
    }
    write_sealed(folder / "result.json", record)
    write_report(folder, setup, model.settings, outputs, record)
    for table in (record["table"], *predictor.class_tables(setup.dev, outputs)):
        log.table(*table)
    where = f"{folder / 'adapter'}, report in {folder / 'report.html'}"
    log.line(f"{throughput(record)}; {WRITTEN[config.mode]} in {where}")
