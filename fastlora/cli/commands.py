"""The commands: `fastlora-train`, and `fastlora train | eval | predict | merge | reproduce | ...`.

torch is imported inside the commands, so that --help is fast and mistakes are reported at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter, validators

from fastlora.cli import options
from fastlora.cli.options import OUTPUT, given, settings_from, to_number
from fastlora.cli.process import command_stop
from fastlora.data.infer import FileTask
from fastlora.data.tasks import BUILTIN
from fastlora.errors import UserError
from fastlora.files import check_replaceable
from fastlora.studies.paper_tables import TABLES
from fastlora.training.config import SearchConfig
from fastlora.training.inputs import adapter_folder, find_data, find_inputs, with_file

_FLAT = Parameter(name="*")
_FOLDER = validators.Path(file_okay=False)
_DASH = Parameter(allow_leading_hyphen=True)  # "-" is standard input or output
ConfigFile = Annotated[Path | None, Parameter(group=OUTPUT, help="TOML settings file; flags win.")]
Quiet = Annotated[bool, Parameter(group=OUTPUT, negative="", help="Print nothing but errors.")]
RunFolder = Annotated[Path, Parameter(help="Run folder, or an adapter folder with heads.")]
TaskName = Annotated[str | None, Parameter(help="Task, if the run has several.")]
EncoderName = Annotated[str | None, Parameter(help="Folder or name of the encoder, if it moved.")]

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
    own: Annotated[options.FileFlags, _FLAT] = options.FileFlags(),  # noqa: B008
    settings: Annotated[options.TrainFlags, _FLAT] = options.TrainFlags(),  # noqa: B008
    config: ConfigFile = None,
    resume: Annotated[
        Path | None, Parameter(group=OUTPUT, help="Run folder to continue, with its settings.")
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
    fastlora-train tickets.csv --text body --label queue
    """
    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: is a folder, which is given as --data {file}")
        if file is not files[0] or not file.is_file():
            what = "no such file" if file is files[0] else "a second FILE, of which one is expected"
            raise UserError(f"{file}: {what}; a list has commas, as in --tasks sst,quora,sts")
    if given(own) and not files:
        name = next(iter(given(own))).replace("_", "-")
        raise UserError(f"--{name} needs a file: fastlora-train FILE.csv --text COLUMN ...")
    if resume is not None:
        if config is not None or files or "out" in given(settings):
            raise UserError("--resume names a run folder; leave out FILE, --config and --out")
        if not (resume / "run.toml").is_file():
            raise UserError(f"{resume}: holds no run to resume (expected a folder with run.toml)")
        settings, config = replace(settings, out=resume), resume / "run.toml"
    wanted, why = settings_from(settings, config), "as given"
    if files:
        wanted, why = with_file(wanted, files[0], FileTask(**given(own)))
    inputs = find_inputs(wanted, why, config)
    for name in given(settings).keys() & BUILTIN.keys() - inputs.tasks.keys():
        raise UserError(f"settings of {name} are given, which is not trained; add it to --tasks")
    from fastlora.runs.session import run_training

    run_training(wanted, inputs, quiet=quiet, dry_run=dry_run, stop=command_stop())


@app.command
def search(
    *,
    settings: Annotated[options.TrainFlags, _FLAT] = options.TrainFlags(),  # noqa: B008
    limits: Annotated[options.SearchFlags, _FLAT] = options.SearchFlags(),  # noqa: B008
    config: ConfigFile = None,
    quiet: Quiet = False,
) -> None:
    """Search LoRA settings at a fraction of the cost of full runs.

    fastlora search --tasks sts --data data/ --budget 30m
    fastlora search --adapters per-task --data data/ --out searches/mine

    Trial 0 has the settings given here. Short runs choose the learning rate,
    warmup, dropout and targets, and a longer run the rank. Finally, the best
    settings are compared with trial 0 over three seeds, on dev examples that no
    choice was based on. The same command continues an interrupted search. Train
    with the settings found: fastlora-train --config FOLDER/best.toml
    """
    how = SearchConfig(**given(limits))
    wanted = settings_from(settings, config)
    inputs = find_inputs(wanted, beside=config)
    try:
        from fastlora.studies.search import run_search
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is missing: pip install "fastlora-bert[search]"') from None

    run_search(wanted, inputs, how, quiet, command_stop())


@app.command(name="eval")
def evaluate(
    run: RunFolder,
    *,
    settings: Annotated[options.EvalFlags, _FLAT] = options.EvalFlags(),  # noqa: B008
    split: Annotated[Literal["train", "dev", "test"], Parameter(help="Split to score.")] = "dev",
    model: EncoderName = None,
) -> None:
    """Score a finished run, or RUN/checkpoints/step-N of one, on labelled data.

    Options that are left out are those of the run, except --limit.
    """
    file = adapter_folder(run).parent / "run.toml"
    how = settings_from(settings, file if file.is_file() else None)
    from fastlora.console import Log
    from fastlora.data.token_cache import load_tasks
    from fastlora.multitask import predictor
    from fastlora.runs.trained import load

    trained = load(run, how.device, model)
    tasks = trained.tasks.values()
    folder, _ = find_data(how.data, tasks)
    rules = {"pairs": trained.settings["pairs"], "quoting": how.quoting, "bad_rows": how.bad_rows}
    datasets = load_tasks(folder, tasks, split, trained.tokenizer, **rules, limit=settings.limit)
    log = Log(quiet=False)
    shares = [t for t in tasks if t.dev_share and split == "dev"]
    parts = [f"; {t.name}: its dev split, {t.dev_share:.0%} of {t.files['train']}" for t in shares]
    log.line(f"{run} on {folder}{''.join(parts)}")
    outputs = predictor.predict(trained.model, datasets)
    log.table(*predictor.score_table(trained.model, datasets, outputs, split))
    for table in predictor.class_tables(datasets, outputs):
        log.table(*table)


