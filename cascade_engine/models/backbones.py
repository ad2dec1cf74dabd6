"""Backbones: clips (B, C, T, H, W) to pooled features (B, F), for any T, H and W."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SMALL_WIDTH = 16  # of r3d_small's first layer; the others are multiples of it


def r3d_small(channels: int) -> tuple[nn.Module, int]:
    """A residual net for CPUs: a stem and three blocks of 3 x 3 x 3 convolutions, 0.23 million weights.

    They lie with the channels last: a step of 64 clips of 8 x 32 x 32 took 133 ms so, and 172 otherwise.
    """
    first, second, third = SMALL_WIDTH, 2 * SMALL_WIDTH, 4 * SMALL_WIDTH
    layers = nn.Sequential(
        *_layer(channels, first, (3, 5, 5), (1, 2, 2)),
        Residual(first, first, (1, 2, 2)),
        Residual(first, second, (2, 2, 2)),
        Residual(second, third, (2, 2, 2)),
    )
    return _pooled(layers.to(memory_format=torch.channels_last_3d)), third


class SubtractBackground(nn.Module):
    """What moves: a clip less its mean over time, so that nothing is left of what stands still."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) to the same shape."""
        return clips - clips.mean(dim=2, keepdim=True)


class Residual(nn.Module):
    """Two convolutions, and what comes in added to what comes out.

    Source: He et al., CVPR 2016, with 3D convolutions as Tran et al., CVPR 2018 (R3D).
    """

    def __init__(self, inside: int, outside: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_layer(inside, outside, (3, 3, 3), stride), *_layer(outside, outside, (3, 3, 3), (1, 1, 1))[:2]
        )
        self.shortcut = nn.Sequential(*_layer(inside, outside, (1, 1, 1), stride)[:2])

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, inside, T, H, W) to (B, outside, T', H', W')."""
        return nn.functional.relu(self.convolutions(batch) + self.shortcut(batch), inplace=True)


def _layer(inside: int, outside: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> list[nn.Module]:
    depth, height, width = kernel
    padding = (depth // 2, height // 2, width // 2)
    convolution = nn.Conv3d(inside, outside, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm3d(outside), nn.ReLU(inplace=True)]


def s3d(channels: int) -> tuple[nn.Module, int]:
    """Separable inception in 3D (Xie et al., ECCV 2018), torchvision's layers without its fixed 7 x 7 pooling."""
    from torchvision.models.video import s3d as build

    features: Any = build(weights=None).features
    features[0][0][0] = _with_channels(features[0][0][0], channels)
    features[13].ceil_mode = True  # its unpadded pooling would refuse what is one frame or one pixel by then
    for module in features.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 0.1  # torchvision's 0.001 is for fine-tuning: short runs would evaluate on N(0, 1)
    return _pooled(features), 1024


def r3d18(channels: int) -> tuple[nn.Module, int]:
    """An 18-layer residual net of 3D convolutions (Tran et al., CVPR 2018), torchvision's."""
    from torchvision.models.video import r3d_18

    return _residual(r3d_18(weights=None), channels)


def r2plus1d18(channels: int) -> tuple[nn.Module, int]:
    """An 18-layer residual net of factored 3D convolutions (Tran et al., CVPR 2018), torchvision's."""
    from torchvision.models.video import r2plus1d_18

    return _residual(r2plus1d_18(weights=None), channels)


def _residual(net: Any, channels: int) -> tuple[nn.Module, int]:
    net.stem[0] = _with_channels(net.stem[0], channels)
    return _pooled(nn.Sequential(net.stem, net.layer1, net.layer2, net.layer3, net.layer4)), 512


def _pooled(features: nn.Module) -> nn.Module:
    return nn.Sequential(features, nn.AdaptiveAvgPool3d(1), nn.Flatten())


def _with_channels(stem: nn.Conv3d, channels: int) -> nn.Conv3d:
    """The first convolution for another number of input channels, or itself where that is the same."""
    if channels == stem.in_channels:
        return stem
    kernel, stride, padding = map(_triple, (stem.kernel_size, stem.stride, stem.padding))
    made = nn.Conv3d(channels, stem.out_channels, kernel, stride, padding, bias=stem.bias is not None)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


def _triple(size: Any) -> tuple[int, int, int]:
    depth, height, width = size
    return depth, height, width
