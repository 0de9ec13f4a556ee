"""The settings of a training run: checked, frozen dataclasses with the paper's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from fastlora.data.tasks import BUILTIN
from fastlora.errors import UserError
from fastlora.lora.config import LoraConfig, check
from fastlora.training.types import as_type, check_keys, check_types, types_of

DEFAULT_TASKS = ("sst", "quora", "sts")
DEFAULT_LR = {"lora": 2e-3, "full": 5e-5, "frozen": 2e-3}
DEFAULT_HEAD_LR = 1e-3
COUNTS = ("epochs", "max_steps", "tokens_per_batch", "accumulate", "limit", "save_every")
LORA_SETTINGS = ("r", "alpha", "dropout", "rslora", "targets")
Precision = Literal["auto", "fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class TaskLoraConfig:
    """What one task's adapter sets differently from the common settings; None is not set."""

    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool | None = None
    targets: tuple[str, ...] | None = None
    lr: float | None = None
    warmup: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check(self.lr is None or self.lr > 0, "lr", self.lr, "a positive number")
        check(self.warmup is None or 0 <= self.warmup <= 1, "warmup", self.warmup, "0 to 1")
        self.over(LoraConfig())  # raises for a value that is out of range

    @classmethod
    def of(cls, lora: LoraConfig) -> TaskLoraConfig:
        """What says the same as an adapter's settings; UserError where those have patterns."""
        check(not (lora.rank_pattern or lora.alpha_pattern), "lora", lora, "no patterns")
        return cls(**{name: getattr(lora, name) for name in LORA_SETTINGS})

    def changes(self) -> dict[str, Any]:
        """What is set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def over(self, base: LoraConfig) -> LoraConfig:
        """The settings of the task's adapter: `base` with this task's differences in place."""
        return replace(base, **{k: v for k, v in self.changes().items() if k in LORA_SETTINGS})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    A path may be given as text and a list in place of a tuple; no value is rounded or converted
    otherwise. Raises UserError for a value of another type, out of range, or that contradicts
    another.
    """

    r: int = 8  # of all adapters, as the next four
    alpha: float = 16.0
    dropout: float = 0.1
    rslora: bool = False
    targets: tuple[str, ...] = ("query", "value")
    adapters: Literal["shared", "per-task", "shared+per-task"] = "shared"
    add_to: Path | None = None  # a finished run, beside whose tasks others are trained
    mode: Literal["lora", "frozen", "full"] = "lora"  # adapters, heads alone, or every weight
    sst: TaskLoraConfig = TaskLoraConfig()
    cfimdb: TaskLoraConfig = TaskLoraConfig()
    quora: TaskLoraConfig = TaskLoraConfig()
    sts: TaskLoraConfig = TaskLoraConfig()

    tasks: tuple[str, ...] | None = None  # by default `DEFAULT_TASKS`, and those in `task`
    data: Path | None = None  # folder of the tasks' files
    model: str | None = None  # folder or hub id of the encoder
    pairs: Literal["separate", "joint"] = "separate"  # how two sentences are encoded
    sampling: Literal["proportional", "sqrt", "uniform"] = "proportional"
    bad_rows: Literal["error", "skip"] = "error"
    quoting: Literal["minimal", "none"] = "minimal"  # in CSV and TSV files
    limit: int | None = None  # examples of each file, at most

    epochs: int = 1
    max_steps: int | None = None
    tokens_per_batch: int = 1024  # real tokens of a step, over all processes
    accumulate: int = 1  # parts that a process computes each step in
    lr: float | None = None  # peak learning rate; by default `DEFAULT_LR`
    head_lr: float | None = None  # by default `DEFAULT_HEAD_LR`; `lr` in mode "frozen"
    weight_decay: float = 0.01  # of matrices
    warmup: float = 0.06  # share of the steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = 1.0  # largest norm of the gradients
    seed: int = 0  # of new weights, the examples' order and dropout

    precision: Precision = "auto"
    device: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    grad_checkpoint: bool = False  # compute the layers again in backward

    task: Mapping[str, Any] = field(default_factory=dict)  # tables of tasks that are not built in

    out: Path | None = None  # the run folder; not in its run.toml
    save_every: int = 200  # steps between checkpoints

    def __post_init__(self) -> None:
        check_types(self)
        self.lora  # noqa: B018, raises for a value that is out of range
        for name in COUNTS:
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "1 or more")
        check(self.tasks != (), "tasks", self.tasks, "at least one task")
        check(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2^63")
        for name in ("lr", "head_lr", "clip"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "a positive number")
        check(0 <= self.warmup <= 1, "warmup", self.warmup, "a share between 0 and 1")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        tables = all(isinstance(table, Mapping) for table in self.task.values())
        check(tables, "task", self.task, "tables [task.NAME]")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raise UserError for settings that exclude each other."""
        names = (*BUILTIN, *self.task)
        special = [name for name in names if self.task_settings(name) != TaskLoraConfig()]
        if special and self.adapters == "shared":
            raise UserError(f"{special[0]} has settings of its own, which need --adapters per-task")
        if self.add_to and (self.mode, self.adapters) != ("lora", "per-task"):
            raise UserError("add_to is given, which needs --adapters per-task")
        fixed = (self.mode, self.adapters, self.accumulate) == ("lora", "shared", 1)
        if self.cuda_graphs and (self.compile or self.grad_checkpoint or not fixed):
            raise UserError(
                "cuda_graphs is given (expected one shared adapter, and neither --accumulate, "
                "--compile nor --grad-checkpoint)"
            )

    def task_settings(self, task: str) -> TaskLoraConfig:
        """What a task's adapter sets differently; nothing for the adapter of all tasks."""
        if task in self.task:
            return as_type(f"task.{task}.lora", self.task[task].get("lora", {}), TaskLoraConfig)
        return getattr(self, task) if task in BUILTIN else TaskLoraConfig()

    def with_task_settings(self, task: str, settings: TaskLoraConfig) -> TrainConfig:
        """The configuration with other settings of a task's adapter."""
        table = {**self.task.get(task, {}), "lora": settings.changes()}
        own: dict[str, Any] = {"task": {**self.task, task: table}}
        return replace(self, **({task: settings} if task in BUILTIN else own))

    @property
    def lora(self) -> LoraConfig:
        """The settings of the adapters, before what single tasks set differently."""
        return LoraConfig(**{name: getattr(self, name) for name in LORA_SETTINGS})

    @property
    def peak_rates(self) -> tuple[float, float]:
        """The learning rates of adapters or encoder, and of heads: as given, or the defaults."""
        lr = self.lr or DEFAULT_LR[self.mode]
        # In frozen mode, heads are all there is to train.
        return lr, self.head_lr or (lr if self.mode == "frozen" else DEFAULT_HEAD_LR)

    def to_table(self) -> dict[str, Any]:
        """What is set, without `out`, in TOML's types."""
        table = asdict(self)
        del table["out"]
        return _without_none(table)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a TOML file's table; UserError for an unknown key, too."""
        return cls(**check_keys(table, types_of(TrainConfig)))


@dataclass(frozen=True)
class SearchConfig:
    """How long a search of settings may take, and how its trials run."""

    budget: timedelta | None = None  # after which no short run begins
    trials: int = 10  # short runs of learning rate and warmup
    together: int | None = None  # without effect: trials once trained side by side
    join: bool = False  # help with a search that another process leads

    def __post_init__(self) -> None:
        check_types(self)
        check(self.trials >= 1, "trials", self.trials, "1 or more")
        ok = self.budget is None or self.budget > timedelta(0)
        check(ok, "budget", str(self.budget), "more than no time")


def _without_none(value: Any) -> Any:
    """Without None and empty tables, and only of types that TOML has."""
    if isinstance(value, dict):
        plain = {key: _without_none(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in plain.items() if item != {}}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return str(value) if isinstance(value, Path) else value
