"""What can go wrong, grouped by what a handler would do about it."""


class CascadeError(Exception):
    """Base of every error the engine raises on purpose."""


class InvalidInput(CascadeError, ValueError):
    """An argument is wrong: the message names it, what was expected and what came."""


class BackendUnavailable(CascadeError, RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class StaleBank(CascadeError, RuntimeError):
    """A snapshot of a key queue was used after the queue overwrote its keys."""


class CudaError(CascadeError, RuntimeError):
    """A CUDA call or launch failed."""


class VideoError(CascadeError):
    """A video cannot be read, or holds nothing to read; the message names the file."""


class CheckpointError(CascadeError):
    """A checkpoint or model file does not fit: missing, extra or misshapen entries are listed."""


class StoreError(CascadeError):
    """A feature store cannot do what was asked."""


class NotFound(StoreError, KeyError):
    """A store, phase, view, column or clip that does not exist."""

    def __str__(self) -> str:
        """The message itself: a plain KeyError would show its repr."""
        return str(self.args[0]) if self.args else ""


class SchemaMismatch(StoreError):
    """Data that does not fit the store's views or columns, or a store of another version."""


class StoreLocked(StoreError):
    """Another writer holds the phase; the message names its process and host."""


class Corrupt(StoreError):
    """Bytes on disk are not what was committed; the message names the file."""