@app.command
def predict(
    run: RunFolder,
    input: Annotated[Path, _DASH, Parameter(help="CSV, TSV or JSONL; - for lines of text.")],
    *,
    task: TaskName = None,
    out: Annotated[
        Path | None, _DASH, Parameter(help="File to write, or -; by default INPUT.predictions.csv.")
    ] = None,
    top: Annotated[int, Parameter(help="Number of likeliest classes.", converter=to_number)] = 1,
    format: Annotated[
        Literal["csv", "cs224n"], Parameter(help="cs224n: the course's submission file.")
    ] = "csv",
    settings: Annotated[options.PredictFlags, _FLAT] = options.PredictFlags(),  # noqa: B008
    model: EncoderName = None,
) -> None:
    """Add predictions and probabilities to the rows of a file, which needs no labels.

    fastlora predict runs/mine new.csv --top 3
    fastlora predict runs/mine - --task sst < lines.txt | head
    fastlora predict runs/mine ids-sst-dev.csv --task sst --format cs224n
    """
    if str(input) != "-" and not (input.is_file() or input.is_fifo()):
        raise UserError(f"{input}: no such file")
    if out and str(out) != "-":
        check_replaceable(out, input)
    adapter_folder(run)
    from fastlora.runs.prediction import predict_file
    from fastlora.runs.trained import load

    how = settings_from(settings, None)
    trained = load(run, how.device, model)
    rules: dict[str, Any] = {"quoting": how.quoting, "top": top, "course": format == "cs224n"}
    out, count, truncated = predict_file(trained, input, out, task, **rules)
    if str(out) != "-":
        print(f"{count:,} predictions in {out} ({truncated} texts truncated)")


@app.command
def merge(
    run: RunFolder,
    out: Annotated[Path, Parameter(help="Folder to write; must not exist, or be empty.")],
    *,
    task: TaskName = None,
    model: EncoderName = None,
) -> None:
    """Fold a run's adapter into its encoder and write a Hugging Face folder."""
    adapter_folder(run)
    from fastlora.runs.trained import load, merge_encoder

    merge_encoder(load(run, "cpu", model), task, out)
    print(f"merged encoder in {out}, without the heads (fastlora export writes them, too)")


@app.command
def export(
    run: RunFolder,
    out: Annotated[Path, Parameter(help="Folder to write; must not exist, or be empty.")],
    *,
    task: TaskName = None,
    merged: Annotated[bool, Parameter(negative="", help="Export all weights, merged.")] = False,
    model: EncoderName = None,
) -> None:
    """Write a task's model for transformers' AutoModelForSequenceClassification.

    fastlora export runs/mine exported --merged   # for transformers' pipeline
    fastlora export runs/mine adapter             # for PeftModel.from_pretrained
    """
    adapter_folder(run)
    from fastlora.runs.export import export as write_model
    from fastlora.runs.trained import load

    write_model(load(run, "cpu", model), task, out, merged)
    print(f"{'model' if merged else 'adapter'} of a sequence classifier in {out}")


@app.command
def reproduce(
    tables: Annotated[
        tuple[Literal["table1", "table2", "table3", "table4", "table5", "all"], ...],
        Parameter(help="Which tables, separated by spaces.", negative=""),
    ],
    /,
    *,
    settings: Annotated[options.TableFlags, _FLAT] = options.TableFlags(),  # noqa: B008
    seeds: Annotated[int, Parameter(help="Number of seeds, from 0.", converter=to_number)] = 1,
    out: Annotated[Path, Parameter(help="Folder of the runs and the tables.")] = Path("studies"),
    quiet: Quiet = False,
) -> None:
    """Run the rows of the paper's tables and compare our scores with the paper's.

    fastlora reproduce table2 --data data/ --model minilm --limit 2000
    fastlora reproduce all --data data/ --seeds 3 --out studies/full

    table1 has a frozen encoder and full fine-tuning, table2 one LoRA adapter for
    all tasks, and table3 to table5 an adapter for SST, Quora and STS alone. The
    same command continues where it stopped.
    """
    if seeds < 1:
        raise UserError(f"seeds is {seeds} (expected 1 or more)")
    names = tuple(TABLES) if "all" in tables else tuple(dict.fromkeys(tables))
    tasks = dict.fromkeys(task for name in names for task in TABLES[name].tasks)
    wanted = replace(settings_from(settings, None), tasks=tuple(tasks), out=out)
    inputs = find_inputs(wanted)
    from fastlora.studies.grid import reproduce as run

    run(names, wanted, inputs, seeds, quiet, command_stop())


@app.command
def compare(
    *runs: Annotated[Path, Parameter(help="Folders of finished runs.", required=True)],
    out: Annotated[Path | None, Parameter(help="Folder for a report.", validator=_FOLDER)] = None,
) -> None:
    """Compare runs by scores, differing settings, parameters and seconds; plot scores.

    fastlora compare runs/a runs/b runs/c
    """
    from fastlora.studies.compare import compare as run

    run(runs, out)


@app.command
def doctor() -> None:
    """Print the versions, the hardware, and the kernels that fastlora uses here."""
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
    settings: Annotated[options.ComputeFlags, _FLAT] = options.ComputeFlags(),  # noqa: B008
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
