"""The commands: `fastlora-train`, and `fastlora train | eval | predict | merge | reproduce | ...`.

torch is imported inside the commands, so that --help and mistakes are answered at once.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter

from fastlora.cli.process import command_stop
from fastlora.errors import UserError
from fastlora.files import atomic_open, read_toml
from fastlora.studies.paper_tables import TABLES
from fastlora.training.config import Precision, SearchConfig, TrainConfig
from fastlora.training.inputs import adapter_folder, find_data, find_inputs

_output = Group("Output", sort_key=5)
Settings = Annotated[TrainConfig, Parameter(name="*")]
ConfigFile = Annotated[
    Path | None, Parameter(group=_output, help="TOML file of these options; flags given here win.")
]
Quiet = Annotated[bool, Parameter(group=_output, negative="", help="Print nothing but errors.")]
RunFolder = Annotated[Path, Parameter(help="Run folder, or an adapter folder with heads.")]
Data = Annotated[
    Path | None, Parameter(help="Folder of the task files; by default ./data, else the demo.")
]
BadRows = Annotated[Literal["error", "skip"], Parameter(help="What a malformed row does.")]
Quoting = Annotated[
    Literal["minimal", "none"],
    Parameter(help="Quotes in CSV and TSV files: around a field, or none: plain characters."),
]
Device = Annotated[str, Parameter(help="auto, cpu, cuda or cuda:N.")]
Encoder = Annotated[
    str | None, Parameter(help="Folder or name of the encoder, if it moved since training.")
]
TRAIN_HELP = """Train LoRA adapters and task heads on a BERT-sized encoder.

    fastlora-train --r 32
    fastlora-train --r 32 --data data/ --model bert-base-uncased --epochs 3
    fastlora-train --adapters per-task --sst.r 2 --sts.r 32 --data data/
"""
REPRODUCE_HELP = """Run the paper's tables and set our scores beside the paper's.

table1: frozen encoder, full fine-tuning. table2: one LoRA adapter for all tasks. table3 to table5:
an adapter for SST, Quora, STS alone. The same command goes on where it was stopped.

    fastlora reproduce table2 --data data/ --model minilm --limit 2000
    fastlora reproduce all --data data/ --seeds 3 --out studies/full
"""

SEARCH_HELP = """Search LoRA settings at a fraction of the cost of full runs.

    fastlora search --tasks sts --data data/ --budget 30m
    fastlora search --adapters per-task --data data/ --out searches/mine
    fastlora search --adapters per-task --data data/ --out searches/mine --join

Trial 0 has the settings given here; then learning rate and warmup, every rank from one run, dropout
and targets, and in the end the best against trial 0 over three seeds. The same command goes on
where it was interrupted; best.toml in its folder is for fastlora-train --config.
"""

app = App(
    name="fastlora", help="Fused LoRA training for BERT-sized encoders.", help_format="plaintext"
)


@app.command(help=TRAIN_HELP)
def train(
    *,
    settings: Settings = TrainConfig(),  # noqa: B008
    config: ConfigFile = None,
    resume: Annotated[
        Path | None, Parameter(group=_output, help="Run folder to continue, as it was started.")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(group=_output, negative="", help="Print what would run, then stop.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train; see TRAIN_HELP."""
    if resume is not None:
        settings, config = replace(settings, out=resume), resume / "run.toml"
    settings = _with_tasks(settings, config)
    inputs = find_inputs(settings)
    from fastlora.runs.session import run_training

    run_training(settings, inputs, quiet=quiet, dry_run=dry_run, stop=command_stop())


@app.command(help=SEARCH_HELP)
def search(
    *,
    settings: Settings = TrainConfig(),  # noqa: B008
    how: Annotated[SearchConfig, Parameter(name="*")] = SearchConfig(),  # noqa: B008
    config: ConfigFile = None,
    quiet: Quiet = False,
) -> None:
    """Search; see SEARCH_HELP."""
    _check_alone("search")
    settings = _with_tasks(settings, config)
    inputs = find_inputs(settings)
    try:
        from fastlora.studies.search import run_search
    except ModuleNotFoundError as error:
        raise UserError(f'no {error.name}: pip install "fastlora-bert[search]"') from None

    run_search(settings, inputs, how, quiet=quiet, stop=command_stop())


@app.command(name="eval")
def evaluate(
    run: RunFolder,
    *,
    data: Data = None,
    split: Annotated[Literal["train", "dev", "test"], Parameter(help="Which files.")] = "dev",
    bad_rows: BadRows = "error",
    quoting: Quoting = "minimal",
    device: Device = "auto",
    model: Encoder = None,
) -> None:
    """Score a finished run on labelled data."""
    if data is not None:
        find_data(data, ())  # a mistake is answered at once
    adapter_folder(run)
    from fastlora.console import Log
    from fastlora.data.token_cache import load_tasks
    from fastlora.multitask.predictor import predict, score_table
    from fastlora.runs.trained import load_trained

    trained = load_trained(run, device, model)
    tasks, pairs = trained.tasks.values(), trained.extra["pairs"]
    folder, why = find_data(data, tasks)
    tokenizer = trained.tokenizer
    datasets = load_tasks(
        folder, tasks, split, tokenizer, pairs=pairs, quoting=quoting, bad_rows=bad_rows
    )
    log = Log(quiet=False)
    log.line(f"{run} on {folder} ({why})")
    log.table(*score_table(datasets, predict(trained.model, datasets), split))


