"""The commands: `fastlora-train`, and `fastlora train | eval | predict | merge | reproduce | ...`.

torch is imported inside the commands, so that --help and mistakes are answered at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from fastlora.cli.options import (
    OUTPUT,
    ComputeFlags,
    EvalFlags,
    FileFlags,
    PredictFlags,
    SearchFlags,
    TableFlags,
    TrainFlags,
    given,
    number,
    settings_from,
)
from fastlora.cli.process import command_stop
from fastlora.data.infer import FileTask
from fastlora.errors import UserError
from fastlora.files import check_replaceable
from fastlora.studies.paper_tables import TABLES
from fastlora.training.config import SearchConfig
from fastlora.training.inputs import (
    adapter_folder,
    find_data,
    find_inputs,
    rank_and_world,
    with_file,
)

_FLAT = Parameter(name="*")
ConfigFile = Annotated[
    Path | None,
    Parameter(group=OUTPUT, help="TOML file of a run's settings; flags given here win."),
]
Quiet = Annotated[bool, Parameter(group=OUTPUT, negative="", help="Print nothing but errors.")]
RunFolder = Annotated[Path, Parameter(help="Run folder, or an adapter folder with heads.")]
Encoder = Annotated[
    str | None, Parameter(help="Folder or name of the encoder, if it moved since training.")
]

app = App(
    name="fastlora",
    help="Fused LoRA training for BERT-sized encoders.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


@app.command
def train(
    *files: Annotated[
        Path, Parameter(help="CSV, TSV or JSONL file to train on, with --text and --label.")
    ],
    own: Annotated[FileFlags, _FLAT] = FileFlags(),  # noqa: B008
    settings: Annotated[TrainFlags, _FLAT] = TrainFlags(),  # noqa: B008
    config: ConfigFile = None,
    resume: Annotated[
        Path | None, Parameter(group=OUTPUT, help="Run folder to continue, as it was started.")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(group=OUTPUT, negative="", help="Print what would run, then stop.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train LoRA adapters and task heads on a BERT-sized encoder.

    fastlora-train --r 32
    fastlora-train --r 32 --data data/ --model bert-base-uncased --epochs 3
    fastlora-train --adapters per-task --sst.r 2 --sts.r 32 --data data/
    fastlora-train tickets.csv --text subject,body --label queue
    """
    if len(files) > 1 or not all(file.is_file() for file in files):
        folder = files[0].is_dir() and f"{files[0]}: is a folder, which is given as --data"
        what = folder or f"{files[0]}: no such file" if len(files) == 1 else "expected one FILE"
        raise UserError(f"{what}; a list has commas, as in --tasks sst,quora,sts")
    if given(own) and not files:
        raise UserError(f"--{next(iter(given(own)))} needs a file: fastlora-train FILE.csv ...")
    if resume is not None:
        if config is not None or files or "out" in given(settings):
            raise UserError("--resume names a run folder; leave out FILE, --config and --out")
        settings, config = replace(settings, out=resume), resume / "run.toml"
    wanted, why = settings_from(settings, config), "as given"
    if files:
        wanted, why = with_file(wanted, files[0], FileTask(**given(own)))
    inputs = find_inputs(wanted, why, config)
    from fastlora.runs.session import run_training

    run_training(wanted, inputs, quiet=quiet, dry_run=dry_run, stop=command_stop())


@app.command
def search(
    *,
    settings: Annotated[TrainFlags, _FLAT] = TrainFlags(),  # noqa: B008
    limits: Annotated[SearchFlags, _FLAT] = SearchFlags(),  # noqa: B008
    config: ConfigFile = None,
    quiet: Quiet = False,
) -> None:
    """Search LoRA settings at a fraction of the cost of full runs.

    fastlora search --tasks sts --data data/ --budget 30m
    fastlora search --adapters per-task --data data/ --out searches/mine

    Trial 0 has the settings given here. Short runs then choose learning rate, warmup, dropout and
    targets; one longer run scores every rank. At the end the best settings are compared with trial
    0 over three seeds, on dev examples that no choice was made on. The same command continues an
    interrupted search. Train with the result: fastlora-train --config best.toml, from the search's
    folder.
    """
    _check_alone("search")
    how = SearchConfig(**given(limits))
    wanted = settings_from(settings, config)
    inputs = find_inputs(wanted, beside=config)
    try:
        from fastlora.studies.search import run_search
    except ModuleNotFoundError as error:
        raise UserError(f'no {error.name}: pip install "fastlora-bert[search]"') from None

    run_search(wanted, inputs, how, quiet, command_stop())


@app.command(name="eval")
def evaluate(
    run: RunFolder,
    *,
    settings: Annotated[EvalFlags, _FLAT] = EvalFlags(),  # noqa: B008
    split: Annotated[Literal["train", "dev", "test"], Parameter(help="Which files.")] = "dev",
    model: Encoder = None,
) -> None:
    """Score a finished run on labelled data; settings that are not given are the run's own."""
    file = adapter_folder(run).parent / "run.toml"
    how = settings_from(settings, file if file.is_file() else None)
    if how.data is not None:
        find_data(how.data, ())  # a mistake is answered at once
    from fastlora.console import Log
    from fastlora.data.token_cache import load_tasks
    from fastlora.multitask.predictor import class_tables, predict, score_table
    from fastlora.runs.trained import load_trained

    trained = load_trained(run, how.device, model)
    tasks = trained.tasks.values()
    folder, _ = find_data(how.data, tasks)
    rules = {"pairs": trained.settings["pairs"], "quoting": how.quoting, "bad_rows": how.bad_rows}
    datasets = load_tasks(folder, tasks, split, trained.tokenizer, **rules)
    log = Log(quiet=False)
    log.line(f"{run} on {folder}")
    outputs = predict(trained.model, datasets)
    tables = score_table(trained.model, datasets, outputs, split), *class_tables(datasets, outputs)
    for table in tables:
        log.table(*table)


