"""How much the positives are worth: one net, one budget, trained with positives from different plans on MovingDigits.

The encoders are small nets on stored hand-made features (`moving_digits.digit_features`), trained by the loop below: a
batch of vectors is rows of a tensor here, so a seed of ten methods takes minutes where the video trainer, which cuts
every clip from frames and convolves it, would take hours. What is compared, the positives and the loss, is the
engine's: `KeyQueue`, `mine`, presets, `multi_positive_nce`, `MomentumEncoder`, the protocols of `evaluation`.

Source: Wu et al., CVPRW 2022, section 4 (the comparison); Han et al., NeurIPS 2020 (UberNCE, the supervised bound).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

import cascade_engine as ce
from cascade_engine.bank import Bank
from cascade_engine.errors import InvalidInput
from cascade_engine.loss import Siblings
from cascade_engine.mining import Positives
from cascade_engine.models.encoder import Encoder
from cascade_engine.models.momentum import MomentumEncoder
from cascade_engine.plan import CascadePlan

from .digit_nets import Budget, Oracle, clips, judge, network, oracle_of, worth
from .moving_digits import CLASSES, DigitFeatures
from .training_report import START, Row


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose positives.

    Args:
        name: in tables.
        positives: a plan preset, ``labels``, ``random``, or None for the own key alone.
        siblings: what the queue's keys of the query's own video are.
    """

    name: str
    positives: str | None
    siblings: Siblings = "positive"


METHODS = (
    Method(name="InfoNCE", positives=None, siblings="ignore"),
    Method(name="InfoNCE + siblings", positives=None),
    Method(name="random", positives="random"),
    Method(name="CoCLR", positives="coclr"),
    Method(name="CPR", positives="cpr"),
    Method(name="sum", positives="sum"),
    Method(name="zsum", positives="zsum"),
    Method(name="rrf", positives="rrf"),
    Method(name="min", positives="cma"),
    Method(name="UberNCE", positives="labels"),
)


def find(names: Sequence[str]) -> tuple[Method, ...]:
    """The methods of these names, in their order; all where none is named.

    Raises:
        InvalidInput: an unknown name.
    """
    known = {method.name.lower(): method for method in METHODS}
    for name in names:
        if name.lower() not in known:
            raise InvalidInput(f"method: expected one of {', '.join(m.name for m in METHODS)}, got {name!r}")
    return tuple(known[name.lower()] for name in names) or METHODS


def plans(budget: Budget) -> dict[str, CascadePlan]:
    """The methods that mine, by name, each with its plan."""
    return {
        method.name: CascadePlan.preset(method.positives, oracle=budget.other, trainee=budget.trainee, k=budget.k)
        for method in METHODS
        if method.positives not in (None, "labels", "random")
    }


def run_seed(
    data: DigitFeatures, budget: Budget, methods: Sequence[Method], seed: int, *, probe: bool
) -> Iterator[Row]:
    """Warm both views up by InfoNCE, then train every method from there.

    Returns:
        What is known, again after each method. ``views``: what the views are worth before (see `worth`); ``methods``:
        method to its figures, those before as ``start``; shares in [0, 1].
    """
    warm = {}
    for number, view in enumerate(("rgb", "flow")):
        torch.manual_seed(seed * 2 + number)
        fresh = network(clips(data, view).shape[-1], budget)
        trainer = Trainer(data, budget, METHODS[0], view, fresh, oracle=None, seed=seed)
        warm[view] = trainer.run(budget.warm)
    shown = oracle_of(warm[budget.other], budget, seed)
    found: Row = {"views": worth(data, budget, warm[budget.trainee], shown, plans(budget)), "methods": {}}
    found["methods"][START] = judge(warm[budget.trainee], data, budget.trainee, probe=probe)
    yield found
    for method in methods:
        torch.manual_seed(seed + 7)  # the same dropout for all
        begun = copy.deepcopy(warm[budget.trainee])
        shown = oracle_of(warm[budget.other], budget, seed)
        trainer = Trainer(data, budget, method, budget.trainee, begun, oracle=shown, seed=seed + 7)
        encoder = trainer.run(budget.epochs)
        judged = judge(encoder, data, budget.trainee, probe=probe)
        found["methods"][method.name] = {"precision": trainer.precision, **judged}
        yield found


