"""Augmentation of whole batches of clips: drawn once per clip, the same for all its frames and all its views.

A clip's crop and flip move every view alike, and displacements follow the picture: a flip negates their x, a crop that
is enlarged makes them larger. Everything random comes from the generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional

from cascade_engine.errors import InvalidInput
from cascade_engine.tensor import Array
from cascade_engine.video.views import VIEWS, chosen_views, to_float

Generator: TypeAlias = torch.Generator | np.random.Generator

TOGETHER = 4  # clips cut out at a time on a CPU, so that they stay in its cache

# Luma of RGB, and the rotation of the colour plane: YIQ (NTSC), rounded as usual.
_LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What was drawn for a batch of B clips."""

    half: torch.Tensor  # (B, 2) half width and height of the crop, as a share of half the picture
    centre: torch.Tensor  # (B, 2) its centre, -1 to 1
    flip: torch.Tensor  # (B,) bool
    colour: torch.Tensor  # (B, 3, 3) applied to RGB
    contrast: torch.Tensor  # (B,) around the clip's mean
    blur: torch.Tensor  # (B,) standard deviation in output pixels, 0 for none
    tempo: torch.Tensor  # (B,) factor of displacements
    drift: torch.Tensor  # (B, 2) added to displacements, x and y, in [-1, 1]

    def __len__(self) -> int:
        """Number of clips B."""
        return len(self.flip)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How clips are varied; the defaults are those of the published training, for small frames.

    Raises:
        InvalidInput: a size under 1, a probability outside [0, 1] or a range that runs backwards.

    Source: Han et al., NeurIPS 2020, section 4 (random crop, flip, colour jitter, grey), there drawn per clip as here.
    """

    size: int  # side of the frames that come out
    area: tuple[float, float] = (0.5, 1.0)  # share of the picture that is cut out
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width to height of the cut
    flip: float = 0.5  # probability
    jitter: float = 0.8  # probability that colours are changed
    brightness: float = 0.4  # factors from 1 - x to 1 + x
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # turns of the colour circle, -x to x
    grayscale: float = 0.2  # probability
    blur: float = 0.0  # probability
    sigma: tuple[float, float] = (0.1, 2.0)  # of the blur, in output pixels
    tempo: float = 0.0  # displacements are divided or multiplied by up to 1 + x
    drift: float = 0.0  # a camera's movement added to displacements, up to x of their range

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        chances = (self.flip, self.jitter, self.grayscale, self.blur)
        ranges = ((0.0, *self.area, 1.0), (1e-3, *self.ratio, 1e3), (1e-3, *self.sigma, 1e3))
        spread = (self.brightness, self.contrast, self.saturation, self.hue, self.tempo, self.drift)
        if self.size < 1 or any(not 0 <= chance <= 1 for chance in (*chances, *spread)):
            raise InvalidInput(f"augment: expected a size of at least 1 and shares in [0, 1], got {self}")
        if self.area[0] <= 0 or any(not a <= b for values in ranges for a, b in pairwise(values)):
            raise InvalidInput(f"augment: expected ascending ranges, the area within (0, 1], got {self}")

    def draw(self, count: int, generator: Generator) -> Draws:
        """Draw everything for `count` clips."""
        pick = _Uniform(count, generator)
        area, ratio = pick(*self.area), torch.exp(pick(math.log(self.ratio[0]), math.log(self.ratio[1])))
        half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1.0)
        centre = torch.stack([pick(-1, 1), pick(-1, 1)], dim=1) * (1 - half)
        flip = pick(0, 1) < self.flip
        jitter = pick(0, 1) < self.jitter
        one = torch.ones(count)
        factors = [
            torch.where(jitter, pick(1 - x, 1 + x), one) for x in (self.brightness, self.contrast, self.saturation)
        ]
        turn = torch.where(jitter, pick(-self.hue, self.hue), 0 * one)
        saturation = torch.where(pick(0, 1) < self.grayscale, 0 * one, factors[2])
        blur = torch.where(pick(0, 1) < self.blur, pick(*self.sigma), 0 * one)
        colour = _colour_matrix(saturation, turn) * factors[0][:, None, None]
        tempo = torch.exp(pick(-1, 1) * math.log1p(self.tempo))
        drift = torch.stack([pick(-1, 1), pick(-1, 1)], dim=1) * self.drift
        return Draws(
            half=half, centre=centre, flip=flip, colour=colour, contrast=factors[1], blur=blur, tempo=tempo, drift=drift
        )

    def apply(self, view: str, clips: Array, draws: Draws) -> torch.Tensor:
        """Vary one view of a batch of clips as drawn.

        Args:
            view: its name; colours are changed in rgb alone.
            clips: (B, T, H, W, C) as stored, uint8 or int8.
            draws: for B clips.

        Returns:
            (B, C, T, size, size) float32 in [-1, 1], as `to_float` scales it.

        Raises:
            InvalidInput: an unknown view, or clips of another shape.
        """
        stored = _checked(view, clips, len(draws))
        half, flip = draws.half.to(stored.device), draws.flip.to(stored.device)
        signed = torch.where(flip, -1.0, 1.0)
        theta = torch.zeros(len(draws), 2, 3, device=stored.device)
        theta[:, 0, 0], theta[:, 1, 1] = half[:, 0] * signed, half[:, 1]
        theta[:, :, 2] = draws.centre.to(stored.device)
        usual = math.sqrt(sum(self.area) / 2)
        together = TOGETHER if stored.device.type == "cpu" else max(1, len(stored))
        parts = zip(torch.split(stored, together), torch.split(theta, together), strict=True)
        pictures = torch.cat([_sampled(_planes(view, part), cut, self.size, usual) for part, cut in parts])
        if VIEWS[view].displaces:
            tempo, drift = draws.tempo.to(stored.device), draws.drift.to(stored.device)
            stretch = torch.stack([signed / half[:, 0], 1 / half[:, 1]], dim=1) * tempo[:, None]
            pictures = (pictures * stretch[:, None, :, None, None] + drift[:, None, :, None, None]).clamp(-1, 1)
        if view == "rgb":
            pictures = _blurred(_recoloured(pictures, draws), draws.blur)
        return pictures.transpose(1, 2).contiguous()

    def __call__(self, clips: Mapping[str, Array], generator: Generator) -> dict[str, torch.Tensor]:
        """Vary all views of a batch of clips alike.

        Args:
            clips: view to (B, T, H, W, C) as stored.
            generator: of torch or NumPy; the only source of chance.

        Returns:
            View to (B, C, T, size, size) float32 in [-1, 1].
        """
        draws = self.draw(len(next(iter(clips.values()))), generator)
        return {view: self.apply(view, pictures, draws) for view, pictures in clips.items()}


def centre(view: str, clips: Array, size: int) -> torch.Tensor:
    """What evaluation and deployment feed: nothing random, the whole square picture at `size`.

    Args:
        view: its name.
        clips: (B, T, H, W, C) as stored.
        size: side of the frames that come out.

    Returns:
        (B, C, T, size, size) float32 in [-1, 1].

    Raises:
        InvalidInput: an unknown view, or clips of another shape.
    """
    stored = _checked(view, clips, None)
    planes = _planes(view, stored)
    if planes.shape[-2:] != (size, size):
        count, time, channels = planes.shape[:3]
        flat = planes.flatten(0, 1)
        flat = functional.interpolate(flat, (size, size), mode="bilinear", align_corners=False, antialias=True)
        planes = flat.view(count, time, channels, size, size)
    return planes.transpose(1, 2).contiguous()


def repeat_frames(
    view: str, clips: torch.Tensor, generator: Generator, *, first: int = 0, joint: int = 0
) -> torch.Tensor:
    """Negatives without motion: one frame of each clip, shown all the time; views of differences become zero.

    Args:
        view: its name.
        clips: (B, C, T, H, W).
        generator: chooses the frames.
        first: the place of the first of them among `joint` clips; frames are chosen for all, and these get theirs.
        joint: how many; 0: these are all.

    Source: Tao et al., ACM MM 2020 (IIC), section 3.3; METHOD block 910B.
    """
    if VIEWS[view].signed:
        return torch.zeros_like(clips)
    count, time = clips.shape[0], clips.shape[2]
    drawn = _Uniform(joint or count, generator)(0, 1)[first : first + count]
    chosen = (drawn * time).long().clamp(max=time - 1).to(clips.device)
    return clips[torch.arange(count, device=clips.device), :, chosen][:, :, None].expand_as(clips).contiguous()


def shuffle_frames(clips: torch.Tensor, generator: Generator, *, first: int = 0, joint: int = 0) -> torch.Tensor:
    """Negatives with broken motion: the frames of each clip in a random order that is not their own.

    Args:
        clips: (B, C, T, H, W), at least two frames.
        generator: draws the orders.
        first: their place among `joint` clips, as in `repeat_frames`.
        joint: how many; 0: these are all.

    Raises:
        InvalidInput: clips of one frame, which have no other order.

    Source: Tao et al., ACM MM 2020 (IIC), section 3.3; METHOD block 910B.
    """
    count, time = clips.shape[0], clips.shape[2]
    if time < 2:
        raise InvalidInput(f"clips: expected at least 2 frames to shuffle, got {time}")
    if not (joint or count):
        return clips.clone()
    drawn = torch.stack([_Uniform(time, generator)(0, 1) for _ in range(joint or count)])[first : first + count]
    order = drawn.argsort(dim=1, stable=True)
    same = (order == torch.arange(time)).all(dim=1)
    order[same] = order[same].roll(1, dims=1)
    places = order.to(clips.device)[:, None, :, None, None].expand_as(clips)
    return clips.gather(2, places)


class _Uniform:
    """Uniform numbers, `count` at a time, from either kind of generator."""

    def __init__(self, count: int, generator: Generator) -> None:
        self.count, self.generator = count, generator

    def __call__(self, low: float, high: float) -> torch.Tensor:
        if isinstance(self.generator, np.random.Generator):
            drawn = torch.from_numpy(self.generator.random(self.count, dtype=np.float32))
        else:
            drawn = torch.rand(self.count, generator=self.generator, device=self.generator.device).cpu()
        return low + (high - low) * drawn


def _checked(view: str, clips: Array, count: int | None) -> torch.Tensor:
    """Stored clips as a tensor."""
    channels = chosen_views([view])[0].channels
    stored: Any = torch.as_tensor(np.array(clips) if isinstance(clips, np.ndarray) else clips)
    if stored.ndim != 5 or stored.shape[-1] != channels or (count is not None and len(stored) != count):
        want = f"({'B' if count is None else count}, T, H, W, {channels})"
        raise InvalidInput(f'clips["{view}"]: expected {want}, got {tuple(stored.shape)}')
    assert isinstance(stored, torch.Tensor)
    return stored


def _planes(view: str, stored: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, C) as stored -> (B, T, C, H, W) float32."""
    scaled = to_float(view, stored.permute(0, 1, 4, 2, 3).contiguous())
    assert isinstance(scaled, torch.Tensor)
    return scaled