@app.command(name="predict")
def predict_file(
    run: RunFolder,
    input: Annotated[Path, Parameter(help="CSV, TSV or JSONL with the task's text columns.")],
    *,
    task: Annotated[
        str | None, Parameter(help="The rows' task; else the only one, or their column `task`.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="File to write; by default INPUT.predictions.csv.")
    ] = None,
    settings: Annotated[PredictFlags, _FLAT] = PredictFlags(),  # noqa: B008
    model: Encoder = None,
) -> None:
    """Predict the labels of a file's rows; labels in the file are not needed."""
    if not (input.is_file() or input.is_fifo()):
        raise UserError(f"{input}: no such file")
    if input.is_fifo() and out is None:
        raise UserError(f"{input} is a pipe: --out has to name the file to write")
    out = out or input.with_name(f"{input.name}.predictions.csv")
    check_replaceable(out)
    if out.exists() and out.samefile(input):
        raise UserError(f"--out is {out}, the input itself (expected the name of a file to write)")
    adapter_folder(run)
    from fastlora.multitask.predictor import write_rows
    from fastlora.runs.trained import load_trained, predict_rows

    how = settings_from(settings, None)
    trained = load_trained(run, how.device, model)
    if task is None and len(trained.tasks) == 1:
        task = next(iter(trained.tasks))
    if task is not None and task not in trained.tasks:
        raise UserError(f"--task is {task!r} (expected one of {', '.join(trained.tasks)})")
    rows, truncated = predict_rows(trained, input, task, how.quoting)
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

    merge_encoder(load_trained(run, "cpu", model), task, out)
    print(f"merged encoder in {out}")


@app.command
def reproduce(
    tables: Annotated[
        tuple[Literal["table1", "table2", "table3", "table4", "table5", "all"], ...],
        Parameter(help="Which tables, separated by spaces.", negative=""),
    ],
    /,
    *,
    settings: Annotated[TableFlags, _FLAT] = TableFlags(),  # noqa: B008
    seeds: Annotated[int, Parameter(help="Runs a row, with seeds 0, 1, ...", converter=number)] = 1,
    out: Annotated[Path, Parameter(help="Folder of the runs and the tables.")] = Path("studies"),
    quiet: Quiet = False,
) -> None:
    """Run the paper's tables and set our scores beside the paper's.

    table1 has a frozen encoder and full fine-tuning, table2 one LoRA adapter for all tasks, and
    table3 to table5 an adapter for SST, Quora and STS alone. The same command continues where it
    stopped.

        fastlora reproduce table2 --data data/ --model minilm --limit 2000
        fastlora reproduce all --data data/ --seeds 3 --out studies/full
    """
    if seeds < 1:
        raise UserError(f"seeds is {seeds} (expected 1 or more)")
    _check_alone("reproduce")
    names = tuple(TABLES) if "all" in tables else tuple(dict.fromkeys(tables))
    tasks = dict.fromkeys(task for name in names for task in TABLES[name].tasks)
    wanted = replace(settings_from(settings, None), tasks=tuple(tasks), out=out)
    inputs = find_inputs(wanted)
    from fastlora.studies.grid import reproduce as run

    run(names, wanted, inputs, seeds, quiet, command_stop())


@app.command
def compare(
    *runs: Annotated[Path, Parameter(help="Folders of finished runs.", required=True)],
    out: Annotated[Path | None, Parameter(help="Folder of a report, if one is wanted.")] = None,
) -> None:
    """Set runs side by side: scores, settings that differ, parameters, seconds; one plot.

    fastlora compare runs/a runs/b runs/c
    """
    from fastlora.studies.compare import compare as run

    run(runs, out)


@app.command
def doctor() -> None:
    """Say what this machine is and which kernels fastlora uses on it."""
    from fastlora.console import Log
    from fastlora.runs.folder import environment
    from fastlora.training.setup import compute_of, find_route
    from fastlora.training.tuner import use_measured_blocks

    values = environment()
    gpus = values.pop("gpus") or ["none: training runs on the CPU"]
    use_measured_blocks()
    name, why = find_route(*compute_of("auto", "auto"))
    pairs = [(key, str(value)) for key, value in values.items()]
    pairs += [("gpu", gpu) for gpu in gpus] + [("kernels", f"{name} ({why})")]
    Log(quiet=False).fields(pairs)


@app.command
def tune(
    *,
    settings: Annotated[ComputeFlags, _FLAT] = ComputeFlags(),  # noqa: B008
) -> None:
    """Measure the kernels' block sizes on this GPU and keep the fastest for later runs."""
    from fastlora.training import tuner
    from fastlora.training.setup import DTYPES, compute_of

    how = settings_from(settings, None)
    device, precision = compute_of(how.device, how.precision)
    if device.type != "cuda":
        raise UserError(f"device is {device}: only a CUDA GPU has block sizes to tune")
    file = tuner.tune(device, DTYPES[precision], print)
    print(f"measured block sizes in {file}; runs on this machine use them")


def _check_alone(command: str) -> None:
    if rank_and_world()[1] > 1:
        raise UserError(f"{command} runs in one process; start it without torchrun")
