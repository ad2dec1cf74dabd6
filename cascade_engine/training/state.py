"""Everything that a phase changes while it trains, so that a checkpoint of it is the whole of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cascade_engine.errors import CheckpointError
from cascade_engine.models import MomentumEncoder, load_weights
from cascade_engine.models.norm import group_batch_norm
from cascade_engine.training.banks import make_bank
from cascade_engine.training.batches import Batches
from cascade_engine.training.config import OptimConfig
from cascade_engine.training.metrics import MiningMetrics
from cascade_engine.training.objective import Objective
from cascade_engine.training.parallel import World
from cascade_engine.training.phases import start_weights
from cascade_engine.training.positives import PositiveVideos
from cascade_engine.training.run import Run
from cascade_engine.video.augment import Augment
from cascade_engine.video.cache import ClipCache


class PhaseState:
    """One phase of a run: encoders, optimiser, bank, batches and counters.

    Args:
        run: the run; earlier phases' weights are read from it.
        number: the phase, from 0.
        cache: the videos.
        augment: makes training clips.
        world: the processes that train together.
        device: where encoders and bank live.
    """

    def __init__(
        self, run: Run, number: int, cache: ClipCache, augment: Augment, world: World, device: torch.device
    ) -> None:
        config, phase = run.config, run.config.phase[number]
        self.config, self.phase, self.number = config, phase, number
        self.batches = Batches(cache, config, number, augment, world)
        trained, self.oracles = start_weights(run, number)
        groups = max(1, config.model.norm_groups // world.size)
        self.encoder = group_batch_norm(trained, groups).to(device)
        self.momentum = MomentumEncoder(self.encoder, config.model.momentum)
        for oracle in self.oracles.values():
            oracle.to(device)
        if config.optim.compile:
            for module in (self.encoder, self.momentum.encoder, *self.oracles.values()):
                module.compile()
        self.optimizer = make_optimizer(config.optim, phase.lr, self.encoder)
        rows = torch.from_numpy(self.batches.rows)
        chosen = replace(config.bank, size=phase.bank_size or config.bank.size)
        self.bank = make_bank(chosen, phase.views, config.model.dim, rows, device)
        table = None if phase.positives in ("plan", "labels") else PositiveVideos.read(phase.positives)
        self.objective = Objective(phase=phase, loss=config.loss, plan=phase.cascade(), table=table)
        self.label, group = classes(cache)
        self.metrics = MiningMetrics(self.label, group, self.batches.rows)
        self.item = 0  # batches done
        self.keys: dict[str, torch.Tensor] = {}  # view to (B, D), of the batch under way
        self.losses: list[float] = []  # of the optimiser steps since the last row of figures

    @property
    def mining(self) -> bool:
        """Whether the bank is full enough to mine in."""
        return self.bank.filled >= max(1, self.phase.mine_from * self.bank.size)

    def state_dict(self) -> dict[str, Any]:
        """The whole of the phase between two batches."""
        return {
            "phase": self.phase.name,
            "item": self.item,
            "encoder": self.encoder.state_dict(),
            "momentum": self.momentum.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bank": self.bank.state_dict(),
            "metrics": self.metrics.state_dict(),
            "losses": list(self.losses),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: it is of another phase, or its weights do not fit; missing and extra ones are listed.
        """
        if state["phase"] != self.phase.name:
            raise CheckpointError(f"{source}: expected phase {self.phase.name!r}, got {state['phase']!r}")
        load_weights(self.encoder, state["encoder"], source)
        load_weights(self.momentum.encoder, state["momentum"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        self.bank.load_state_dict(state["bank"])
        self.metrics.load_state_dict(state["metrics"])
        self.item, self.losses = state["item"], list(state["losses"])
        torch.set_rng_state(state["random"].cpu())


def make_optimizer(config: OptimConfig, lr: float, module: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimiser that a config asks for, over the module's parameters."""
    weights, decay = module.parameters(), config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(weights, lr=lr, weight_decay=decay)


def classes(cache: ClipCache) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(V,) the class of each video of the index, -1 where unknown; (V,) the number of its recording."""
    names = sorted({entry.label for entry in cache.index if entry.label})
    code = {name: number for number, name in enumerate(names)}
    groups: dict[Any, int] = {}
    label = [code.get(entry.label or "", -1) for entry in cache.index]
    group = [groups.setdefault(entry.group or entry.video_id, len(groups)) for entry in cache.index]
    return np.array(label, np.int64), np.array(group, np.int64)
