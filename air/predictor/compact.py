"""The compact predictor: a small convolutional network on the patch grid that corrects the closed-form start.

It looks at the pixels of every patch (image, residual) and at the start's raw numbers, and predicts what to add to
them. All stages share the trunk; an embedding tells them apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from air.gaussians import RAW_CHANNELS, grid_shape
from air.predictor import GridPredictor
from air.predictor.network import PredictorNetwork


class _Block(nn.Module):
    """A residual block: depthwise 5 x 5, norm, two pointwise layers; starts as the identity."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, expansion * channels)
        self.narrow = nn.Linear(expansion * channels, channels)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, rows, columns) to the same."""
        mixed = self.mix(features).permute(0, 2, 3, 1)
        return features + self.narrow(F.gelu(self.widen(self.norm(mixed)))).permute(0, 3, 1, 2)


class CompactPredictor(PredictorNetwork):
    """See the module.

    Args:
        patch_size: Pixels between anchors.
        num_stages: How many stages it can predict.
        channels: Width of the trunk.
        depth: Blocks of the trunk.
        expansion: Hidden width of a block, in channels.
    """

    architecture = "compact"

    def __init__(
        self, *, patch_size: int, num_stages: int = 4, channels: int = 96, depth: int = 6, expansion: int = 3
    ) -> None:
        settings: dict[str, Any] = {
            "patch_size": patch_size,
            "num_stages": num_stages,
            "channels": channels,
            "depth": depth,
            "expansion": expansion,
        }
        super().__init__(**settings)
        self._grid = GridPredictor(patch_size)
        self.stem = nn.Conv2d(6, channels, 3 * patch_size, stride=patch_size, padding=patch_size)
        self.start = nn.Linear(RAW_CHANNELS, channels)
        self.stages = nn.Embedding(num_stages, channels)
        self.trunk = nn.Sequential(*(_Block(channels, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, RAW_CHANNELS)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> Tensor:
        """As `PredictorNetwork`."""
        batch, _, height, width = image.shape
        rows, columns = grid_shape(height, width, self.patch_size)
        start = torch.stack([self._grid.predict(*each, stage).raw for each in zip(image, canvas, active, strict=True)])
        pixels = torch.cat([image - 0.5, image - canvas], dim=1)
        padding = (0, columns * self.patch_size - width, 0, rows * self.patch_size - height)
        features = self.stem(F.pad(pixels, padding, mode="replicate"))
        given = self.start(start) + self.stages.weight[stage]
        features = self.trunk(features + given.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2))
        return start + self.head(self.norm(features.permute(0, 2, 3, 1))).flatten(1, 2)

    def start_stage(self, stage: int) -> None:
        """Copies the embedding of the stage before."""
        with torch.no_grad():
            self.stages.weight[stage] = self.stages.weight[stage - 1]
