"""The phase controller: which weights a phase starts from, and what it says about itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cascade_engine.models import Encoder
from cascade_engine.plan import PRESETS
from cascade_engine.training.config import PhaseConfig, TrainConfig
from cascade_engine.training.run import INITIAL, Run, fresh_encoder


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
