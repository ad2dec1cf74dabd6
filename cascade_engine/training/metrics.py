"""How good the mined positives are, by labels that training itself never reads, and what the oracle is worth.

Source: METHOD section 5; Wu et al., CVPRW 2022, section 4 (PMR: mining precision, CMR: class mining recall).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cascade_engine.bank import Bank
from cascade_engine.errors import CascadeError
from cascade_engine.mining import Positives, mine
from cascade_engine.plan import CascadePlan
from cascade_engine.training.parallel import World, summed

Ids = npt.NDArray[np.int64]


class MiningMetrics:
    """Counts of one epoch's mining events, by video.

    Args:
        label: (V,) class of each video of the index, -1 where unknown.
        group: (V,) number of the recording that each video was cut from.
        trained: (N,) the videos that can be mined.
    """

    def __init__(self, label: Ids, group: Ids, trained: Ids) -> None:
        self.label, self.group, self.trained = label, group, trained
        self.clear()

    def clear(self) -> None:
        """Begin an epoch."""
        self.chosen = np.zeros(len(self.label), np.int64)  # times that a video was mined
        self.hit = np.zeros(len(self.label), np.int64)  # times that it was so rightly
        self.events = self.mined = self.right = self.first_right = 0

    def add(self, found: Positives, bank: Bank, video_id: torch.Tensor) -> None:
        """Count the positives of a batch of queries.

        Args:
            found: index (B, k) into the bank, best first.
            bank: it was mined in, with video ids.
            video_id: (B,) of the queries.

        Raises:
            CascadeError: a positive is of the query's own video.
        """
        index = torch.as_tensor(found.index).cpu().numpy()
        videos = torch.as_tensor(bank.video_id).cpu().numpy()
        there = index >= 0
        chosen = np.where(there, videos[np.where(there, index, 0)], -1)
        query = video_id.cpu().numpy()
        if (chosen == query[:, None]).any():
            raise CascadeError("mining: a positive is of its query's own video, which no plan may choose")
        known = self.label[query] >= 0
        right = there & known[:, None] & (self.label[chosen] == self.label[query][:, None])
        np.add.at(self.chosen, chosen[there], 1)
        np.add.at(self.hit, chosen[right], 1)
        self.events += int((known & there.any(1)).sum())
        self.mined += int((there & known[:, None]).sum())
        self.right += int(right.sum())
        self.first_right += int(right[:, 0].sum()) if right.shape[1] else 0

    def merged(self, world: World) -> MiningMetrics:
        """The counts of all processes together, in another object."""
        total = MiningMetrics(self.label, self.group, self.trained)
        counts = np.array([self.events, self.mined, self.right, self.first_right])
        counts = summed(np.concatenate([counts, self.chosen, self.hit]), world)
        total.events, total.mined, total.right, total.first_right = (int(count) for count in counts[:4])
        total.chosen, total.hit = np.split(counts[4:], 2)
        return total

    def figures(self) -> dict[str, float]:
        """What was counted since `clear`: shares in [0, 1], and the hubness skew. Empty where nothing was mined.

        ``precision`` (PMR) true positives among the mined; ``recall_at_1`` queries whose best positive is right;
        ``class_recall_video`` and ``class_recall_group`` (CMR, median over classes) videos, or recordings, of a class
        that were mined rightly at least once; ``coverage`` videos mined at all; ``hubness`` the skew of how often.
        """
        if not self.chosen.any():
            return {}
        times = self.chosen[self.trained].astype(np.float64)
        spread = times.std()
        out = {
            "coverage": float((times > 0).mean()),
            "hubness": float((((times - times.mean()) / spread) ** 3).mean()) if spread else 0.0,
        }
        if self.events:
            out |= {
                "precision": self.right / self.mined,
                "recall_at_1": self.first_right / self.events,
                "class_recall_video": self._class_recall(np.arange(len(self.label))),
                "class_recall_group": self._class_recall(self.group),
            }
        return out

    def _class_recall(self, unit: Ids) -> float:
        """The median over classes of the share of their units (videos, or groups) that were mined rightly."""
        shares = []
        for each in np.unique(self.label[self.trained]):
            members = self.trained[self.label[self.trained] == each]
            if each >= 0:
                mined = members[self.hit[members] > 0]
                shares.append(len(np.unique(unit[mined])) / len(np.unique(unit[members])))
        return float(np.median(shares)) if shares else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        counts = {name: getattr(self, name) for name in ("events", "mined", "right", "first_right")}
        return {**counts, "chosen": torch.from_numpy(self.chosen.copy()), "hit": torch.from_numpy(self.hit.copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting where the state was taken."""
        self.chosen, self.hit = state["chosen"].numpy().copy(), state["hit"].numpy().copy()
        self.events, self.mined = state["events"], state["mined"]
        self.right, self.first_right = state["right"], state["first_right"]


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What the views of a phase can contribute to mining, measured on one batch.

    Args:
        agreement: share of a query's k neighbours in one view that are so in the other, mean over pairs of views.
        chance: that share for views that know nothing of each other.
        precision: view to the share of right neighbours when that view mines alone; empty without labels.
        plan_precision: of the plan; None without labels.
        instance: view to the probability that a key of the query's own video is nearer than another key, 0.5 for
            noise; nan where the bank holds no such key.
        spread: view to 1 - the length of the mean key: near 0 where the view has collapsed to one direction.
    """

    agreement: float
    chance: float
    precision: dict[str, float]
    plan_precision: float | None
    instance: dict[str, float]
    spread: dict[str, float]

    def warnings(self) -> list[str]:
        """What is wrong with the views, in words; a cascade over such a view mines worse than one view alone."""
        found = [
            f"view {view!r} has collapsed: its mean key has length {1 - spread:.3f} of 1"
            for view, spread in self.spread.items()
            if spread < COLLAPSED
        ]
        found += [
            f"view {view!r} is close to noise: its own video's key is nearer than another with probability {share:.2f}"
            for view, share in self.instance.items()
            if share < NOISE
        ]
        if self.plan_precision is not None and len(self.precision) > 1:
            best = max(self.precision, key=lambda view: self.precision[view])
            if self.precision[best] > self.plan_precision + BETTER_ALONE:
                found.append(
                    f"view {best!r} alone mines better than the plan: precision {self.precision[best]:.2f} "
                    f"against {self.plan_precision:.2f}"
                )
        return found


COLLAPSED = 0.02  # spread; random unit vectors have about 1 - 1 / sqrt(K)
NOISE = 0.6  # instance; random weights of a conv net reach 0.8 and more
BETTER_ALONE = 0.05  # precision


def worth(
    plan: CascadePlan, queries: Mapping[str, torch.Tensor], bank: Bank, video_id: torch.Tensor, label: Ids
) -> Worth:
    """Measure what each view knows, on a batch of queries.

    Args:
        plan: the phase's.
        queries: view to (B, D).
        bank: to mine in.
        video_id: (B,) of the queries.
        label: (V,) class of each video, -1 where unknown.
    """
    k = plan.counts(bank.size)[-1]
    alone = {view: mine(CascadePlan.parse(f"{view}:{k}"), {view: queries[view]}, bank, video_id) for view in plan.views}
    both = mine(plan, {view: queries[view] for view in plan.views}, bank, video_id)
    lists = [torch.as_tensor(found.index).cpu() for found in alone.values()]
    pairs = [(a, b) for n, a in enumerate(lists) for b in lists[:n]]
    shared = [((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]).any(2).float().mean().item() for a, b in pairs]
    precision = {view: _precision(found, bank, video_id, label) for view, found in alone.items()}
    of_plan = _precision(both, bank, video_id, label)
    return Worth(
        agreement=sum(shared) / len(shared) if shared else 1.0,
        chance=min(1.0, k / max(1, bank.size)),
        precision={view: share for view, share in precision.items() if share is not None},
        plan_precision=of_plan,
        instance={view: _instance(queries[view], bank, view, video_id) for view in plan.views},
        spread={view: 1 - float(torch.as_tensor(bank.keys[view]).float().mean(0).norm()) for view in plan.views},
    )


def _precision(found: Positives, bank: Bank, video_id: torch.Tensor, label: Ids) -> float | None:
    index = torch.as_tensor(found.index).cpu().numpy()
    mine_of, theirs = label[video_id.cpu().numpy()], label[torch.as_tensor(bank.video_id).cpu().numpy()]
    counted = (index >= 0) & (mine_of >= 0)[:, None]
    return float((theirs[index] == mine_of[:, None])[counted].mean()) if counted.any() else None


def _instance(query: torch.Tensor, bank: Bank, view: str, video_id: torch.Tensor) -> float:
    """The probability that a query's sibling is nearer than a key of another video (the area under the ROC)."""
    keys = torch.as_tensor(bank.keys[view]).float()
    own = video_id[:, None] == torch.as_tensor(bank.video_id)[None]
    if not own.any():
        return float("nan")
    scores = query.float() @ keys.T
    shares = []
    for row in own.any(1).nonzero()[:, 0]:
        others = scores[row][~own[row]].sort().values
        below = torch.searchsorted(others, scores[row][own[row]].contiguous())
        shares.append((below.float() / max(1, len(others))).mean())
    return float(torch.stack(shares).mean())
