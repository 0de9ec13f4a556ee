"""One training run from configuration to adapter on disk: what `fastlora-train` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote

import torch
from torch import nn

from fastlora.bert.weights import save_encoder
from fastlora.console import Log
from fastlora.data.tasks import Task
from fastlora.errors import Interrupted, UserError
from fastlora.files import atomic_folder, atomic_open, read_json
from fastlora.lora.files import read_config
from fastlora.lora.model import parameter_report
from fastlora.multitask import files as adapters
from fastlora.multitask.files import BaseInfo
from fastlora.multitask.model import MultitaskBert
from fastlora.multitask.predictor import predict, score_table, write_predictions
from fastlora.runs.folder import default_folder, describe_gpu, fingerprints, open_run, owned
from fastlora.runs.report import write_report
from fastlora.training.checkpoint import check_finite, trainable
from fastlora.training.config import TaskLoraConfig, TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.inputs import Inputs, adapter_folder, find_inputs
from fastlora.training.loop import Result, Trainer, owner
from fastlora.training.setup import Setup, build_model, find_route, prepare, to_compute, training
from fastlora.training.stopping import Stop

ENCODER = "encoder"


def run_training(
    config: TrainConfig,
    inputs: Inputs | None = None,
    *,
    quiet: bool = False,
    dry_run: bool = False,
    stop: Stop | None = None,
) -> Result | None:
    """Run a configuration, continuing an unfinished run in `config.out`; returns how it ended.

    With `dry_run`, builds everything, prints what would run, writes nothing and returns None.
    Signals, malloc and random states are left alone; the command's settings are in host.py.

    Raises:
        UserError: before training, for a wrong configuration or wrong data.
        RunError: when the run cannot go on.
        Interrupted: when `stop` asked for it, with the state saved, the resume command printed.
    """
    setup = replace(prepare(config, inputs or find_inputs(config)), stop=stop or Stop())
    return run_prepared(setup, quiet=quiet, dry_run=dry_run)


def run_prepared(
    setup: Setup, *, quiet: bool = False, brief: bool = False, dry_run: bool = False
) -> Result | None:
    """`run_training` with inputs that are read; `brief` shows the progress bar alone."""
    ranks = Ranks(setup.device)
    try:
        with training(setup):
            return _run(setup, ranks, Log(quiet, shown=ranks.first, brief=brief), dry_run)
    finally:
        ranks.close()


def _run(setup: Setup, ranks: Ranks, log: Log, dry_run: bool) -> Result | None:
    """Build the model, and train it in its folder."""
    folder, inputs = Path(setup.config.out or default_folder(setup.config)), setup.inputs
    config, old = _add_to(setup.config, inputs.tasks)
    tasks = {**old, **inputs.tasks}
    model, base_sha, notes = build_model(setup, tasks, config)
    base = BaseInfo(inputs.source.name, base_sha, setup.tokenizer.fingerprint)
    if config.add_to:
        _keep(model, adapter_folder(config.add_to), old, base)
    if dry_run:
        _banner(setup, model, folder, notes, ranks, log)
        return None
    setup = replace(setup, fingerprints=fingerprints(setup, base_sha, model.encoder.config))
    with owned(folder) if ranks.first else nullcontext():
        if ranks.first:
            open_run(folder, setup.config, setup.fingerprints)
        ranks.barrier()
        if (folder / "adapter" / "README.md").is_file():  # the last file that a run writes
            return _report_finished(folder, log)
        if ranks.first:
            log.file = folder / "train.log"
        _banner(setup, model, folder, notes, ranks, log)
        result = _train(setup, model, folder, base, ranks, log)
        ranks.barrier()
    if log.brief and setup.stop.asked:
        raise Interrupted  # too late to stop this run, but others were to follow
    return result


def _train(
    setup: Setup, model: MultitaskBert, folder: Path, base: BaseInfo, ranks: Ranks, log: Log
) -> Result:
    """Train from the start or the newest checkpoint to the end; write what the run leaves."""
    to_compute(model, setup.config, setup.device)
    trainer = Trainer(setup, model, folder, ranks, log)
    if trainer.resume():
        log.line(f"continuing after step {trainer.progress.step}")
    try:
        result = trainer.run()
    except Interrupted:
        log.line(f"stopped after step {trainer.progress.step}, saved; go on with:")
        log.line(f"  fastlora-train --resume {quote(str(folder))}")
        raise
    if ranks.first:
        _finish(trainer, result, folder, base)
    return result


def _report_finished(folder: Path, log: Log) -> Result:
    """Say how a finished run ended; its files stay as they are."""
    record = read_json(folder / "result.json")
    log.line(f"{folder}: this run is finished; its scores are:")
    log.table(*record["table"])
    return Result(**{field.name: record[field.name] for field in fields(Result)})


def _add_to(config: TrainConfig, new: Mapping[str, Task]) -> tuple[TrainConfig, dict[str, Task]]:
    """The tasks of the run of --add-to, and the configuration with their adapters' settings.

    Raises UserError when that run has no adapters per task, or has a new task already.
    """
    if config.add_to is None:
        return config, {}
    folder = adapter_folder(config.add_to)
    old, theirs = adapters.read_heads(folder)
    for key, ours in (("mode", "lora"), ("adapters", "per-task"), ("pairs", config.pairs)):
        if theirs[key] != ours:
            raise UserError(f"{config.add_to}: trained with {key} {theirs[key]!r}, not {ours!r}")
    if again := old.keys() & new:
        raise UserError(f"{config.add_to}: has task {min(again)!r}; name new ones with --tasks")
    for name in old:
        settings = read_config(adapters.adapter_place(folder, name))
        config = config.with_task_settings(name, TaskLoraConfig.of(settings))
    return config, old


def _keep(model: MultitaskBert, folder: Path, old: dict[str, Task], base: BaseInfo) -> None:
    """Load a finished run's adapters and heads into the model, and freeze them."""
    heads = nn.ModuleDict({name: model.heads[name] for name in old})
    adapters.load_all(folder, model.encoder, old, heads, base)
    for name, parameter in model.named_parameters():
        if owner(name) in old:
            parameter.requires_grad_(False)