def _sampled(planes: torch.Tensor, theta: torch.Tensor, size: int, usual: float) -> torch.Tensor:
    """Crop, flip and scale all frames of a clip alike: (B, T, C, H, W) -> (B, T, C, size, size).

    `usual` is the share of the picture's side that a crop has. It decides the scale at which pictures are sampled, for
    all clips alike: what a clip becomes must not depend on those that come with it.
    """
    count, time, channels, height, width = planes.shape
    if count == 0:  # torch makes no grid for none
        return planes.new_empty(0, time, channels, size, size)
    flat = planes.reshape(count, time * channels, height, width)
    # Bilinear sampling looks at 2 x 2 pixels, so from 1.5 pixels for each that is needed on, limbs would flicker.
    while min(flat.shape[-2:]) * usual >= 1.5 * size:
        flat = _halved(flat)
    grid = functional.affine_grid(theta, [count, 1, size, size], align_corners=False)
    sampled = functional.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.view(count, time, channels, size, size)


def _halved(pictures: torch.Tensor) -> torch.Tensor:
    """(..., H, W) at half the size, 2 x 2 pixels averaged; a fifth of the time of `avg_pool2d` on a CPU."""
    height, width = (side // 2 * 2 for side in pictures.shape[-2:])
    rows = pictures[..., 0:height:2, :width] + pictures[..., 1:height:2, :width]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def _colour_matrix(saturation: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """(B, 3, 3) that turns hues by so many turns and scales the distance from grey."""
    yiq = torch.tensor(_YIQ)
    angle = turn * (2 * math.pi)
    middle = torch.zeros(len(turn), 3, 3)
    middle[:, 0, 0] = 1
    middle[:, 1, 1] = middle[:, 2, 2] = torch.cos(angle) * saturation
    middle[:, 1, 2] = torch.sin(angle) * saturation
    middle[:, 2, 1] = -middle[:, 1, 2]
    mixed: torch.Tensor = torch.linalg.inv(yiq) @ middle @ yiq
    return mixed


def _recoloured(pictures: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Colours of (B, T, 3, H, W) in [-1, 1] changed as drawn."""
    device = pictures.device
    shown = torch.einsum("bij,btjhw->btihw", draws.colour.to(device), (pictures + 1) / 2)
    luma = torch.tensor(_LUMA, device=device)
    mean = torch.einsum("i,btihw->b", luma, shown) / (shown.shape[1] * shown.shape[3] * shown.shape[4])
    mean = mean[:, None, None, None, None]
    shown = (shown - mean) * draws.contrast.to(device)[:, None, None, None, None] + mean
    return shown.clamp_(0, 1).mul_(2).sub_(1)


def _blurred(pictures: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Clips (B, T, C, H, W) smoothed by a Gaussian where its standard deviation is not 0."""
    for clip in torch.nonzero(sigma).flatten().tolist():
        radius = max(1, math.ceil(2 * float(sigma[clip])))
        offsets = torch.arange(-radius, radius + 1, device=pictures.device)
        weights = torch.exp(-0.5 * (offsets / sigma[clip].to(pictures.device)) ** 2)
        weights = weights / weights.sum()
        planes = functional.pad(pictures[clip].flatten(0, 1)[:, None], [radius] * 4, mode="replicate")
        planes = functional.conv2d(functional.conv2d(planes, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
        pictures[clip] = planes.view_as(pictures[clip])
    return pictures
