"""The compact predictor: a small convolutional network on the patch grid that corrects the closed-form start.

In every stage:

- The start is the grid's (`air.predictor.GridPredictor`): least-squares colours, later narrow Gaussians at the largest
  residual.
- A pass draws what there is and looks at it: the pixels of every patch (image, what earlier stages leave, what the
  proposal leaves), the raw numbers, and the step that each would take by itself (`air.predictor.feedback`). A
  convolutional trunk on the patch grid predicts what to add to the raw numbers.
- The next pass does the same to the result. Outside training, the last one may be made again.
- Last, outside training, a few conjugate-gradient iterations solve for the stage's colours (`air.colours`).

All stages and passes share the trunk; each has its own embedding at the trunk's entry and its own last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from air.colours import solve_colours
from air.gaussians import RAW_CHANNELS, grid_shape
from air.predictor import GridPredictor, Prediction
from air.predictor.feedback import feedback
from air.predictor.network import PredictorNetwork

_PIXEL_CHANNELS = 9
_FIXED_CHANNELS = 6
"""The first of them, image and what earlier stages leave, are the same in all passes."""

_RESIDUAL_GAIN = 2.0
"""Residuals are small beside an image; the proposal's are smaller again."""


class _Block(nn.Module):
    """A residual block: depthwise 5 x 5, norm, two pointwise layers; starts as the identity. Channels come last."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, expansion * channels)
        self.narrow = nn.Linear(expansion * channels, channels)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, rows, columns, C) to the same."""
        mixed = self.mix(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return features + self.narrow(F.gelu(self.widen(self.norm(mixed)), approximate="tanh"))


def _small_head(channels: int) -> nn.Linear:
    """A last layer that begins next to zero, so that a fresh network gives the start."""
    head = nn.Linear(channels, RAW_CHANNELS)
    nn.init.normal_(head.weight, std=1e-3)
    nn.init.zeros_(head.bias)
    return head


class CompactPredictor(PredictorNetwork):
    """See the module.

    Args:
        patch_size: Pixels between anchors.
        num_stages: How many stages it can predict.
        channels: Width of the trunk.
        depth: Blocks of the trunk.
        expansion: Hidden width of a block, in channels.
        passes: How often a stage looks at its proposal and corrects it.
        extra_passes: How often more, with the weights of the last pass, where nothing is trained.
        colour_iterations: Conjugate-gradient iterations on the colours of each stage, where nothing is trained.
        quantizer_bits: As for `PredictorNetwork`.

    Raises:
        ValueError: A setting is out of its bounds.
    """

    architecture = "compact"

    def __init__(
        self,
        *,
        patch_size: int,
        num_stages: int = 4,
        channels: int = 64,
        depth: int = 4,
        expansion: int = 3,
        passes: int = 2,
        extra_passes: int = 0,
        colour_iterations: int = 0,
        quantizer_bits: Sequence[int] | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "patch_size": patch_size,
            "num_stages": num_stages,
            "channels": channels,
            "depth": depth,
            "expansion": expansion,
            "passes": passes,
            "extra_passes": extra_passes,
            "colour_iterations": colour_iterations,
        }
        for name, value in settings.items():
            least = 0 if name in ("extra_passes", "colour_iterations") else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
        super().__init__(feature_size=2 * channels, quantizer_bits=quantizer_bits, **settings)
        self.passes = passes
        self.extra_passes = extra_passes
        self.colour_iterations = colour_iterations
        self._grid = GridPredictor(patch_size)
        self.stem = nn.Conv2d(_PIXEL_CHANNELS, channels, patch_size, stride=patch_size)
        self.numbers = nn.Linear(2 * RAW_CHANNELS + 1, channels)
        self.embedding = nn.Parameter(torch.zeros(num_stages, passes, channels))
        self.trunk = nn.Sequential(*(_Block(channels, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels)
        self.heads = nn.ModuleList([_small_head(channels) for _ in range(num_stages * passes)])

    def proposals(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> list[Tensor]:
        """As `PredictorNetwork`: the raw Gaussians after every pass."""
        _, _, height, width = image.shape
        rows, columns = grid_shape(height, width, self.patch_size)
        inputs = zip(image, canvas, active, strict=True)
        raw = torch.stack([self._grid.predict(*each, stage).raw for each in inputs])
        missing = (image - canvas) * (_RESIDUAL_GAIN if stage else 1.0)
        seen = self._see(torch.cat([image - 0.5, missing], dim=1), slice(0, _FIXED_CHANNELS), rows, columns)
        proposals = []
        for number in [*range(self.passes), *[self.passes - 1] * (0 if self.training else self.extra_passes)]:
            # Each pass answers for its own step: what it is given carries no gradient to the one before.
            given = raw.detach()
            residual, steps = feedback(given, image, canvas, active, self.patch_size)
            left = self._see(residual * _RESIDUAL_GAIN**2, slice(_FIXED_CHANNELS, None), rows, columns)
            numbers = self.numbers(torch.cat([given, steps, active[..., None].to(steps)], dim=2))
            numbers = (numbers + self.embedding[stage, number] + self.stem.bias).reshape(left.shape)
            features = self.norm(self._run_trunk(seen + left + numbers))
            correction = self.heads[stage * self.passes + number](features).flatten(1, 2)
            raw = given + correction.float()
            proposals.append(raw)
        return proposals

    def _see(self, pixels: Tensor, channels: slice, rows: int, columns: int) -> Tensor:
        """The stem's convolution of some of its channels, without its bias, channels last: (B, rows, columns, C)."""
        size = self.patch_size
        padding = (0, columns * size - pixels.shape[3], 0, rows * size - pixels.shape[2])
        tiles = F.pad(pixels, padding, mode="replicate").reshape(len(pixels), -1, rows, size, columns, size)
        return F.linear(tiles.permute(0, 2, 4, 1, 3, 5).flatten(3), self.stem.weight[:, channels].flatten(1))

    def _run_trunk(self, features: Tensor) -> Tensor:
        if features.device.type == "cpu" and not torch.is_grad_enabled():
            from air.predictor import compact_cpu

            if compact_cpu.fits(features):
                return compact_cpu.run_trunk(features, self.trunk)  # pyright: ignore[reportArgumentType]
        return self.trunk(features)

    def forward(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> Tensor:
        """As `PredictorNetwork`."""
        return self.proposals(image, canvas, active, stage)[-1]

    def global_feature(self, image: Tensor, canvas: Tensor, stage: int) -> Tensor:
        """As `PredictorNetwork`: of the stem's view of the image, its mean over the patches and how far they spread."""
        _, _, height, width = image.shape
        rows, columns = grid_shape(height, width, self.patch_size)
        seen = self._see(image - 0.5, slice(0, 3), rows, columns).flatten(1, 2)
        mean = seen.mean(dim=1)
        return torch.cat([mean, (seen - mean[:, None]).abs().mean(dim=1)], dim=1)

    @torch.no_grad()
    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> Prediction:
        """As `PredictorNetwork`, with the colours solved."""
        prediction = super().predict(image, canvas, active, stage)
        if self.training or not self.colour_iterations:
            return prediction
        raw = prediction.raw.clone()
        raw[active] = solve_colours(
            raw[active],
            prediction.anchor[active],
            image,
            self.patch_size,
            self.colour_iterations,
            canvas=canvas,
            threads=torch.get_num_threads(),
        )
        return Prediction(raw, prediction.anchor)

    def start_stage(self, stage: int) -> None:
        """Copies what is the stage's own from the stage before."""
        with torch.no_grad():
            self.embedding[stage] = self.embedding[stage - 1]
        for number in range(self.passes):
            before = self.heads[(stage - 1) * self.passes + number]
            self.heads[stage * self.passes + number].load_state_dict(before.state_dict())
