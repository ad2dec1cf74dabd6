"""What a training step asks of the engine: the positives of a batch of queries, and the loss with them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cascade_engine.bank import Bank
from cascade_engine.loss import SelfPositive, multi_positive_nce
from cascade_engine.mining import Positives, mine
from cascade_engine.plan import CascadePlan
from cascade_engine.training.config import LossConfig, PhaseConfig
from cascade_engine.training.positives import PositiveVideos, members


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One batch, ready to be contrasted.

    Args:
        query: (B, D), the trained view's embeddings, with gradients.
        keys: view to (B, D), the queries' own keys.
        video_id: (B,) of the queries.
        label: (B,) of the queries, -1 where unknown; read where the phase is supervised, and nowhere else.
        spoilt: (M, D), further negatives of every query, or None.
        companions: view to (N, D), the keys of the whole batch, of which those of other videos are negatives; or None.
        companion_id: (N,) their videos.
        first: the place of the first of these queries in the joint batch of all processes.
        joint: queries of the joint batch; 0: these are all.
    """

    query: torch.Tensor
    keys: Mapping[str, torch.Tensor]
    video_id: torch.Tensor
    label: torch.Tensor
    spoilt: torch.Tensor | None = None
    companions: Mapping[str, torch.Tensor] | None = None
    companion_id: torch.Tensor | None = None
    first: int = 0
    joint: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A batch's loss and how it came about.

    Args:
        loss: scalar, the mean over the queries that have a positive.
        counted: how many have one; without ``self_positive = "never"`` all.
        positives: what was found in the bank; None while nothing is mined.
        seconds: spent mining and on the loss's forward pass.
    """

    loss: torch.Tensor
    counted: int
    positives: Positives | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A phase's way to contrast: whose positives, against which keys.

    Args:
        phase: the phase.
        loss: the loss's options.
        plan: mines the positives; None: own keys alone.
        table: positives mined offline, instead of a plan.
    """

    phase: PhaseConfig
    loss: LossConfig
    plan: CascadePlan | None
    table: PositiveVideos | None = None

    def __call__(self, batch: Contrast, bank: Bank, *, mining: bool, generator: torch.Generator | None) -> Outcome:
        """Find the batch's positives in the bank and contrast with them.

        Args:
            batch: queries and keys.
            bank: the keys to contrast with, without the batch's own.
            mining: whether the bank is full enough to mine in.
            generator: draws which own keys are dropped, for the joint batch of all processes.
        """
        started = time.perf_counter()
        found = self._positives(batch, bank) if mining else None
        both = (self.phase.train, *self.phase.oracles[:1])
        views = {"same": both[:1], "cross": both[1:], "both": both}[self.phase.pairs]
        losses = [self._loss(batch, bank, found, view, generator) for view in views]
        counted = len(batch.query) if found is None else self._counted(batch, bank, found)
        loss, seconds = torch.stack(losses).mean(), time.perf_counter() - started
        return Outcome(loss=loss, counted=counted, positives=found, seconds=seconds)

    def _counted(self, batch: Contrast, bank: Bank, found: Positives) -> int:
        """Queries whose loss counts; positives are of other videos than the query's, so each is a member of P."""
        if self.loss.self_positive != "never":
            return len(batch.query)
        some = (torch.as_tensor(found.index, device=batch.query.device) >= 0).any(1)
        if self.loss.siblings == "positive":
            some |= torch.isin(batch.video_id, torch.as_tensor(bank.video_id, device=batch.video_id.device))
        return int(some.sum())

    def _positives(self, batch: Contrast, bank: Bank) -> Positives | None:
        if self.phase.positives == "labels":
            return same_label(batch.label, batch.video_id, bank)
        if self.table is not None:
            return self.table.find(batch.video_id, bank)
        if self.plan is None:
            return None
        queries = {view: key for view, key in batch.keys.items() if view in self.plan.views}
        if self.phase.anchor == "query" and self.phase.train in self.plan.views:
            queries[self.phase.train] = batch.query.detach().to(batch.keys[self.phase.train].dtype)
        return mine(self.plan, queries, bank, batch.video_id)

    def _loss(
        self, batch: Contrast, bank: Bank, found: Positives | None, view: str, generator: torch.Generator | None
    ) -> torch.Tensor:
        if batch.companions is not None:
            bank = with_negatives(bank, view, batch.companions[view], batch.companion_id)
        if batch.spoilt is not None and view == self.phase.train:
            bank = with_negatives(bank, view, batch.spoilt)
        own_key: SelfPositive = self.loss.self_positive if found is not None else "always"
        if not isinstance(own_key, str):
            drawn = torch.rand(batch.joint or len(batch.query), generator=generator, device=batch.query.device)
            own_key = drawn[batch.first : batch.first + len(batch.query)] < own_key
        nothing = torch.full((len(batch.query), 1), -1, device=batch.query.device)
        return multi_positive_nce(
            batch.query,
            batch.keys[view],
            bank,
            found or Positives(index=nothing, similarity=nothing.float()),
            view=view,
            temperature=self.loss.temperature,
            reduction=self.loss.reduction,
            self_positive=own_key,
            siblings=self.loss.siblings,
            query_video_id=batch.video_id,
        )


def with_negatives(bank: Bank, view: str, negatives: torch.Tensor, video_id: torch.Tensor | None = None) -> Bank:
    """The bank's keys of one view, and `negatives` (M, D) after them; without `video_id` (M,) they are nobody's."""
    keys = torch.as_tensor(bank.keys[view])
    whose = torch.full((len(negatives),), -2) if video_id is None else video_id
    return Bank(
        {view: torch.cat([keys, negatives.to(keys)])},
        torch.cat([torch.as_tensor(bank.video_id), whose.to(keys.device)]),
        metric=bank.metric,
        checked=True,
        guard=bank.ensure_fresh,
    )


def same_label(label: torch.Tensor, video_id: torch.Tensor, bank: Bank) -> Positives:
    """All keys of a query's own label from other videos, in slot order: the supervised bound (UberNCE)."""
    match = (label[:, None] == torch.as_tensor(bank.label)[None]) & (label[:, None] >= 0)
    return members(match & (video_id[:, None] != torch.as_tensor(bank.video_id)[None]))
