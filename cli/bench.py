"""`cascade bench`: what is measured, imported when one is asked for."""

from __future__ import annotations

from importlib import import_module

import click

BENCHMARKS = {
    "mining": ("bench_mining", "Mining against torch, faiss, scikit-learn, usearch, NumPy and the published loop."),
    "store": ("bench_store", "Writing, reading and searching stores against other formats."),
    "training": (
        "bench_training",
        "What the positives of each plan are worth: one net trained alike with all of them on MovingDigits.",
    ),
    "video": ("bench_video", "Decoding, views and optical flow."),
}


class Benchmarks(click.Group):
    """A group whose benchmarks live in modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The benchmarks' names."""
        return list(BENCHMARKS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one benchmark."""
        if cmd_name not in BENCHMARKS:
            return None
        command: click.Command = import_module(f".{BENCHMARKS[cmd_name][0]}", __package__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the benchmarks without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in BENCHMARKS.items()])


@click.group("bench", cls=Benchmarks)
def command() -> None:
    """Measure, with every contestant's answer checked before it is timed.

    \b
    Example:
      cascade bench mining --quick
    """
