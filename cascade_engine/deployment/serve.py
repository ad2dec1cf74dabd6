"""A small HTTP service: a video in, its labels out, and a page to drop one on."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import anyio
from fastapi import FastAPI, HTTPException, Query, Request, Response

from cascade_engine import __version__
from cascade_engine.deployment.artefact import Model
from cascade_engine.deployment.predict import Result, predict
from cascade_engine.deployment.upload import TooLarge, receive
from cascade_engine.deployment.windows import Limits
from cascade_engine.errors import InvalidInput

log = logging.getLogger(__name__)

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
_BODY = {"content": {"application/octet-stream": {}, "multipart/form-data": {}}, "required": True}


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """What is taken from strangers.

    Args:
        upload_bytes: of one request.
        video: of the video in it.
        at_once: videos that are decoded and classified at the same time; others wait.
        waiting: requests that may wait; further ones are sent away (503).
        slowest: bytes a second at which an upload must come, as it holds a place meanwhile.
        patience: seconds that it may fall behind that, or say nothing, before it is sent away (408).
    """

    upload_bytes: int = 200 * 2**20
    video: Limits = field(default_factory=lambda: Limits(seconds=300, frame_pixels=4096 * 2304, total_pixels=20e9))
    at_once: int = 1
    waiting: int = 8
    slowest: float = 2**15
    patience: float = 10.0


def create_app(model: Model, limits: ServiceLimits | None = None) -> FastAPI:
    """The service for one exported model.

    `POST /classify` takes a video as the body or as a form's file and answers as ``cascade classify --json`` does;
    `GET /health` and `GET /model` tell that it lives and what it serves; `GET /` is a page to drop a video on.
    An upload lies in a temporary folder of its own, under a name of ours, only while it is read.

    Raises:
        InvalidInput: the model has no labels.
    """
    if not model.signature.labels:
        raise InvalidInput(f"model: expected one with labels, {model.path} gives features alone")
    bounds = limits or ServiceLimits()
    app = FastAPI(title="cascade", version=__version__, docs_url=None, redoc_url=None)
    queue = _Queue(bounds)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "waiting": queue.waiting}

    @app.get("/model")
    def describe() -> dict[str, Any]:
        return asdict(model.signature)

    @app.post("/classify", openapi_extra={"requestBody": _BODY})
    async def classify(
        request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 5, timeline: bool = False
    ) -> dict[str, Any]:
        with queue.place(), TemporaryDirectory(prefix="cascade-upload-") as folder:
            path = Path(folder) / "upload"
            await _receive(request, path, bounds)
            async with queue.turn:
                result = await anyio.to_thread.run_sync(_classify, model, path, bounds.video)
        row = result.to_json(top=top, timeline=timeline)
        del row["path"]
        if result.problem is not None:
            row["problem"] = result.problem.replace(str(path), "upload")
        if result.failed:
            log.info("refused an upload: %s", row["problem"])
            raise HTTPException(422, row["problem"])
        return row

    _serve_page(app)
    return app


class _Queue:
    """Counts the requests that are under way and lets a few of them work."""

    def __init__(self, limits: ServiceLimits) -> None:
        self.turn = anyio.Semaphore(limits.at_once)
        self.most = limits.at_once + limits.waiting
        self.waiting = 0

    def place(self) -> _Queue:
        if self.waiting >= self.most:
            raise HTTPException(503, "too many videos at once, try again", {"Retry-After": "10"})
        return self

    def __enter__(self) -> None:
        self.waiting += 1

    def __exit__(self, *_: object) -> None:
        self.waiting -= 1


async def _receive(request: Request, path: Path, limits: ServiceLimits) -> None:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.upload_bytes:  # no need to let it come
        raise HTTPException(413, f"upload: expected at most {limits.upload_bytes} bytes, got {announced}")
    try:
        with anyio.fail_after(limits.patience) as scope:
            chunks = _in_time(request.stream(), scope, limits)
            await receive(chunks, request.headers.get("content-type", ""), path, limits.upload_bytes)
    except TooLarge as error:
        raise HTTPException(413, str(error)) from None
    except InvalidInput as error:
        raise HTTPException(400, str(error)) from None
    except TimeoutError:
        told = f"upload: expected {limits.slowest:.0f} bytes a second, got fewer for {limits.patience:g} s"
        raise HTTPException(408, told, {"Connection": "close"}) from None


async def _in_time(
    chunks: AsyncIterator[bytes], scope: anyio.CancelScope, limits: ServiceLimits
) -> AsyncIterator[bytes]:
    """The chunks; each puts the scope's deadline off by the time it may have taken, and never beyond the patience."""
    async for chunk in chunks:
        scope.deadline = min(scope.deadline + len(chunk) / limits.slowest, anyio.current_time() + limits.patience)
        yield chunk


def _classify(model: Model, path: Path, limits: Limits) -> Result:
    return next(predict(model, [path], limits=limits))


def _serve_page(app: FastAPI) -> None:
    """The page and its script and style, which load nothing from anywhere else."""
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    folder = files("cascade_engine.deployment")
    kinds = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
    pages = {
        name: Response(folder.joinpath(name).read_bytes(), media_type=kind, headers=headers)
        for name, kind in kinds.items()
    }

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return pages["page.html"]

    @app.get("/page.js", include_in_schema=False)
    def script() -> Response:
        return pages["page.js"]

    @app.get("/page.css", include_in_schema=False)
    def style() -> Response:
        return pages["page.css"]
