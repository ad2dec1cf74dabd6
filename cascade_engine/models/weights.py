"""Loading weights strictly: what is missing, extra or misshapen is listed, never passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from cascade_engine.errors import CheckpointError

LISTED = 8  # names per kind in an error message


def load_weights(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load `state` into `module`; the two must name the same entries of the same shapes.

    Args:
        module: receives the weights.
        state: entry name to tensor.
        source: where the weights come from, for the message.

    Raises:
        CheckpointError: entries are missing, extra or misshapen; they are listed, and nothing was loaded.
    """
    mine = module.state_dict()
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in mine.items()
        if name in state and state[name].shape != value.shape
    ]
    problems = {
        "missing": [name for name in mine if name not in state],
        "extra": [name for name in state if name not in mine],
        "misshapen": misshapen,
    }
    if any(problems.values()):
        lines = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
        raise CheckpointError(f"{source}: the weights do not fit: {'; '.join(lines)}")
    module.load_state_dict(state, strict=True)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
