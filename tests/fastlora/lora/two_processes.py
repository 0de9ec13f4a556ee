"""Two processes on CPUs that train one model by DDP and FSDP2, and compare it with one process.

    python two_processes.py FOLDER

Exits with 1, and says where they differ, unless they agree on every route.
"""

import gc
import os
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastlora import LoraConfig, inject, set_adapter
from fastlora.kernels import forced_route

# Rows of each process in each step; one of them has none for once.
ROWS = [(6, 6), (12, 0), (5, 7)]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
    configs = {name: LoraConfig(r=3, dropout=0.0, targets="0.0") for name in ("a", "b")}
    for layer in inject(model, configs, train=("0.0.bias", "1.0")).values():
        for B in layer.lora_B.values():
            nn.init.normal_(B, std=0.1)
    set_adapter(model, "a", "b")
    return model


def train(model, rank=None):
    """Each process's loss counts its own rows; averaged gradients are those of all of them."""
    data = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for first, second in ROWS:
        whole = rank is None
        x = data if whole else data.split([first, second])[rank]
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().sum() / 12
        (loss if whole else 2 * loss).backward()
        optimizer.step()
    state = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in state.items()}


def written_together():
    """How far a layer's output is off after collective writes to its weight."""
    model, x = build()[0], torch.ones(3, 8)
    set_adapter(model)
    model(x)
    with torch.no_grad():
        model[0].weight.add_(dist.get_rank())
        for write in (dist.all_reduce, lambda weight: dist.broadcast(weight, 0)):
            write(model[0].weight.data)
            plain = F.linear(x, model[0].weight, model[0].bias).tanh()
            yield (model(x) - plain).abs().max().item()


def compare(rank, how, expected):
    """Train in two processes; where all is freed before the processes part."""
    model = build()
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    found = train(model, rank)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=partial("{}: {}".format, name))


def work(rank, folder):
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/meeting", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **meeting)
    for route in ("reference", "gemm"):
        with forced_route(route):
            expected = train(build())
            for how in ("ddp", "fsdp"):
                compare(rank, how, expected)
    assert max(written_together()) < 1e-5
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank}: ddp agrees, fsdp agrees", flush=True)
    os._exit(0)  # where gloo's threads cannot hang


if __name__ == "__main__":
    mp.start_processes(work, args=tuple(sys.argv[1:]), nprocs=2, start_method="fork")
