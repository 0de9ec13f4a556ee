"""Prepares what a run computes with from its configuration: tokens, device and model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from threading import RLock

import torch

from fastlora.bert.model import BertModel, Parts
from fastlora.bert.weights import load_encoder
from fastlora.data.reading import TaskData
from fastlora.data.source import Source
from fastlora.data.tasks import Task
from fastlora.data.token_cache import load_tasks
from fastlora.data.tokenizer import Tokenizer
from fastlora.devices import local_device, memory_errors
from fastlora.errors import UserError, in_place_of
from fastlora.kernels import Dropout, Linear, Route, route
from fastlora.lora.model import pack
from fastlora.multitask.files import adapter_names, fingerprint
from fastlora.multitask.model import MultitaskBert
from fastlora.training.config import Precision, TrainConfig
from fastlora.training.inputs import Inputs, rank_and_world
from fastlora.training.stopping import Stop
from fastlora.training.tuner import use_measured_blocks

PARTS = Parts(Linear, Dropout)
# Runs take turns, because each seeds PyTorch's generators, which all threads share.
_TURNS = RLock()
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """An encoder in fp32 as loaded, its fingerprint, and notes on the checkpoint."""

    encoder: BertModel
    sha256: str
    notes: list[str]


@dataclass(frozen=True)
class Setup:
    """A run before its first step: its configuration with all defaults resolved, and its data."""

    config: TrainConfig
    inputs: Inputs
    tokenizer: Tokenizer
    train: dict[str, TaskData]
    dev: dict[str, TaskData]
    device: torch.device
    loaded: Loaded | None = None  # an encoder to copy; None: each run loads one
    stop: Stop = field(default_factory=Stop)  # a request to stop
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # of settings and inputs

    def narrow(self, config: TrainConfig) -> Setup:
        """The same data and encoder for another configuration, whose tasks are among these."""
        tasks = {name: self.inputs.tasks[name] for name in config.tasks or self.inputs.tasks}
        inputs, (lr, head_lr) = replace(self.inputs, tasks=tasks), config.peak_rates
        train, dev = ({n: data[n] for n in tasks} for data in (self.train, self.dev))
        # Record in the tables what was inferred from the data.
        known = {n: table | tasks[n].to_table() for n, table in config.task.items() if n in tasks}
        config = replace(config, task={**config.task, **known})
        config = replace(config, data=inputs.folder, model=inputs.model, tasks=tuple(tasks))
        config = replace(config, lr=lr, head_lr=head_lr, precision=self.config.precision)
        return replace(self, config=config, inputs=inputs, train=train, dev=dev)


def prepare(config: TrainConfig, inputs: Inputs) -> Setup:
    """Find device and precision, read and tokenise the data; UserError where one is wrong."""
    if config.cuda_graphs and rank_and_world()[1] > 1:
        raise UserError("cuda_graphs is given (expected one process, not torchrun's)")
    device, precision = compute_of(config.device, config.precision)
    if config.cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs is given but the device is {device}")
    use_measured_blocks()
    tokenizer = Tokenizer.from_folder(inputs.source.folder)
    rules = {key: getattr(config, key) for key in ("pairs", "quoting", "bad_rows", "limit")}
    train, dev = (
        load_tasks(inputs.folder, inputs.tasks.values(), split, tokenizer, **rules)
        for split in ("train", "dev")
    )
    find_route(device, precision)  # raises for a wrong FASTLORA_ROUTE before the run starts
    config = replace(config, precision=precision)
    return Setup(config, inputs, tokenizer, train, dev, device).narrow(config)


def seed_random(seed: int, device: torch.device) -> None:
    """Seed PyTorch's generators of the CPU and of the device."""
    # `torch.manual_seed` seeds other GPUs, too, and takes half a millisecond to look for devices.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@torch.random.fork_rng([])  # new layers draw random weights, which are then overwritten
def read_encoder(source: Source) -> Loaded:
    """Load the encoder of a model's folder; UserError if it has none that fits."""
    encoder, notes = load_encoder(source.folder, PARTS)
    return Loaded(encoder, fingerprint(encoder), notes)


def build_model(
    setup: Setup, tasks: Mapping[str, Task], config: TrainConfig
) -> tuple[MultitaskBert, str, list[str]]:
    """The model in fp32 with its trainable parts chosen by `config.mode`.

    The encoder is a copy of `setup.loaded`, or loaded now. Returns the model, the fingerprint of
    the encoder as loaded, and notes on the checkpoint. Raises UserError when the encoder does not
    fit the targets or the tasks' names.
    """
    base = deepcopy(setup.loaded) if setup.loaded else read_encoder(setup.inputs.source)
    encoder = base.encoder
    # Seeded after loading, so that heads and adapters are the same if the encoder is a copy.
    seed_random(config.seed, setup.device)
    encoder.encoder.recompute = config.grad_checkpoint
    model = MultitaskBert(encoder, tasks, config.pairs)
    if config.mode == "frozen":
        encoder.requires_grad_(False)
    elif config.mode == "full":
        # Sentences are mean-pooled, so BERT's pooler is in no loss.
        encoder.pooler.requires_grad_(False)
    else:
        names = adapter_names(config.adapters, tasks)
        model.adapt({name: config.task_settings(name).over(config.lora) for name in names})
    return model, base.sha256, base.notes


def to_compute(model: MultitaskBert, config: TrainConfig, device: torch.device) -> None:
    """Move a model to the device, its frozen weights in the compute dtype; compile it if asked."""
    dtype = DTYPES[config.precision]
    model.to(device)
    if config.mode != "full":
        for name, parameter in model.encoder.named_parameters():
            if not parameter.requires_grad and ".lora_" not in name:
                parameter.data = parameter.data.to(dtype)
    pack(model.encoder)  # allowed, because nobody changes its frozen weights
    if config.compile:
        model.encoder.encoder.compile(dynamic=True)


@contextmanager
def training(setup: Setup) -> Iterator[None]:
    """Run a block that trains while the runs of other threads wait.

    Restores the state of PyTorch's generators. Raises RunError, which says what to lower, if the
    memory runs out.
    """
    config, device = setup.config, setup.device
    ask = "" if config.grad_checkpoint else "pass --grad-checkpoint, "
    lower = f"lower --tokens-per-batch (it is {config.tokens_per_batch})"
    advice = f"{ask}{lower} or raise --accumulate (it is {config.accumulate})"
    devices = [device] if device.type == "cuda" else []
    with _TURNS, memory_errors(device, advice), torch.random.fork_rng(devices):
        yield


def compute_of(device: str, precision: Precision) -> tuple[torch.device, Precision]:
    """The device and compute dtype that --device and --precision mean on this machine.

    Raises UserError for a device that is not here, and for bf16 on a GPU before sm_80.
    """
    here = local_device(device)
    if here.type != "cuda":
        return here, "fp32" if precision == "auto" else precision
    modern = torch.cuda.get_device_capability(here) >= (8, 0)
    if precision == "bf16" and not modern:
        raise UserError("precision is 'bf16' but this GPU only emulates it; use --precision fp16")
    best: Precision = "bf16" if modern else "fp16"
    return here, best if precision == "auto" else precision


def find_route(device: torch.device, precision: Precision) -> Route:
    """The route of the kernels on a device, and why; UserError for a wrong FASTLORA_ROUTE."""
    with in_place_of(ValueError, UserError):
        return route(device, DTYPES[precision])
