"""Settings: frozen dataclasses with the paper's defaults, to and from TOML, strictly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from fastlora.data.tasks import BUILTIN
from fastlora.errors import UserError
from fastlora.lora.config import TARGETS, LoraConfig
from fastlora.lora.config import check as _check

DEFAULT_TASKS = ("sst", "quora", "sts")
Precision = Literal["auto", "fp32", "fp16", "bf16"]
DEFAULT_LR = {"lora": 2e-3, "full": 5e-5, "frozen": 2e-3}
DEFAULT_HEAD_LR = 1e-3

_search = Group("Search", sort_key=0)
_lora = Group("LoRA", sort_key=1)
_task_lora = Group("One task's adapter, with --adapters per-task or shared+per-task", sort_key=6)
_data = Group("Tasks and data", sort_key=2)
_optim = Group("Optimisation", sort_key=3)
_speed = Group("Precision and speed", sort_key=4)
_output = Group("Output", sort_key=5)


def _option(group: Group, text: str) -> Any:
    return Parameter(group=group, help=text, negative="")


def _split(_type: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    """A list option: "a,b" on the command line, or a list in TOML."""
    return tuple(part for token in tokens for part in token.value.split(",") if part)


def _names(group: Group, text: str) -> Any:
    return Parameter(group=group, help=text, negative="", converter=_split, n_tokens=1)


@dataclass(frozen=True)
class LoraOptions:
    """The settings of a run's adapters, as the command line and its files have them."""

    r: Annotated[int, _option(_lora, "Rank of the update, 1 or more.")] = 8
    alpha: Annotated[float, _option(_lora, "Strength: the update is scaled by alpha / r.")] = 16.0
    dropout: Annotated[float, _option(_lora, "Dropout on the update's input, 0 <= p < 1.")] = 0.1
    rslora: Annotated[bool, _option(_lora, "Scale by alpha / sqrt(r) instead.")] = False
    targets: Annotated[
        tuple[str, ...],
        _names(_lora, f"Matrices to adapt, comma-separated: {', '.join(TARGETS)}."),
    ] = ("query", "value")

    def __post_init__(self) -> None:
        ok = len(self.targets) > 0 and not isinstance(self.targets, str)
        _check(ok, "targets", self.targets, "a list of one matrix or more")
        self.config()

    @classmethod
    def of(cls, config: LoraConfig) -> LoraOptions:
        """The options that say what an adapter's settings say."""
        _check(not (config.rank_pattern or config.alpha_pattern), "lora", config, "no patterns")
        own = {f.name: getattr(config, f.name) for f in fields(cls)}
        return cls(**{name: value for name, value in own.items() if value is not None})

    def config(self) -> LoraConfig:
        """The settings of an adapter; UserError for one out of range."""
        return LoraConfig(**vars(self))


@dataclass(frozen=True)
class TaskLoraConfig:
    """What one task's adapter sets differently from the common settings."""

    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool | None = None
    targets: Annotated[
        tuple[str, ...] | None, Parameter(negative="", converter=_split, n_tokens=1)
    ] = None
    lr: float | None = None
    warmup: float | None = None

    def __post_init__(self) -> None:
        _check(self.lr is None or 0 < self.lr < math.inf, "lr", self.lr, "a positive number")
        _check(self.warmup is None or 0 <= self.warmup <= 1, "warmup", self.warmup, "0 to 1")

    def over(self, base: LoraOptions) -> LoraOptions:
        """`base` with this task's own settings in place."""
        own = {f.name: getattr(self, f.name) for f in fields(base)}
        return replace(base, **{k: v for k, v in own.items() if v is not None})


