"""The banks of training: the engine's key queue, and a bank with a slot for each training video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from cascade_engine.bank import Bank
from cascade_engine.errors import CheckpointError, InvalidInput, StaleBank
from cascade_engine.queue import KeyQueue
from cascade_engine.training.config import BankConfig


class KeyBank(Protocol):
    """What the loop needs of a bank of keys."""

    filled: int

    @property
    def size(self) -> int:
        """Slots."""

    def push(self, keys: Mapping[str, torch.Tensor], video_id: Any, clip_id: Any = None, label: Any = None) -> None:
        """Take a batch of keys."""

    def bank(self) -> Bank:
        """The filled slots, as they are now."""

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""


class IndexedBank:
    """A slot for each training video, moved towards each new key: ``v <- norm(m v + (1 - m) f)``.

    A slot is empty until its video was seen; `bank()` shows the filled ones only.

    Args:
        rows: (N,) the videos that have a slot, as `clip_id` names them in `push`.
        dims: view to feature width.
        momentum: m, in [0, 1).
        dtype: of the keys.
        device: where they are kept.

    Source: Wu et al., CVPR 2018 (NPID), section 3.2; Tao et al., ACM MM 2020 (IIC).
    """

    def __init__(
        self,
        rows: torch.Tensor,
        dims: Mapping[str, int],
        *,
        momentum: float = 0.5,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= momentum < 1:
            raise InvalidInput(f"momentum: expected a number in [0, 1), got {momentum}")
        self.size, self.momentum = len(rows), momentum
        self.filled = 0
        self._rows = rows.to(device)
        self._slot_of = torch.full((int(rows.max()) + 1,), -1, device=device)
        self._slot_of[self._rows] = torch.arange(self.size, device=device)
        kind = getattr(torch, dtype)
        self._keys = {view: torch.zeros(self.size, width, dtype=kind, device=device) for view, width in dims.items()}
        self._video = torch.full((self.size,), -1, device=device)
        self._label = torch.full((self.size,), -1, device=device)
        self._seen = torch.zeros(self.size, dtype=torch.bool, device=device)
        self._version = 0

    def push(self, keys: Mapping[str, torch.Tensor], video_id: Any, clip_id: Any = None, label: Any = None) -> None:
        """Move the slots of `clip_id` (n,) towards `keys` (n, D) per view; each slot at most once a call."""
        slots = self._slot_of[torch.as_tensor(clip_id, device=self._slot_of.device)]
        if bool((slots < 0).any()) or len(set(slots.tolist())) != len(slots):
            raise InvalidInput("clip_id: expected different videos that have a slot, got others")
        fresh = ~self._seen[slots]
        for view, stored in self._keys.items():
            new, old = keys[view].detach().float(), stored[slots].float()
            moved = torch.lerp(new, old, self.momentum)
            moved = torch.where(fresh[:, None], new, moved)
            stored[slots] = torch.nn.functional.normalize(moved, dim=1).to(stored.dtype)
        self._video[slots] = torch.as_tensor(video_id, device=self._video.device)
        if label is not None:
            self._label[slots] = torch.as_tensor(label, device=self._label.device)
        self._seen[slots] = True
        self.filled = int(self._seen.sum())
        self._version += 1

    def bank(self) -> Bank:
        """The filled slots; shares their memory once all are filled, and is stale after the next push."""
        seen = self._version

        def guard() -> None:
            if self._version != seen:
                raise StaleBank("bank: the indexed bank has moved since this snapshot; take bank() again")

        chosen: Any = slice(None) if self.filled == self.size else self._seen.nonzero()[:, 0]
        return Bank(
            {view: keys[chosen] for view, keys in self._keys.items()},
            self._video[chosen],
            clip_id=self._rows[chosen],
            label=self._label[chosen],
            checked=True,
            guard=guard,
        )

    def state_dict(self) -> dict[str, Any]:
        """The slots, as copies."""
        tensors = {"rows": self._rows, "video_id": self._video, "label": self._label, "seen": self._seen}
        return {
            "keys": {view: keys.clone() for view, keys in self._keys.items()},
            **{name: value.clone() for name, value in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of other videos, views or widths.
        """
        shapes = {view: tuple(keys.shape) for view, keys in state.get("keys", {}).items()}
        if shapes != {view: tuple(keys.shape) for view, keys in self._keys.items()} or not torch.equal(
            state["rows"].cpu(), self._rows.cpu()
        ):
            raise CheckpointError(f"indexed bank: the checkpoint's is of other videos or views: {shapes}")
        for view, keys in state["keys"].items():
            self._keys[view].copy_(keys)
        self._video.copy_(state["video_id"])
        self._label.copy_(state["label"])
        self._seen.copy_(state["seen"])
        self.filled = int(self._seen.sum())
        self._version += 1


def make_bank(
    config: BankConfig, views: tuple[str, ...], dim: int, rows: torch.Tensor, device: torch.device | str
) -> KeyBank:
    """The bank that a config asks for, empty.

    Args:
        config: what kind.
        views: it holds.
        dim: width of every view.
        rows: (N,) the videos trained on.
        device: where it is kept.
    """
    dims = dict.fromkeys(views, dim)
    if config.kind == "indexed":
        return IndexedBank(rows, dims, momentum=config.momentum, dtype=config.dtype, device=device)
    return KeyQueue(config.size, dims, dtype=config.dtype, device=device)
