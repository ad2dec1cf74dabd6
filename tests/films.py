"""Tiny video files for tests: good ones, and one for each way a file can be bad."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def texture(height, width, seed=0):
    """A grey picture (height, width) with detail at all scales, so that motion in it can be seen."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width))
    for cell in (4, 8, 16, 32):
        coarse = rng.standard_normal((height // cell + 2, width // cell + 2))
        fine = np.kron(coarse, np.ones((cell, cell)))
        kernel = np.ones(cell) / cell
        fine = np.apply_along_axis(lambda line, k=kernel: np.convolve(line, k, mode="same"), 0, fine)
        fine = np.apply_along_axis(lambda line, k=kernel: np.convolve(line, k, mode="same"), 1, fine)
        picture += fine[:height, :width]
    picture = (picture - picture.min()) / np.ptp(picture)
    return (picture * 255).astype(np.uint8)


def moving(frames=12, height=64, width=96, step=(2, 0), seed=0):
    """A texture that moves by whole pixels (x, y) each frame, (T, H, W, 3) uint8."""
    x, y = abs(step[0]) * frames, abs(step[1]) * frames
    big = texture(height + 2 * y, width + 2 * x, seed)
    shots = [
        big[y - step[1] * t : y - step[1] * t + height, x - step[0] * t : x - step[0] * t + width]
        for t in range(frames)
    ]
    return np.repeat(np.stack(shots)[..., None], 3, axis=-1)


def write(
    path, pictures, *, fps=25, codec="libx264", pix_fmt="yuv420p", times=None, options=None, aspect=1, hold=0, sound=0
):
    """Encode (T, H, W, 3) uint8 pictures; `times` gives each frame's tick of 1/1000 s instead of a constant rate.

    `aspect` is the width of a pixel to its height; `hold` the seconds that the last packet's picture stays, `sound`
    those of a tone, which starts at 0.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        tone = out.add_stream("aac", rate=16000) if sound else None
        packets = []
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if hold:
            packets[-1].duration = int(hold / packets[-1].time_base)
        out.mux(packets)
        if tone is not None:
            _hum(out, tone, sound)
    return path


def _hum(out, stream, seconds):
    wave = (np.sin(np.arange(int(16000 * seconds)) / 10) * 0.3).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
    frame.sample_rate = 16000
    out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def audio_only(path):
    """Half a second of a sine wave and no picture."""
    with av.open(str(path), "w") as out:
        _hum(out, out.add_stream("aac", rate=16000), 0.512)
    return Path(path)


def without_frames(path):
    """A container that announces a video stream and holds none of its pictures."""
    with av.open(str(path), "w", format="avi") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        out.start_encoding()
    return Path(path)


def rotated(path, pictures, turns):
    """An mp4 whose header asks the player to turn the pictures by `turns` quarters clockwise, as phones write it."""
    write(path, pictures)
    data = bytearray(Path(path).read_bytes())
    header = data.index(b"tkhd") + 4
    matrix = header + 40  # version 0: 4 + 20 bytes of times and ids, 8 reserved, 8 of layer and volume
    one = 0x00010000
    a, b, c, d = [(one, 0, 0, one), (0, one, -one, 0), (-one, 0, 0, -one), (0, -one, one, 0)][turns % 4]
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    Path(path).write_bytes(bytes(data))
    return Path(path)
