"""The settings of runs and searches: frozen dataclasses that check their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from fastlora.data.tasks import BUILTIN, sampling_exponent
from fastlora.errors import UserError
from fastlora.lora.config import ALL, TARGETS, LoraConfig, check
from fastlora.training.types import as_type, check_keys, check_types, types_of

DEFAULT_TASKS = ("sst", "quora", "sts")
DEFAULT_LR = {"lora": 1e-3, "full": 5e-5, "frozen": 2e-3}
DEFAULT_HEAD_LR = 1e-3
COUNTS = "epochs max_steps tokens_per_batch accumulate limit patience eval_every save_every"
LORA_SETTINGS = ("r", "alpha", "dropout", "rslora", "targets")
Precision = Literal["auto", "fp32", "fp16", "bf16"]


def _name_all_targets(settings: TaskLoraConfig | TrainConfig) -> None:
    """Replace targets that have "all" among them by the names of all layers, in place."""
    if {*ALL} & {*(settings.targets or ())}:
        object.__setattr__(settings, "targets", tuple(TARGETS))


@dataclass(frozen=True)
class TaskLoraConfig:
    """The settings of one task's adapter; None stands for the common setting."""

    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool | None = None
    targets: tuple[str, ...] | None = None
    lr: float | None = None
    warmup: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _name_all_targets(self)
        check(self.lr is None or self.lr > 0, "lr", self.lr, "a positive number")
        check(self.warmup is None or 0 <= self.warmup <= 1, "warmup", self.warmup, "0 to 1")
        self.over(LoraConfig())  # raises for a value that is out of range

    @classmethod
    def of(cls, lora: LoraConfig) -> TaskLoraConfig:
        """An adapter's settings as those of a task; UserError if they have patterns."""
        check(not (lora.rank_pattern or lora.alpha_pattern), "lora", lora, "no patterns")
        return cls(**{name: getattr(lora, name) for name in LORA_SETTINGS})

    def changes(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def over(self, base: LoraConfig) -> LoraConfig:
        """The settings of the task's adapter: those that are set here, and else those of `base`."""
        return replace(base, **{k: v for k, v in self.changes().items() if k in LORA_SETTINGS})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    A path may be given as text, the model's folder as a path, and a list in place of a tuple; no
    value is rounded or converted otherwise. Raises UserError for a value that has another
    type, is out of range, or excludes another.

    Args:
        r: Rank of the update, 1 or more.
        alpha: Scale of the update, which is multiplied by alpha / r.
        dropout: Dropout on the update's input, 0 <= p < 1.
        rslora: Multiply the update by alpha / sqrt(r) instead (rsLoRA).
        targets: Layers to adapt, of query,key,value,output,intermediate,ffn_output; by default all.
        adapters: One adapter for all tasks, one for each, or both together.
        add_to: Finished run with adapters per task, to which other tasks are added.
        mode: What trains: adapters and heads, heads alone, or all weights.
        sst, cfimdb, quora, sts: Settings of the task's adapter that differ from the common ones.
        tasks: Tasks, comma-separated; by default sst, quora and sts, as in the paper.
        data: Folder of the task files; by default ./data, else the demo corpus.
        model: Folder, hub id, or minilm; by default bert-base-uncased (demo: minilm).
        pairs: Encode a pair as two sentences, or as one [CLS] a [SEP] b [SEP].
        sampling: Share of a task of n examples: n (proportional), sqrt, uniform, or T for n^(1/T).
        bad_rows: Whether a malformed row is an error, or skipped and counted.
        quoting: minimal: quotes in CSV and TSV files enclose fields; none: they are plain text.
        limit: Use at most this many examples of each file.
        epochs: Passes over the training examples.
        max_steps: Stop after this many steps.
        tokens_per_batch: Most tokens of a step, without padding, in all processes together.
        accumulate: Parts of a step (gradient accumulation), to save memory.
        lr: Peak learning rate; by default lora 1e-3, full 5e-5, frozen 2e-3.
        head_lr: Peak learning rate of the heads; by default 1e-3, or --lr when frozen.
        lora_plus: The learning rate of each B is that of A times this (LoRA+).
        weight_decay: AdamW's weight decay, of matrices alone.
        warmup: Share of the steps in which the learning rate rises, 0 to 1.
        schedule: Decay of the learning rate after the warmup.
        clip: Norm to which gradients are clipped.
        seed: Seed of weights, order and dropout.
        precision: Compute dtype; auto is bf16 or fp16 on a GPU, fp32 on a CPU.
        device: auto, cpu, cuda or cuda:N.
        compile: Compile the encoder with torch.compile.
        cuda_graphs: Replay each step as a CUDA graph, for small batches.
        grad_checkpoint: Recompute layers in backward: less memory, 1.6x the time.
        task: Tables of the tasks that are not built in, by name.
        out: Run folder; an unfinished run in it is continued.
        keep: Weights to keep: those with the best mean dev score, or the last ones.
        patience: Stop after this many evaluations without a better mean dev score.
        eval_every: Steps between evaluations; the end of an epoch always evaluates.
        save_every: Steps between checkpoints; an evaluation always saves.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    rslora: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)
    adapters: Literal["shared", "per-task", "shared+per-task"] = "shared"
    add_to: Path | None = None
    mode: Literal["lora", "frozen", "full"] = "lora"
    sst: TaskLoraConfig = TaskLoraConfig()
    cfimdb: TaskLoraConfig = TaskLoraConfig()
    quora: TaskLoraConfig = TaskLoraConfig()
    sts: TaskLoraConfig = TaskLoraConfig()

    tasks: tuple[str, ...] | None = None
    data: Path | None = None
    model: str | None = None
    pairs: Literal["separate", "joint"] = "separate"
    sampling: str = "proportional"
    bad_rows: Literal["error", "skip"] = "error"
    quoting: Literal["minimal", "none"] = "minimal"
    limit: int | None = None

    epochs: int = 1
    max_steps: int | None = None
    tokens_per_batch: int = 1024
    accumulate: int = 1
    lr: float | None = None
    head_lr: float | None = None
    lora_plus: float = 1.0
    weight_decay: float = 0.01
    warmup: float = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = 1.0
    seed: int = 0

    precision: Precision = "auto"
    device: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    grad_checkpoint: bool = False

    task: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    keep: Literal["best", "last"] = "best"
    patience: int | None = None
    eval_every: int | None = None
    save_every: int = 200

    def __post_init__(self) -> None:
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        check_types(self)
        _name_all_targets(self)
        self.lora  # noqa: B018, raises for a value that is out of range
        for name in COUNTS.split():
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "1 or more")
        check(self.tasks != (), "tasks", self.tasks, "at least one task")
        check(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2^63")
        for name in ("lr", "head_lr", "lora_plus", "clip"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "a positive number")
        check(0 <= self.warmup <= 1, "warmup", self.warmup, "a share between 0 and 1")
        sampling_exponent(self.sampling)  # raises for an unknown one
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        if self.patience and not self.eval_every and self.epochs <= self.patience:
            useless = f"is {self.patience} and epochs {self.epochs}, each with one evaluation"
            raise UserError(f"patience {useless}; raise --epochs or pass --eval-every STEPS")
        for name in (*LORA_SETTINGS, "adapters", "lora_plus"):
            value, default = getattr(self, name), getattr(TrainConfig, name)
            expected = f"{default!r}, its default, because --mode {self.mode} has no adapters"
            check(self.mode == "lora" or value == default, name, value, expected)
        tables = all(isinstance(table, Mapping) for table in self.task.values())
        check(tables, "task", self.task, "tables [task.NAME]")
        names = (*BUILTIN, *self.task)
        special = [name for name in names if self.task_settings(name) != TaskLoraConfig()]
        if special and self.adapters == "shared":
            raise UserError(f"settings of {special[0]} need --adapters per-task or shared+per-task")
        if self.add_to and (self.mode, self.adapters) != ("lora", "per-task"):
            raise UserError("add_to is given, which needs --adapters per-task")
        fixed = (self.mode, self.adapters, self.accumulate) == ("lora", "shared", 1)
        if self.cuda_graphs and (self.compile or self.grad_checkpoint or not fixed):
            others = "neither --accumulate, --compile nor --grad-checkpoint"
            raise UserError(f"cuda_graphs is given (expected one shared adapter, and {others})")

    def task_settings(self, task: str) -> TaskLoraConfig:
        """The settings of a task's adapter that differ; none for the shared adapter."""
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
        """The common settings of the adapters."""
        return LoraConfig(**{name: getattr(self, name) for name in LORA_SETTINGS})

    @property
    def peak_rates(self) -> tuple[float, float]:
        """The learning rates of adapters or encoder, and of heads: as given, or the defaults."""
        lr = self.lr or DEFAULT_LR[self.mode]
        # In frozen mode, heads are all there is to train.
        return lr, self.head_lr or (lr if self.mode == "frozen" else DEFAULT_HEAD_LR)

    def to_table(self) -> dict[str, Any]:
        """The settings that are not None, without `out`, in TOML's types."""
        table = asdict(self)
        del table["out"]
        return _without_none(table)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a TOML file's table; UserError for an unknown key, too."""
        return cls(**check_keys(table, types_of(TrainConfig)))


@dataclass(frozen=True)
class SearchConfig:
    """How long a search of settings may take, and how many trials it has.

    Args:
        budget: Time for the search, such as 30m or 2h; short runs leave enough for the full ones.
        trials: Short runs that choose learning rate and warmup, 1 to 18.
    """

    budget: timedelta | None = None
    trials: int = 10

    def __post_init__(self) -> None:
        check_types(self)
        check(1 <= self.trials <= 18, "trials", self.trials, "1 to 18")
        ok = self.budget is None or self.budget > timedelta(0)
        check(ok, "budget", str(self.budget), "more than 0 s")


def _without_none(value: Any) -> Any:
    """A value without None and empty tables, in types that TOML has."""
    if isinstance(value, dict):
        plain = {key: _without_none(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in plain.items() if item != {}}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return str(value) if isinstance(value, Path) else value
