"""Where figures go while a run lasts: metrics.csv, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cascade_engine.errors import InvalidInput
from cascade_engine.training.config import OutputConfig

log = logging.getLogger(__name__)

COLUMNS = (
    *("step", "phase", "epoch", "loss", "lr", "filled", "clips_per_second", "mining_share"),
    *("precision", "recall_at_1", "class_recall_video", "class_recall_group", "coverage", "hubness"),
    *("agreement", "plan_precision", "best_view_precision"),
)


class Journal:
    """Rows of figures, one per logged step and one per epoch; `step` counts batches over the whole run.

    An epoch that ends within a step of several batches has its row at that step.

    Args:
        folder: the run's.
        config: what to write besides metrics.csv.
        name: the run's, for Weights & Biases.
        resume_at: rows after this step are cut off: they are about to be made again.

    Raises:
        InvalidInput: Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, config: OutputConfig, name: str, resume_at: int = 0) -> None:
        self.path = folder / "metrics.csv"
        rows = self._kept(resume_at)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._board: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            if find_spec("tensorboard") is None:
                log.info("tensorboard is not installed: figures go to metrics.csv only")
            else:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)
        if config.wandb:
            if find_spec("wandb") is None:
                raise InvalidInput("output.wandb: expected wandb to be installed, found none: pip install wandb")
            import wandb

            self._wandb = wandb.init(project="cascade", name=name, dir=str(folder), resume="allow", id=folder.name)

    def _kept(self, upto: int) -> list[dict[str, Any]]:
        if not self.path.exists() or not upto:
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= upto]

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; its `step` is the key, columns that it lacks stay empty."""
        self._writer.writerow({key: _text(value) for key, value in row.items()})
        self._file.flush()
        step = row["step"]
        figures = {key: float(value) for key, value in row.items() if key not in ("step", "phase")}
        if self._board is not None:
            for key, value in figures.items():
                self._board.add_scalar(f"{row['phase']}/{key}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{row['phase']}/{key}": value for key, value in figures.items()}, step=step)

    def close(self) -> None:
        """Finish writing."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
