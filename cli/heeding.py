"""Options that would do nothing are refused: who gives one means something by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import click
from click.core import ParameterSource

from cascade_engine.errors import InvalidInput


def require_heeded(ctx: click.Context, instead: Mapping[str, Collection[str]]) -> None:
    """Refuse options that do nothing with what is done instead of a command's usual work.

    Args:
        ctx: of the command.
        instead: parameters that have something else done, and for each the parameters that are heeded then.

    Raises:
        InvalidInput: another one is on the command line.
    """
    given = {str(each.name): each.opts[0] for each in ctx.command.params if _was_given(ctx, each)}
    chosen = next((name for name in instead if name in given), None)
    if chosen is None:
        return
    idle = [option for name, option in given.items() if name != chosen and name not in instead[chosen]]
    if idle:
        raise InvalidInput(f"{idle[0]}: expected without {given[chosen]}, where it does nothing")


def _was_given(ctx: click.Context, option: click.Parameter) -> bool:
    return ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
