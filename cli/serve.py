"""`cascade serve`: label uploaded videos over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from cascade_engine.errors import BackendUnavailable, CascadeError

from .values import Finite


@click.command("serve")
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The exported model, .pt2 or .onnx.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; only this machine by default."
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--max-megabytes", default=200.0, show_default=True, type=Finite(0, min_open=True))
@click.option("--max-seconds", default=300.0, show_default=True, type=Finite(0, min_open=True))
@click.option(
    "--max-pixels", default=20e9, show_default=True, type=Finite(1), help="Of all frames of a video together."
)
def command(model: Path, host: str, port: int, max_megabytes: float, max_seconds: float, max_pixels: float) -> None:
    """Serve a model: POST a video to /classify, or drop one on the page at /.

    \b
    Examples:
      cascade serve --model model.onnx
      curl --data-binary @match.mp4 http://127.0.0.1:8000/classify
      curl -F video=@match.mp4 'http://127.0.0.1:8000/classify?top=3&timeline=true'
    """
    try:
        import uvicorn

        from cascade_engine.deployment.serve import ServiceLimits, create_app
    except ImportError as error:
        raise BackendUnavailable(f"serve: {error}; install cascade-engine[deploy]") from None
    from cascade_engine.deployment.artefact import load
    from cascade_engine.deployment.windows import Limits

    defaults = ServiceLimits()
    video = Limits(seconds=max_seconds, frame_pixels=defaults.video.frame_pixels, total_pixels=max_pixels)
    limits = ServiceLimits(upload_bytes=int(max_megabytes * 2**20), video=video)
    app = create_app(load(model), limits)
    try:
        uvicorn.run(app, host=host, port=port, log_level="info", server_header=False)
    except SystemExit:  # with a code of uvicorn's own, which means something else here; its log has told why
        raise CascadeError(f"serve: cannot listen on {host}:{port}") from None
