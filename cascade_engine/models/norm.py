"""Batch norm on one device that does not tell a query which key is its own.

Where query and key batches are normalised by statistics of the same clips, the net can recognise its own key by them
and the loss falls without learning. MoCo shuffles keys across GPUs; one device does the same by taking statistics over
groups of the batch, with the keys in another order, so that a query and its key meet different companions.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
Norm: TypeAlias = Literal["batch", "group"]

GROUPS = 8  # of group norm, where they divide the channels


class GroupedBatchNorm3d(nn.BatchNorm3d):
    """Batch norm whose training statistics are taken over `groups` consecutive parts of the batch.

    In evaluation it is plain batch norm. Running statistics move once a batch, to the mean over the groups. A part that
    has a single value per channel has no spread (one clip, shrunk to 1 x 1 x 1): the batch is then normalised by the
    running statistics, which stay as they are.

    Source: He et al., CVPR 2020 (MoCo), section 3.3, for the leak and the shuffle.
    """

    groups = 1

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, T, H, W)."""
        if not self.training:
            return super().forward(batch)
        parts = torch.tensor_split(batch, max(1, min(self.groups, len(batch))))
        if any(part.numel() <= part.shape[1] for part in parts):
            return nn.functional.batch_norm(
                batch, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.groups == 1:
            return super().forward(batch)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        share = self.momentum if self.momentum is not None else 0.1
        means, variances = self.running_mean.new_zeros(2, len(parts), self.num_features)
        done = []
        for part, mean, variance in zip(parts, means, variances, strict=True):
            # with momentum 1 the kernel leaves the part's own statistics in these buffers
            done.append(nn.functional.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps))
        with torch.no_grad():
            self.running_mean.lerp_(means.mean(0), share)
            self.running_var.lerp_(variances.mean(0), share)
            self.num_batches_tracked += 1
        return torch.cat(done)


def with_group_norm(module: Module) -> Module:
    """Put group norm, of `GROUPS` groups, in the place of every 3D batch norm that is a part of `module`.

    A clip's features then depend on that clip alone: nothing leaks, and training and evaluation compute the same.

    Source: Wu & He, ECCV 2018.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm3d):
                setattr(parent, name, nn.GroupNorm(math.gcd(GROUPS, child.num_features), child.num_features))
    return module


def group_batch_norm(module: Module, groups: int) -> Module:
    """Make every 3D batch norm in `module` take its training statistics over `groups` parts of the batch, in place."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm3d):
            child.__class__ = GroupedBatchNorm3d
            vars(child)["groups"] = groups
    return module