def _banner(
    setup: Setup, model: MultitaskBert, folder: Path, notes: list[str], ranks: Ranks, log: Log
) -> None:
    report = parameter_report(model)
    training = report["lora"] + report["other trainable"]
    share = 100 * training / (training + report["frozen"])
    parts = f"LoRA {report['lora']:,}, heads and others {report['other trainable']:,}"
    trainable = f"{share:.2f}%: {parts}; frozen {report['frozen']:,}"
    device, *others = facts_of(setup, ranks)
    log.facts([device, ("trainable", trainable), *others, ("run", str(folder))])
    for note in notes:
        log.line(f"note       {note}")


def facts_of(setup: Setup, ranks: Ranks) -> list[tuple[str, str]]:
    """What a run computes on and with, and why, as the banner's lines."""
    inputs, device = setup.inputs, setup.device
    name, why = find_route(device, setup.dtype)
    hardware = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = describe_gpu(device.index or 0)
    if ranks.world > 1:
        hardware += f", {ranks.world} processes"
    examples = []
    for task, data in setup.train.items():
        dev = setup.dev[task]
        line = f"{task} {len(data):,} train, {len(dev):,} dev"
        for what in ("dropped", "truncated", "empty"):
            line += f", {getattr(data, what) + getattr(dev, what)} {what}"
        examples.append(line)
    return [
        ("device", f"{hardware}, {setup.config.precision}, kernels: {name} ({why})"),
        ("model", f"{inputs.model} ({inputs.why_model}) from {inputs.source.folder}"),
        ("data", f"{inputs.folder} ({inputs.why_data})"),
        ("examples", "; ".join(examples)),
    ]


def _finish(trainer: Trainer, result: Result, folder: Path, base: BaseInfo) -> None:
    """Write adapter, heads, predictions, scores and the report; print the table."""
    setup, model, log = trainer.setup, trainer.model, trainer.log
    save_trained(setup, model, folder / "adapter", base, result.steps)
    # A run that was stopped after its last step has evaluated nothing yet.
    outputs = trainer.outputs or predict(model, setup.dev, trainer.dev_features)
    for name, data in setup.dev.items():
        write_predictions(folder / "predictions" / f"{name}-dev.csv", data, outputs[name])
    shown = score_table(setup.dev, outputs, "dev")
    facts = {"history": trainer.progress.scores, "parameters": parameter_report(model)}
    with atomic_open(folder / "result.json") as file:
        json.dump({**facts, "table": shown, **vars(result)}, file, indent=1)
    write_report(folder)
    log.table(*shown)
    speed = result.examples / max(result.seconds, 1e-9)
    log.line(
        f"{result.steps} steps, {result.examples:,} examples in {result.seconds:.0f} s of training "
        f"({speed:.0f} examples/s); adapter and heads in {folder / 'adapter'}, report in "
        f"{folder / 'report.html'}"
    )


def save_trained(
    setup: Setup, model: MultitaskBert, folder: str | Path, base: BaseInfo, step: int
) -> None:
    """Write what was trained: heads, and the adapter, one sub-folder a task, or the encoder.

    Raises RunError, and writes nothing, for a value that is not finite.
    """
    config = setup.config
    check_finite(trainable(model), step)
    settings = {key: getattr(config, key) for key in ("mode", "adapters", "pairs", "model")}
    with atomic_folder(Path(folder)) as building:
        if config.mode == "full":
            save_encoder(model.encoder, building / ENCODER)
            setup.inputs.source.copy_tokenizer(building / ENCODER)
            base = replace(base, encoder_sha256=adapters.fingerprint(model.encoder))
        elif config.mode == "lora":
            for name in model.settings:
                place = adapters.adapter_place(building, name)
                adapters.save_adapter(place, model.encoder, name, base)
        adapters.save_heads(building, model.heads, model.tasks, base, settings)
