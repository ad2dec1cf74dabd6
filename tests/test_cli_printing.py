"""What commands print: names and labels as they are, though rich knows brackets as markup."""

import pytest
from cascade_engine.cli import eval as judging
from cascade_engine.cli import progress, runs, steps
from rich.console import Console

NAMES = ("[wave] both", "wave [one]", "stop [/start]")


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """A terminal to every command, wide enough."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    assert Console(stderr=True).is_terminal


def shown_by_bar(name):
    with progress.bar(name, 2) as advance:
        advance()


def shown_by_steps(name):
    with steps.steps() as tell:
        tell(name, 1, 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "show",
    [
        lambda name: judging._table([{"class": name, name: 0}]),
        lambda name: runs._show([{"run": name, name: 1.0}], False, empty=""),
        shown_by_bar,
        shown_by_steps,
    ],
    ids=["eval", "runs", "bar", "steps"],
)
def test_brackets_are_printed_as_they_are(capsys, show, name):
    show(name)
    told = capsys.readouterr()
    assert name in told.out + told.err
