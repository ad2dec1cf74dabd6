"""Several processes training as one: each computes a share of every batch, all hold the same keys and weights.

Gradients are summed in one flat vector after the backward pass instead of by DistributedDataParallel's hooks: shares of
any size are weighted exactly, by their queries that have a positive, and random numbers are drawn for the joint batch.
So the loss curve is that of one process with the joint batch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from cascade_engine.errors import CascadeError

LOST = re.compile("connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)
TIMEOUT = timedelta(hours=1)  # for a peer that neither answers nor closes its connection; making a cache takes long


@dataclass(frozen=True, kw_only=True)
class World:
    """How many processes train together, and which one this is."""

    size: int = 1
    rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


def share(count: int, world: World) -> slice:
    """The part of `count` items that this process has: consecutive, as equal as can be, the larger ones first."""
    each, more = divmod(count, world.size)
    start = world.rank * each + min(world.rank, more)
    return slice(start, start + each + (world.rank < more))


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that ``torchrun`` started, or be alone; leave at the end.

    Raises:
        CascadeError: another process was lost; the message says which one noticed.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        yield World()
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield World(size=size, rank=rank)
    except RuntimeError as error:
        if isinstance(error, CascadeError) or not LOST.search(str(error)):
            raise
        raise CascadeError(f"process {rank} of {size}: another process was lost ({_short(error)})") from error
    finally:
        dist.destroy_process_group()


def gather(value: torch.Tensor, count: int, world: World) -> torch.Tensor:
    """The shares (n, D) of all processes, one after the other, (count, D), without gradients."""
    if world.size == 1:
        return value
    parts = [World(size=world.size, rank=rank) for rank in range(world.size)]
    sizes = [len(range(count)[share(count, part)]) for part in parts]
    most = max(sizes)
    padded = value.new_zeros((most, *value.shape[1:]))
    padded[: len(value)] = value
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


def sum_gradients(module: nn.Module, extra: torch.Tensor, world: World) -> torch.Tensor:
    """Sum the gradients over all processes, in place; `extra` (n,) numbers travel along and come back summed."""
    if world.size == 1:
        return extra
    trained = [each for each in module.parameters() if each.requires_grad]
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    flat = torch.cat([*(each.flatten() for each in gradients), extra.to(gradients[0])])
    dist.all_reduce(flat)
    parts = torch.split(flat, [*(each.numel() for each in gradients), len(extra)])
    for each, total in zip(trained, parts, strict=False):
        each.grad = total.view_as(each)
    return parts[-1].to(extra)


def summed(counts: npt.NDArray[np.int64], world: World) -> npt.NDArray[np.int64]:
    """Counts summed over all processes."""
    if world.size == 1:
        return counts
    total = torch.from_numpy(counts).clone()
    if torch.cuda.is_available():
        total = total.cuda()
    dist.all_reduce(total)
    return total.cpu().numpy()


def average_statistics(modules: Iterable[nn.Module], world: World) -> None:
    """Average batch norm's running statistics over the processes.

    They move linearly, so averaging them before they are read gives what averaging at every step would.
    """
    if world.size == 1:
        return
    for module in modules:
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= world.size


def wait(world: World) -> None:
    """Until all processes are here."""
    if world.size > 1:
        dist.barrier()


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]