@app.command(name="predict")
def predict_file(
    run: RunFolder,
    input: Annotated[Path, Parameter(help="CSV, TSV or JSONL with the task's text columns.")],
    *,
    task: Annotated[
        str | None, Parameter(help="The rows' task; else the only one, or their column `task`.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="File to write; by default NAME.predictions.csv beside it.")
    ] = None,
    quoting: Quoting = "minimal",
    device: Device = "auto",
    model: Encoder = None,
) -> None:
    """Predict the labels of a file's rows; labels in the file are not needed."""
    if not input.is_file():
        raise UserError(f"{input}: no such file")
    adapter_folder(run)
    from fastlora.multitask.predictor import write_rows
    from fastlora.runs.trained import load_trained, predict_rows

    trained = load_trained(run, device, model)
    if task is None and len(trained.tasks) == 1:
        task = next(iter(trained.tasks))
    if task is not None and task not in trained.tasks:
        raise UserError(f"--task is {task!r} (expected one of {', '.join(trained.tasks)})")
    rows, truncated = predict_rows(trained, input, task, quoting)
    out = out or input.with_name(f"{input.stem}.predictions.csv")
    write_rows(out, ["id", "task", "prediction"], rows)
    print(f"{len(rows):,} predictions in {out} ({truncated} texts truncated)")


@app.command
def merge(
    run: RunFolder,
    out: Annotated[Path, Parameter(help="Folder to write; must not exist, or be empty.")],
    *,
    task: Annotated[
        str | None, Parameter(help="Whose adapter, for a run with one adapter a task.")
    ] = None,
    model: Encoder = None,
) -> None:
    """Fold a run's adapter into its encoder and write a Hugging Face folder."""
    adapter_folder(run)
    from fastlora.runs.trained import load_trained, merge_encoder

    difference = merge_encoder(load_trained(run, "cpu", model), task, out)
    print(f"merged encoder in {out}; max |difference of logits| {difference:.2e}")


@app.command(help=REPRODUCE_HELP)
def reproduce(
    tables: Annotated[
        tuple[Literal["table1", "table2", "table3", "table4", "table5", "all"], ...],
        Parameter(help="Which tables, separated by spaces.", negative=""),
    ],
    /,
    *,
    data: Data = None,
    model: Annotated[
        str | None, Parameter(help="Folder, hub id, or minilm; as for fastlora-train.")
    ] = None,
    limit: Annotated[
        int | None, Parameter(help="Use at most this many examples of each task's files.")
    ] = None,
    bad_rows: BadRows = "error",
    epochs: Annotated[int, Parameter(help="Passes over the training examples.")] = 1,
    seeds: Annotated[int, Parameter(help="Runs a row, with seeds 0, 1, ...")] = 1,
    out: Annotated[Path, Parameter(help="Folder of the runs and the tables.")] = Path("studies"),
    tokens_per_batch: Annotated[int, Parameter(help="Real tokens of a step, 1 or more.")] = 1024,
    precision: Annotated[Precision, Parameter(help="Compute type.")] = "auto",
    device: Device = "auto",
    quiet: Annotated[bool, Parameter(negative="", help="Print nothing but errors.")] = False,
) -> None:
    """Run the paper's tables; see REPRODUCE_HELP."""
    if seeds < 1:
        raise UserError(f"seeds is {seeds} (expected 1 or more)")
    _check_alone("reproduce")
    names = tuple(TABLES) if "all" in tables else tuple(dict.fromkeys(tables))
    settings = TrainConfig(
        tasks=tuple(dict.fromkeys(task for name in names for task in TABLES[name].tasks)),
        data=data,
        model=model,
        limit=limit,
        bad_rows=bad_rows,
        epochs=epochs,
        tokens_per_batch=tokens_per_batch,
        precision=precision,
        device=device,
    )
    inputs = find_inputs(settings)
    from fastlora.studies.grid import reproduce as run

    run(names, settings, inputs, seeds, out, quiet, command_stop())


@app.command
def doctor() -> None:
    """Say what this machine is and which kernels fastlora uses on it."""
    from fastlora.console import Log
    from fastlora.runs.folder import environment
    from fastlora.training.setup import compute_of, find_route, use_measured_blocks

    facts = environment()
    gpus = facts.pop("gpus") or ["none: training runs on the CPU"]
    use_measured_blocks()
    name, why = find_route(*compute_of("auto", "auto"))
    pairs = [(key, str(value)) for key, value in facts.items()]
    pairs += [("gpu", gpu) for gpu in gpus] + [("kernels", f"{name} ({why})")]
    Log(quiet=False).facts(pairs)


@app.command
def tune(
    *,
    device: Device = "auto",
    precision: Annotated[Precision, Parameter(help="Type of the data to tune for.")] = "auto",
) -> None:
    """Measure the kernels' block sizes on this GPU and keep the fastest for later runs."""
    from fastlora.training.setup import compute_of, tuned_file, use_measured_blocks

    where, dtype = compute_of(device, precision)
    if where.type != "cuda":
        raise UserError(f"device is {where}: only a CUDA GPU has block sizes to tune")
    from fastlora.kernels.triton import tuning
    from fastlora.training import tuner

    use_measured_blocks()  # of other types and GPUs: they stay
    tuner.tune(where, dtype, print)
    with atomic_open(tuned_file()) as file:
        file.write(tuner.dumps(tuning.MEASURED))
    print(f"measured block sizes in {tuned_file()}; runs on this machine use them")


def _check_alone(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{command} runs in one process; start it without torchrun")


def _with_tasks(settings: TrainConfig, config: Path | None) -> TrainConfig:
    """With the user's own tasks; the file's other keys became flags before (cli.py)."""
    own = read_toml(config).get("task", {}) if config else {}
    if not (isinstance(own, dict) and all(isinstance(table, dict) for table in own.values())):
        raise UserError(f"{config}: task is {own!r} (expected tables [task.NAME])")
    return replace(settings, task=own)
