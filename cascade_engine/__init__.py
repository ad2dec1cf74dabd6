"""Store clip features of several views, mine positives across them exactly and fast, train and deploy video encoders.

Names are imported when first used: ``import cascade_engine`` loads neither torch nor zarr.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cascade_engine.bank import Bank as Bank
    from cascade_engine.loss import mine_and_contrast as mine_and_contrast
    from cascade_engine.loss import multi_positive_nce as multi_positive_nce
    from cascade_engine.mining import Positives as Positives
    from cascade_engine.mining import mine as mine
    from cascade_engine.mining import mine_self as mine_self
    from cascade_engine.mining import select as select
    from cascade_engine.plan import CascadePlan as CascadePlan
    from cascade_engine.queue import KeyQueue as KeyQueue
    from cascade_engine.searching import search as search
    from cascade_engine.store import FeatureStore as FeatureStore
    from cascade_engine.training.loop import train as train

_HOME = {
    "Bank": "bank",
    "CascadePlan": "plan",
    "FeatureStore": "store",
    "KeyQueue": "queue",
    "Positives": "mining",
    "mine": "mining",
    "mine_and_contrast": "loss",
    "mine_self": "mining",
    "multi_positive_nce": "loss",
    "search": "searching",
    "select": "mining",
    "train": "training.loop",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """The public name, from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*globals(), *_HOME})
