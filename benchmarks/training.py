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
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import cascade_engine as ce
from cascade_engine.bank import Bank
from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import FeatureSet
from cascade_engine.evaluation.neighbours import retrieval
from cascade_engine.evaluation.probe import linear_probe
from cascade_engine.loss import Siblings
from cascade_engine.mining import Positives
from cascade_engine.models.encoder import Encoder
from cascade_engine.models.momentum import MomentumEncoder
from cascade_engine.plan import CascadePlan

from .moving_digits import CLASSES, DigitFeatures

Row = dict[str, Any]
FIGURES = ("precision", "R@1", "R@5", "probe")
NAMES = tuple(f"digit {c // 6}, motion {c % 6}" for c in range(CLASSES))


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


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets alike.

    Args:
        trainee: the view trained and judged; the other one is the oracle.
        oracle: ``learned`` (by InfoNCE, then frozen), ``noise`` (random unit vectors) or ``collapsed`` (the learned
            one's vectors in a narrow cone).
        queue: keys.
        warm: epochs of InfoNCE per view before the methods begin.
        epochs: of each method.
        batch: clips.
        k: positives per query.
        lr: highest learning rate, of a cosine schedule.
        momentum: of the key encoder.
        temperature: of the loss.
        drop: probability that the own key leaves the positives where there are others.
        width: of the net's layers.
        dim: of the embedding.
    """

    trainee: Literal["rgb", "flow"] = "rgb"
    oracle: Literal["learned", "noise", "collapsed"] = "learned"
    queue: int = 2048
    warm: int = 12
    epochs: int = 20
    batch: int = 64
    k: int = 5
    lr: float = 1e-3
    momentum: float = 0.99
    temperature: float = 0.1
    drop: float = 0.9
    width: int = 256
    dim: int = 64

    @property
    def other(self) -> str:
        """The oracle's view."""
        return "flow" if self.trainee == "rgb" else "rgb"


def find(names: Sequence[str]) -> tuple[Method, ...]:
    """The methods of these names, in the table's order; all where none is named.

    Raises:
        InvalidInput: an unknown name.
    """
    known = {method.name.lower(): method for method in METHODS}
    for name in names:
        if name.lower() not in known:
            raise InvalidInput(f"method: expected one of {', '.join(m.name for m in METHODS)}, got {name!r}")
    wanted = {name.lower() for name in names}
    return tuple(method for name, method in known.items() if not wanted or name in wanted)


def run_seed(
    data: DigitFeatures, budget: Budget, methods: Sequence[Method], seed: int, report: Callable[[str], None]
) -> dict[str, Row]:
    """Warm both views up by InfoNCE, then train every method from there; method to its figures, shares in [0, 1]."""
    warm = {}
    for number, view in enumerate(("rgb", "flow")):
        torch.manual_seed(seed * 2 + number)
        fresh = network(clips(data, view).shape[-1], budget)
        trainer = Trainer(data, budget, METHODS[0], view, fresh, oracle=None, seed=seed)
        warm[view] = trainer.run(budget.warm)
    oracle = oracle_of(warm[budget.other], budget, seed)
    found: dict[str, Row] = {"start": judge(warm[budget.trainee], data, budget)}
    report(f"seed {seed}: start: {summary(found['start'])}")
    for method in methods:
        torch.manual_seed(seed + 7)  # the same dropout for all
        begun = copy.deepcopy(warm[budget.trainee])
        trainer = Trainer(data, budget, method, budget.trainee, begun, oracle=oracle, seed=seed + 7)
        encoder = trainer.run(budget.epochs)
        found[method.name] = {"precision": trainer.precision, **judge(encoder, data, budget)}
        report(f"seed {seed}: {method.name}: {summary(found[method.name])}")
    return found


def summary(figures: Row) -> str:
    """One method's figures in a line, in percent."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in figures.items() if value is not None)


def clips(data: DigitFeatures, view: str) -> torch.Tensor:
    """The varied clips of the training videos, (N, A, D)."""
    return torch.from_numpy(data.varied_rgb if view == "rgb" else data.varied_flow)


def network(inputs: int, budget: Budget) -> Encoder:
    """A net of two layers with a projection head, its weights drawn from torch's generator."""
    width = budget.width
    layers = [nn.Dropout(0.2), nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
    layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return Encoder(nn.Sequential(*layers), width, budget.dim)


Oracle = Callable[[torch.Tensor], torch.Tensor]


def oracle_of(encoder: Encoder, budget: Budget, seed: int) -> Oracle:
    """The frozen second view: clips' features (B, D) to embeddings (B, dim)."""
    frozen = copy.deepcopy(encoder).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 11)
    axis = nn.functional.normalize(torch.randn(1, budget.dim, generator=generator))

    def embed(clips: torch.Tensor) -> torch.Tensor:
        if budget.oracle == "noise":
            return nn.functional.normalize(torch.randn(len(clips), budget.dim, generator=generator))
        found: torch.Tensor = frozen(clips)
        return found if budget.oracle == "learned" else nn.functional.normalize(axis + 0.05 * found)

    return embed


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
        self.plan = None
        if method.positives not in (None, "labels", "random"):
            self.plan = CascadePlan.preset(method.positives, oracle=budget.other, trainee=view, k=budget.k)
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


@torch.no_grad()
def judge(encoder: Encoder, data: DigitFeatures, budget: Budget) -> Row:
    """Retrieval and linear probe of the backbone's features, a video's clips averaged."""
    encoder.eval()

    def features(cuts: npt.NDArray[np.float32], label: npt.NDArray[np.int64]) -> FeatureSet:
        values = torch.from_numpy(cuts)
        found = encoder.backbone(values.flatten(0, 1)).unflatten(0, values.shape[:2])
        mean = nn.functional.normalize(found, dim=-1).mean(1).numpy()
        return FeatureSet(values=mean, label=label, video_id=np.arange(len(label)), classes=NAMES)

    rgb = budget.trainee == "rgb"
    test = features(data.test_rgb if rgb else data.test_flow, data.test_label)
    train = features(data.train_rgb if rgb else data.train_flow, data.train_label)
    found = retrieval(test, train, ks=(1, 5)).figures
    with torch.enable_grad():
        probe = linear_probe(test, train, strengths=(1e-4, 1e-3, 1e-2)).figures["accuracy"]
    return {"R@1": found["R@1"], "R@5": found["R@5"], "probe": probe}


def run(
    data: DigitFeatures,
    budget: Budget,
    methods: Sequence[Method],
    seeds: Sequence[int],
    *,
    report: Callable[[str], None],
    keep: Callable[[Row], None] | None = None,
) -> Row:
    """Every method with every seed.

    Args:
        data: one data set for all seeds: they vary the weights, the order and the clips.
        budget: the same for all.
        methods: which.
        seeds: which.
        report: told of every method trained.
        keep: given the results after each seed, so that a long run can be read while it goes on.

    Returns:
        ``budget``, ``data``, and ``seeds``: seed to method to figures.
    """
    results: Row = {
        "budget": asdict(budget),
        "data": {"train": len(data.train_label), "test": len(data.test_label), "classes": CLASSES},
        "seeds": {},
    }
    for seed in seeds:
        results["seeds"][str(seed)] = run_seed(data, budget, methods, seed, report)
        if keep is not None:
            keep(results)
    return results


def column(results: Row, method: str, figure: str) -> list[float]:
    """A method's figure, seed by seed, in percent; seeds without it are left out."""
    rows = [found[method] for found in results["seeds"].values() if method in found]
    return [100 * row[figure] for row in rows if row.get(figure) is not None]


def spread(values: Sequence[float]) -> str:
    """Mean +- standard deviation over seeds."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(results: Row) -> str:
    """A Markdown table: a row per method, mean ± standard deviation over seeds, in percent; R@1 against CoCLR's."""
    lines = [
        "| positives | mining precision | R@1 | R@5 | linear probe | R@1 - CoCLR's, seed by seed |",
        "|---|" + "---:|" * 5,
    ]
    base = column(results, "CoCLR", "R@1")
    for name in methods_of(results):
        own = column(results, name, "R@1")
        paired = ""
        if name not in ("CoCLR", "start") and len(base) == len(own):
            differences = [a - b for a, b in zip(own, base, strict=True)]
            paired = f"{spread(differences)}, above in {sum(d > 0 for d in differences)} of {len(differences)}"
        cells = [spread(column(results, name, figure)) for figure in FIGURES]
        lines.append("| " + " | ".join([name, *cells, paired]) + " |")
    return "\n".join(lines)


def methods_of(results: Row) -> list[str]:
    """The methods in results, in the order trained."""
    return list(dict.fromkeys(name for found in results["seeds"].values() for name in found))
