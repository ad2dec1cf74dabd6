"""The desk beside the loop: counts, clocks, figures, checkpoints, and the wish to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cascade_engine.training import checkpoint
from cascade_engine.training.batches import Batch
from cascade_engine.training.interruption import Interruption
from cascade_engine.training.journal import Journal
from cascade_engine.training.metrics import Worth, worth
from cascade_engine.training.objective import Contrast, Outcome
from cascade_engine.training.parallel import World, average_statistics
from cascade_engine.training.run import Run
from cascade_engine.training.state import PhaseState

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training is.

    Args:
        number: of the phase, from 0.
        phase: its name.
        step: batches of the phase done.
        steps: batches of the phase in all.
        epoch: passes begun, from 1.
        loss: of the last optimiser step.
        precision: of the positives mined in this epoch, by labels that training does not read; None without.
        filled: share of the bank.
        clips_per_second: of all processes, over the last steps.
        mining_share: share of the time spent mining and on the loss's forward pass, over the last steps.
    """

    number: int
    phase: str
    step: int
    steps: int
    epoch: int
    loss: float
    precision: float | None
    filled: float
    clips_per_second: float
    mining_share: float


Report = Callable[[Progress], None]


@dataclass(kw_only=True)
class Desk:
    """What happens around the steps of one run.

    Args:
        run: the run.
        world: the processes that train together; the first one writes.
        interruption: whether someone wants to stop.
        report: called after every step of the first process.
        journal: where figures go; the first process has one.
        before: steps of the phases before this one.
    """

    run: Run
    world: World
    interruption: Interruption
    report: Report | None = None
    journal: Journal | None = None
    before: int = 0
    _since: float = 0.0
    _clips: int = 0
    _mining: float = 0.0
    _loss: float = 0.0
    _ended: list[dict[str, Any]] = field(default_factory=list)  # figures of epochs that ended within this step
    _warned: set[str] = field(default_factory=set)

    def begin(self, state: PhaseState) -> None:
        """A phase begins."""
        self._since, self._clips, self._mining, self._loss = time.perf_counter(), 0, 0.0, 0.0
        self._ended.clear()
        self._warned.clear()
        if self.world.first:
            log.info(
                "phase %s: %d videos, batches of %d, %d steps from step %d",
                state.phase.name,
                len(state.batches.rows),
                state.config.optim.batch,
                len(state.batches),
                state.item,
            )

    def count(self, state: PhaseState, batch: Batch, contrast: Contrast, outcome: Outcome, weight: float) -> None:
        """Count a batch whose gradients are made, before its keys enter the bank."""
        self._clips += len(batch.rows)
        self._mining += outcome.seconds
        self._loss += float(outcome.loss.detach()) * weight
        per_epoch = state.batches.per_epoch
        if state.item % per_epoch == 0:
            state.metrics.clear()
        done = state.item + 1
        ended, known = done % per_epoch == 0, None
        if outcome.positives is not None:
            bank, plan = state.bank.bank(), state.objective.plan
            state.metrics.add(outcome.positives, bank, contrast.video_id)
            if plan is not None and ended:
                queries = {**contrast.keys, state.phase.train: contrast.query.detach()}
                known = worth(plan, queries, bank, contrast.video_id, state.label)
        if ended:
            figures = state.metrics.merged(self.world).figures()
            self._ended.append({"epoch": done // per_epoch, **figures, **self._judged(known)})

    def tell(self) -> torch.Tensor:
        """What this process tells the others with its gradients: whether to stop, and its share of the loss."""
        told = torch.tensor([float(self.interruption.asked), self._loss])
        self._loss = 0.0
        return told

    def after_step(self, state: PhaseState, told: torch.Tensor) -> None:
        """The optimiser has stepped: write what is due.

        Args:
            state: the phase.
            told: what all processes told, summed.

        Raises:
            KeyboardInterrupt: one of them wants to stop; the step is saved.
        """
        stop, loss = told.tolist()
        state.losses.append(loss)
        output, last = state.config.output, state.item == len(state.batches)
        if self.journal is not None and self.report is not None:
            self.report(self._progress(state, loss))
        if self._ended or _due(state, output.log_every):
            self._write(state)
        if not last and (stop or _due(state, output.checkpoint_every)):
            self.save(state)
        if stop and not last:  # after the last step the phase is kept; the next one stops at once
            raise KeyboardInterrupt

    def save(self, state: PhaseState) -> None:
        """Write a checkpoint of the phase and delete the oldest."""
        average_statistics([state.encoder, state.momentum], self.world)
        if self.world.first:
            step = self.before + state.item
            path = checkpoint.step_path(self.run.checkpoints, step)
            checkpoint.save(path, {"step": step, "state": state.state_dict()})
            checkpoint.prune(self.run.checkpoints, state.config.output.keep)

    def _progress(self, state: PhaseState, loss: float) -> Progress:
        seconds = time.perf_counter() - self._since
        return Progress(
            number=state.number,
            phase=state.phase.name,
            step=state.item,
            steps=len(state.batches),
            epoch=(state.item - 1) // state.batches.per_epoch + 1,
            loss=loss,
            precision=state.metrics.figures().get("precision"),
            filled=state.bank.filled / state.bank.size,
            clips_per_second=self._clips / seconds,
            mining_share=self._mining / seconds,
        )

    def _write(self, state: PhaseState) -> None:
        """A row of figures; for each epoch that ended within the step one, with what its mining was worth."""
        progress = self._progress(state, sum(state.losses) / len(state.losses))
        row: dict[str, Any] = {
            "step": self.before + state.item,
            "phase": state.phase.name,
            "epoch": progress.epoch,
            "loss": progress.loss,
            "lr": state.optimizer.param_groups[0]["lr"],
            "filled": progress.filled,
            "clips_per_second": progress.clips_per_second,
            "mining_share": progress.mining_share,
        }
        if self.journal is not None:
            for figures in self._ended or [{}]:
                self.journal.write(row | figures)
        self._ended.clear()
        state.losses.clear()
        self._since, self._clips, self._mining = time.perf_counter(), 0, 0.0

    def _judged(self, known: Worth | None) -> dict[str, float]:
        """Figures of what the views are worth; what is wrong with them is said once a phase."""
        if known is None:
            return {}
        for warning in known.warnings():
            kind = warning.partition(":")[0]
            if kind not in self._warned and self.world.first:
                log.warning("%s", warning)
            self._warned.add(kind)
        row = {"agreement": known.agreement}
        if known.plan_precision is not None:
            row["plan_precision"] = known.plan_precision
            row["best_view_precision"] = max(known.precision.values())
        return row


def _due(state: PhaseState, every: int) -> bool:
    """Whether the optimiser step just done reached a multiple of `every` batches."""
    each = state.config.optim.accumulate
    return state.item // every > (state.item - each) // every
