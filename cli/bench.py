"""`cascade bench`: what is measured, imported when one is asked for."""

from __future__ import annotations

import click

from .lazy import LazyGroup

BENCHMARKS = {
    "mining": ("bench_mining", "Mining against torch, faiss, scikit-learn, usearch, NumPy and the published loop."),
    "store": ("bench_store", "Writing, reading and searching stores against other formats."),
    "training": (
        "bench_training",
        "What the positives of each plan are worth: one net trained alike with all of them on MovingDigits.",
    ),
    "step": (
        "bench_step",
        "The share of a training step that mining and the loss take, against torch and the published loop.",
    ),
    "leftout": ("bench_leftout", "Does a window of a video find its own video? A model against raw pixels."),
    "video": ("bench_video", "Decoding, views and optical flow."),
}


@click.group("bench", cls=LazyGroup, table=BENCHMARKS)
def command() -> None:
    """Measure, with every contestant's answer checked before it is timed.

    \b
    Example:
      cascade bench mining --quick
    """