def _task(name: str) -> Any:
    return Annotated[
        TaskLoraConfig,
        Parameter(name=name, group=_task_lora, help=f"In place of the common one, for {name}."),
    ]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run."""

    lora: Annotated[LoraOptions, Parameter(name="*")] = field(default_factory=LoraOptions)
    adapters: Annotated[
        Literal["shared", "per-task", "shared+per-task"],
        _option(_lora, "One adapter for all tasks, one each, or both together."),
    ] = "shared"
    add_to: Annotated[
        Path | None,
        _option(_lora, "Finished run with adapters per task: train other tasks beside its own."),
    ] = None
    mode: Annotated[
        Literal["lora", "frozen", "full"],
        _option(_lora, "Train adapters, heads on a frozen encoder, or every weight."),
    ] = "lora"
    sst: _task("sst") = TaskLoraConfig()  # type: ignore[valid-type]
    cfimdb: _task("cfimdb") = TaskLoraConfig()  # type: ignore[valid-type]
    quora: _task("quora") = TaskLoraConfig()  # type: ignore[valid-type]
    sts: _task("sts") = TaskLoraConfig()  # type: ignore[valid-type]

    tasks: Annotated[
        tuple[str, ...] | None,
        _names(_data, "Tasks, comma-separated; by default sst, quora and sts, as in the paper."),
    ] = None
    data: Annotated[
        Path | None,
        _option(_data, "Folder of the task files; by default ./data, else the demo corpus."),
    ] = None
    model: Annotated[
        str | None,
        _option(_data, "Folder, hub id, or minilm; by default bert-base-uncased, demo: minilm."),
    ] = None
    pairs: Annotated[
        Literal["separate", "joint"],
        _option(_data, "Encode a pair as two sentences, or as one [CLS] a [SEP] b [SEP]."),
    ] = "separate"
    sampling: Annotated[
        Literal["proportional", "sqrt", "uniform"],
        _option(_data, "How often a task is drawn, by its number of examples."),
    ] = "proportional"
    bad_rows: Annotated[Literal["error", "skip"], _option(_data, "What a malformed row does.")] = (
        "error"
    )
    quoting: Annotated[
        Literal["minimal", "none"],
        _option(_data, "Quotes in CSV and TSV files: around a field, or none: plain characters."),
    ] = "minimal"
    limit: Annotated[
        int | None, _option(_data, "Use at most this many examples of each task's files.")
    ] = None

    epochs: Annotated[int, _option(_optim, "Passes over the training examples.")] = 1
    max_steps: Annotated[int | None, _option(_optim, "Stop after this many steps.")] = None
    tokens_per_batch: Annotated[
        int | Literal["auto"],
        _option(_optim, "Real tokens of a step over all ranks, 1 or more; auto: measured here."),
    ] = 1024
    accumulate: Annotated[
        int, _option(_optim, "Split each step in this many parts, to save memory.")
    ] = 1
    lr: Annotated[
        float | None,
        _option(_optim, "Peak learning rate; by default lora 2e-3, full 5e-5, frozen 2e-3."),
    ] = None
    head_lr: Annotated[
        float | None,
        _option(_optim, "Peak learning rate of the heads; by default 1e-3, or --lr when frozen."),
    ] = None
    weight_decay: Annotated[float, _option(_optim, "AdamW's decay of matrices.")] = 0.01
    warmup: Annotated[float, _option(_optim, "Share of the steps that warm up, 0 to 1.")] = 0.06
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], _option(_optim, "Decay after the warmup.")
    ] = "linear"
    clip: Annotated[float, _option(_optim, "Largest gradient norm.")] = 1.0
    seed: Annotated[int, _option(_optim, "Seed of weights, order and dropout.")] = 0

    precision: Annotated[
        Precision,
        _option(_speed, "Compute type; auto: bf16 or fp16 on a GPU, fp32 on a CPU."),
    ] = "auto"
    device: Annotated[str, _option(_speed, "auto, cpu, cuda or cuda:N.")] = "auto"
    compile: Annotated[bool, _option(_speed, "Compile the encoder with torch.compile.")] = False
    cuda_graphs: Annotated[
        bool, _option(_speed, "Replay each step as a CUDA graph, for small batches.")
    ] = False
    grad_checkpoint: Annotated[
        bool, _option(_speed, "Less memory, 1.6x the time: backward computes layers again.")
    ] = False

    task: Annotated[dict[str, Any], Parameter(parse=False)] = field(default_factory=dict)

    out: Annotated[
        Path | None, _option(_output, "Run folder; an unfinished run in it is continued.")
    ] = None
    save_every: Annotated[
        int, _option(_output, "Steps between checkpoints; the end of an epoch always saves.")
    ] = 200

    def __post_init__(self) -> None:
        if isinstance(self.lora, LoraConfig):
            object.__setattr__(self, "lora", LoraOptions.of(self.lora))
        for name in ("data", "out", "add_to"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, Path(path))
        for name in ("epochs", "max_steps", "accumulate", "limit", "save_every"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "1 or more")
        _check(self.tasks != (), "tasks", self.tasks, "at least one task")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2^63")
        if (tokens := self.tokens_per_batch) != "auto":
            _check(tokens >= 1, "tokens_per_batch", tokens, "1 or more, or auto")
        elif self.mode == "frozen":
            raise UserError("tokens_per_batch is 'auto' (expected a number with --mode frozen)")
        for name in ("lr", "head_lr", "clip"):
            value = getattr(self, name)
            _check(value is None or 0 < value < math.inf, name, value, "a positive number")
        names = (*BUILTIN, *self.task)
        own = [name for name in names if self.task_settings(name) != TaskLoraConfig()]
        if own and self.adapters == "shared":
            raise UserError(f"{own[0]} has settings of its own, which need --adapters per-task")
        if self.add_to and (self.mode, self.adapters) != ("lora", "per-task"):
            raise UserError("add_to is given, which needs --adapters per-task")
        fixed = (self.mode, self.adapters, self.accumulate) == ("lora", "shared", 1)
        if self.cuda_graphs and (self.compile or self.grad_checkpoint or not fixed):
            raise UserError(
                "cuda_graphs is given (expected one shared adapter, and neither --accumulate, "
                "--compile nor --grad-checkpoint)"
            )
        _check(0 <= self.warmup <= 1, "warmup", self.warmup, "a share between 0 and 1")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")

    def task_settings(self, task: str) -> TaskLoraConfig:
        """What a task's adapter sets differently."""
        if task not in self.task:
            return getattr(self, task)
        own = self.task[task].get("lora", {})
        try:
            found = TaskLoraConfig(**own)
            found.over(LoraOptions())  # checks what it sets
        except (TypeError, UserError) as error:
            known = ", ".join(f.name for f in fields(TaskLoraConfig))
            hint = f"expected some of {known}, as for a built-in task"
            raise UserError(f"task {task!r}: lora is {own!r} ({error}; {hint})") from None
        return found

    def with_own(self, task: str, own: TaskLoraConfig) -> TrainConfig:
        """The configuration with a task's own settings in place."""
        changes: dict[str, Any] = {task: own}
        if task not in BUILTIN:
            table = {**self.task.get(task, {}), "lora": asdict(own)}
            changes = {"task": {**self.task, task: table}}
        return replace(self, **changes)

    @property
    def peak_lr(self) -> float:
        """The learning rate given, or the mode's default."""
        return self.lr or DEFAULT_LR[self.mode]

    @property
    def peak_head_lr(self) -> float:
        """The heads' learning rate; in frozen mode they are all there is to train."""
        if self.mode == "frozen":
            return self.head_lr or self.peak_lr
        return self.head_lr or DEFAULT_HEAD_LR

    def to_table(self) -> dict[str, Any]:
        """The flat table that a TOML file of this configuration holds; nothing unset is in it."""
        table = {**asdict(self), **asdict(self.lora)}
        del table["lora"], table["out"]
        return _plain(table)


@dataclass(frozen=True)
class SearchConfig:
    """How long a search takes, and in what company."""

    budget: Annotated[
        timedelta | None,
        _option(_search, "Time, as 90s, 30m or 2h; else short runs on half of the examples."),
    ] = None
    trials: Annotated[
        int, _option(_search, "Short runs of learning rate and warmup, 1 or more.")
    ] = 10
    together: Annotated[int, _option(_search, "Trials that train side by side, 1 or more.")] = 4
    join: Annotated[
        bool, _option(_search, "Help with the search in --out that another process leads.")
    ] = False

    def __post_init__(self) -> None:
        for name in ("trials", "together"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        ok = self.budget is None or self.budget > timedelta(0)
        _check(ok, "budget", str(self.budget), "more than no time")


def _plain(value: Any) -> Any:
    """Without None and empty tables, and only of types that TOML has."""
    if isinstance(value, dict):
        plain = {key: _plain(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in plain.items() if item != {}}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
