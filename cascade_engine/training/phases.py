"""The phase controller: which weights a phase starts from, and what it says about itself."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from cascade_engine.errors import InvalidInput
from cascade_engine.models import Encoder
from cascade_engine.plan import PRESETS
from cascade_engine.training.config import PhaseConfig, TrainConfig
from cascade_engine.training.run import INITIAL, Run, fresh_encoder

log = logging.getLogger(__name__)
LATE = 0.5  # share of a phase without mining that is worth a word


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """A phase, said in words.

    Args:
        number: from 1.
        name: its own.
        train: the view trained.
        inherits: the phase that its first weights come from.
        oracles: each oracle view with the phase that its weights come from.
        positives: how they are found, and how many.
        epochs: passes over the training videos.
        lr: the schedule, which starts anew in every phase.
    """

    number: int
    name: str
    train: str
    inherits: str
    oracles: str
    positives: str
    epochs: int
    lr: str


def phase_rows(config: TrainConfig) -> list[PhaseRow]:
    """The phases of a config, each with what it inherits."""
    rows = []
    for number, phase in enumerate(config.phase):
        rows.append(
            PhaseRow(
                number=number + 1,
                name=phase.name,
                train=phase.train,
                inherits=source(config, number, phase.train, phase.inherit),
                oracles=", ".join(
                    f"{view} of {source(config, number, view, phase.oracle_from)}" for view in phase.oracles
                ),
                positives=_positives(phase),
                epochs=phase.epochs,
                lr=f"{phase.lr:g} {phase.schedule}",
            )
        )
    return rows


def _positives(phase: PhaseConfig) -> str:
    if phase.positives == "labels":
        return "all of the label"
    if phase.positives != "plan":
        return f"table {phase.positives}"
    plan = phase.cascade()
    keys = {"same": "", "cross": f", keys of {''.join(phase.oracles[:1])}", "both": ", keys of both views"}[phase.pairs]
    if plan is None:
        return f"own key{keys}"
    return (f"{phase.plan}, k = {plan.counts(1 << 30)[-1]}" if phase.plan in PRESETS else str(plan)) + keys


def keys_to_mine(config: TrainConfig, number: int, videos: int) -> int:
    """Keys that the bank of phase `number` (from 0) must hold before positives are looked for in it."""
    phase = config.phase[number]
    size = videos if config.bank.kind == "indexed" else phase.bank_size or config.bank.size
    return max(1, math.ceil(phase.mine_from * size))


def first_mining(config: TrainConfig, number: int, videos: int, per_epoch: int) -> int:
    """The batches of phase `number` (from 0) that are over when mining begins, at the earliest; perhaps all of them.

    Args:
        config: the run's.
        number: of the phase.
        videos: trained on.
        per_epoch: batches in a pass over them.
    """
    batch = config.optim.batch
    passes, more = divmod(keys_to_mine(config, number, videos), min(videos, per_epoch * batch))
    return passes * per_epoch + math.ceil(more / batch)


def judge_mining(config: TrainConfig, videos: int, per_epoch: int, *, refuse: bool) -> None:
    """Say which phases mine late or never: with few videos a phase may end before its bank is full.

    Args:
        config: the run's.
        videos: trained on.
        per_epoch: batches in a pass over them.
        refuse: raise where a phase never mines; else only warn.

    Raises:
        InvalidInput: a phase is to find positives and would never begin to.
    """
    for number, phase in enumerate(config.phase):
        first, steps = first_mining(config, number, videos, per_epoch), per_epoch * phase.epochs
        if (not phase.plan and phase.positives == "plan") or first <= LATE * steps:
            continue
        told = (
            f"phase.{number + 1}: {phase.epochs} epochs of {videos} videos are {steps} batches, and the "
            f"{keys_to_mine(config, number, videos)} keys that its bank must hold to be mined in come after {first}"
        )
        if first >= steps and refuse:
            raise InvalidInput(f"{told}: it would never mine; lower its mine_from or bank_size, or raise its epochs")
        log.warning("%s", told + (": it never mines" if first >= steps else ""))


def source(config: TrainConfig, number: int, view: str, wanted: str) -> str:
    """The phase whose weights `view` has at the start of phase `number` (from 0).

    Args:
        config: the run's.
        number: of the phase that begins.
        view: whose weights.
        wanted: ``latest``, ``initial`` or a phase's name: `view` as it was after that phase.
    """
    if wanted == INITIAL:
        return INITIAL
    names = [each.name for each in config.phase]
    upto = number if wanted == "latest" else names.index(wanted) + 1
    trained = [each.name for each in config.phase[:upto] if each.train == view]
    return trained[-1] if trained else INITIAL


def start_weights(run: Run, number: int) -> tuple[Encoder, dict[str, Encoder]]:
    """The trained view's encoder and the frozen oracles, as phase `number` (from 0) inherits them."""
    config, phase = run.config, run.config.phase[number]
    trained = run.encoder(phase.train, source(config, number, phase.train, phase.inherit))
    oracles = {
        view: run.encoder(view, source(config, number, view, phase.oracle_from)).requires_grad_(False)
        for view in phase.oracles
    }
    return trained.train(), oracles


def make_initial(run: Run) -> None:
    """Draw every view's first weights from the seed and keep them as the phase ``initial``."""
    config = run.config
    encoders = {}
    with torch.random.fork_rng(devices=[]):
        for number, view in enumerate(config.views):
            torch.manual_seed(config.seed * 1009 + number)
            encoders[view] = fresh_encoder(config, view)
    run.save_encoders(INITIAL, encoders)
