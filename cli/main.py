"""The `cascade` command: its subcommands are imported when one is called, so that help is instant."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import click

from cascade_engine import __version__
from cascade_engine.errors import BackendUnavailable, CascadeError, InvalidInput, StoreError

from .lazy import LazyGroup

EXTRAS = {"store": ("pyarrow", "h5py", "fsspec", "aiohttp"), "faiss": ("faiss",)}
USAGE, UNAVAILABLE, STORE, FAILED, INTERRUPTED = 2, 3, 4, 1, 130

COMMANDS = {
    "info": ("info", "What this installation can run, and why not the rest."),
    "demo": ("demo", "The whole method once: video in, label out."),
    "store": ("store", "Create, fill, query and check feature stores."),
    "mine": ("mine", "Mine the positives of a whole store."),
    "train": ("train", "Train encoders by a config or preset."),
    "runs": ("runs", "List and compare runs."),
    "eval": ("eval", "Retrieval, linear probe, k-NN and mining metrics of a run."),
    "finetune": ("finetune", "Fine-tune a run's encoder with labels."),
    "export": ("export", "Write a run as one deployable file."),
    "classify": ("classify", "Label videos with an exported model."),
    "embed": ("embed", "Put features of videos into a store."),
    "query": ("query", "Find the stored clips nearest to a video."),
    "serve": ("serve", "Label uploaded videos over HTTP."),
    "report": ("report", "Write a run's report as one HTML file."),
    "bench": ("bench", "Measure mining, stores and training."),
}


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="cascade")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Store clip features of several views, mine positives across them, train, evaluate and deploy.

    \b
    Exit codes: 0 done; 1 some inputs failed, or an error of the engine; 2 wrong usage or input;
                3 a named backend cannot run here; 4 a feature store's error; 130 interrupted.

    \b
    Examples:
      cascade info
      cascade demo
      cascade store info features.zarr
      cascade mine features.zarr --plan flow:50%,rgb:25%,flow:5 --to positives.zarr
    Completion in bash:  eval "$(_CASCADE_COMPLETE=bash_source cascade)"
    """
    ctx.obj = {"debug": debug}


def run() -> None:
    """Run the command: one line for people where it fails, the exit code its docstring promises."""
    debug = "--debug" in sys.argv
    try:
        code = main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except (CascadeError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        else:
            click.echo(f"error: {error}{_hint(error)}", err=True)
        sys.exit(_code(error))


def _hint(error: BaseException) -> str:
    """Which extra brings a package that is not installed."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extra = next((extra for extra, names in EXTRAS.items() if name in names), None)
    return "" if extra is None else f"; pip install 'cascade-engine[{extra}]' brings it"


def _code(error: BaseException) -> int:
    codes: dict[Any, int] = {InvalidInput: USAGE, BackendUnavailable: UNAVAILABLE, StoreError: STORE}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED)