def summary(figures: Row) -> str:
    """One method's figures in a line, in percent."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in figures.items() if value is not None)


class Trainer:
    """One view's encoder, its momentum copy and its queue, trained with one method's positives.

    Args:
        data: the clips' features and their videos' labels; labels choose positives for ``labels`` alone.
        budget: the settings.
        method: whose positives.
        view: the view trained.
        encoder: trained in place.
        oracle: embeds the other view; None where the method mines nothing.
        seed: of the order, of the clips chosen and of the keys dropped.
    """

    def __init__(
        self,
        data: DigitFeatures,
        budget: Budget,
        method: Method,
        view: str,
        encoder: Encoder,
        oracle: Oracle | None,
        seed: int,
    ) -> None:
        self.budget, self.method, self.view, self.oracle = budget, method, view, oracle
        self.clips = {name: clips(data, name) for name in ("rgb", "flow")}
        self.label = torch.from_numpy(data.train_label)
        self.encoder, self.key_encoder = encoder.train(), MomentumEncoder(encoder, budget.momentum)
        self.generator = torch.Generator().manual_seed(seed)
        dims = {view: budget.dim} | ({} if oracle is None else {budget.other: budget.dim})
        self.queue = ce.KeyQueue(budget.queue, dims)
        self.plan = plans(budget).get(method.name)
        self.optimizer = torch.optim.AdamW(encoder.parameters(), lr=budget.lr, weight_decay=1e-3)
        self.right = self.mined = 0

    @property
    def precision(self) -> float | None:
        """The last epoch's positives of the query's class; None where none were chosen."""
        return self.right / self.mined if self.mined else None

    def run(self, epochs: int) -> Encoder:
        """Train; the last batch of an epoch is left out where it would be smaller."""
        count, size = len(self.label), self.budget.batch
        steps, step = epochs * (count // size), 0
        for _ in range(epochs):
            order = torch.randperm(count, generator=self.generator)
            self.right = self.mined = 0
            for first in range(0, count - size + 1, size):
                rate = self.budget.lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.step(order[first : first + size])
                step += 1
        return self.encoder

    def step(self, rows: torch.Tensor) -> None:
        """One optimiser step on the videos `rows`, then their keys are pushed."""
        choice = torch.randint(self.clips[self.view].shape[1], (2, len(rows)), generator=self.generator)
        query = self.encoder(self.clips[self.view][rows, choice[0]])
        keys = {self.view: self.key_encoder(self.clips[self.view][rows, choice[1]])}
        if self.oracle is not None:
            keys[self.budget.other] = self.oracle(self.clips[self.budget.other][rows, choice[1]])
        bank = self.queue.bank()
        found = self.positives({**keys, self.view: query.detach()}, rows, bank)
        loss = ce.multi_positive_nce(
            query,
            keys[self.view],
            bank,
            found or Positives(index=torch.full((len(rows), 1), -1), similarity=torch.zeros(len(rows), 1)),
            view=self.view,
            temperature=self.budget.temperature,
            self_positive="always" if found is None else self.budget.drop,
            siblings=self.method.siblings,
            query_video_id=rows,
            generator=self.generator,
        )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.key_encoder.follow(self.encoder)
        self.queue.push(keys, rows, label=self.label[rows])

    def positives(self, queries: dict[str, torch.Tensor], rows: torch.Tensor, bank: Bank) -> Positives | None:
        """The method's positives in a full queue, counted; None before, and where the own key is the only one."""
        if self.method.positives is None or bank.size < self.budget.queue:
            return None
        video, label = torch.as_tensor(bank.video_id), torch.as_tensor(bank.label)
        others = video[None] != rows[:, None]
        alike = label[None] == self.label[rows][:, None]
        if self.plan is not None:
            found = ce.mine(self.plan, {name: queries[name] for name in self.plan.views}, bank, rows)
        else:
            score = torch.rand(others.shape, generator=self.generator)
            allowed = others & alike if self.method.positives == "labels" else others
            k = int(allowed.sum(1).max()) if self.method.positives == "labels" else self.budget.k
            best = score.masked_fill(~allowed, -1).topk(max(k, 1), 1)
            found = Positives(index=best.indices.where(best.values >= 0, -1), similarity=best.values)
        there = found.index >= 0
        self.mined += int(there.sum())
        self.right += int((alike.gather(1, found.index.clamp(min=0)) & there).sum())
        return found


def run(
    data: DigitFeatures,
    budget: Budget,
    methods: Sequence[Method],
    seeds: Sequence[int],
    *,
    probe: bool = True,
    report: Callable[[str], None],
    keep: Callable[[Row], None] | None = None,
) -> Row:
    """Every method with every seed.

    Args:
        data: one data set for all seeds: they vary the weights, the order and the clips.
        budget: the same for all.
        methods: which.
        seeds: which.
        probe: whether the linear probe, a third of the time, is fitted too.
        report: told of every method trained.
        keep: given the results after each method, so that a long run can be read while it goes on.

    Returns:
        ``budget``, ``data``, and ``seeds``: seed to what `run_seed` found.
    """
    results: Row = {
        "budget": asdict(budget),
        "data": {"train": len(data.train_label), "test": len(data.test_label), "classes": CLASSES},
        "seeds": {},
    }
    for seed in seeds:
        for found in run_seed(data, budget, methods, seed, probe=probe):
            results["seeds"][str(seed)] = found
            name, figures = list(found["methods"].items())[-1]
            report(f"seed {seed}: {name}: {summary(figures)}")
            if keep is not None:
                keep(results)
    return results
