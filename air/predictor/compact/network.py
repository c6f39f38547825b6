"""The compact predictor: a small convolutional network on the patch grid that corrects the closed-form start.

In every stage:

- The proposal starts as the grid's (`air.predictor.base.GridPredictor`): least-squares colours in stage 0, narrow
  Gaussians at the largest residual in later stages.
- A pass draws the proposal. Its inputs are the pixels of every patch (the image, the residual that earlier stages
  leave, the residual that the proposal leaves), the raw numbers, and the step that each number would take by itself
  (`air.predictor.compact.feedback`). A convolutional trunk on the patch grid predicts what to add to the raw numbers.
- The next pass corrects the result in the same way. Outside training, the last pass may be repeated.
- Outside training, a few conjugate-gradient iterations then solve for the stage's colours
  (`air.predictor.compact.colours`).

All stages and passes share the trunk. Each stage and pass has its own embedding at the trunk's entry and its own last
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from air.compute.backends import has_cpu_kernels
from air.compute.compile import LANES, KernelSet
from air.compute.threads import Workers, limit_torch
from air.gaussians import RAW_CHANNELS, grid_shape
from air.predictor.base import GridPredictor, Prediction
from air.predictor.compact.colours import solve_colours
from air.predictor.compact.feedback import Feedback
from air.predictor.network import PredictorNetwork

_PIXEL_CHANNELS = 9
"""Three of the image, three of the residual of earlier stages, three of the residual of the proposal."""

_RESIDUAL_GAIN = 2.0
"""Residuals of earlier stages are multiplied by this and residuals of the proposal by its square: residuals are smaller
than the image."""


class _Block(nn.Module):
    """A residual block: depthwise 5 x 5, norm, two pointwise layers. A new block is the identity. Channels are last."""

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


def split_patches(pixels: Tensor, size: int) -> Tensor:
    """The pixels of every patch, (B, rows · columns, 3 · size²), of images (B, 3, H, W) continued by their border."""
    if has_cpu_kernels(pixels) and not pixels.requires_grad:
        from air.predictor.compact import patches_cpu

        images = [torch.from_numpy(patches_cpu.patch_pixels(image, size)) for image in pixels.numpy()]
        return images[0][None] if len(images) == 1 else torch.stack(images)
    _, _, height, width = pixels.shape
    rows, columns = grid_shape(height, width, size)
    padded = F.pad(pixels, (0, columns * size - width, 0, rows * size - height), mode="replicate")
    tiles = padded.reshape(len(pixels), -1, rows, size, columns, size)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _small_head(channels: int) -> nn.Linear:
    """A last layer with weights near zero, so that a new network leaves the proposal almost as it starts."""
    head = nn.Linear(channels, RAW_CHANNELS)
    nn.init.normal_(head.weight, std=1e-3)
    nn.init.zeros_(head.bias)
    return head


class CompactPredictor(PredictorNetwork):
    """The architecture "compact": passes over the patch grid that correct a closed-form proposal.

    Args:
        patch_size: Pixels between anchors.
        num_stages: Number of stages that it can predict.
        channels: Width of the trunk.
        depth: Blocks of the trunk.
        expansion: Hidden width of a block, as a multiple of `channels`.
        passes: Corrections of the proposal in each stage.
        extra_passes: Further passes outside training, with the weights of the last pass.
        colour_iterations: Conjugate-gradient iterations on the colours of each stage, outside training.
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

    def proposals(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> list[Tensor]:
        """As `PredictorNetwork`: the raw Gaussians after every pass."""
        with Workers(threads) as workers:
            return self._pass_by_pass(image, canvas, active, stage, workers)

    def _pass_by_pass(
        self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, workers: Workers
    ) -> list[Tensor]:
        _, _, height, width = image.shape
        rows, columns = grid_shape(height, width, self.patch_size)
        inputs = zip(image, canvas, active, strict=True)
        raw = torch.stack([self._grid.predict(*each, stage, workers.count).raw for each in inputs])
        look = Feedback(image, canvas, active, self.patch_size, workers)
        assert self.stem.bias is not None
        seen = self.stem.bias + self._see(image - 0.5, slice(0, 3), 1.0)
        seen = seen + self._see(image - canvas, slice(3, 6), _RESIDUAL_GAIN if stage else 1.0)
        run_trunk = self._trunk_for(seen.unflatten(1, (rows, columns)), workers)
        proposals = []
        for number in [*range(self.passes), *[self.passes - 1] * (0 if self.training else self.extra_passes)]:
            # Each pass is trained for its own correction: no gradient flows to the pass before.
            given = raw.detach()
            excess, steps = look(given)
            numbers = self.numbers(torch.cat([given, steps, active[..., None].to(steps)], dim=2))
            features = numbers + self.embedding[stage, number]
            features.add_(seen).add_(self._see(excess, slice(6, 9), -(_RESIDUAL_GAIN**2)))
            features = self.norm(run_trunk(features.unflatten(1, (rows, columns))))
            correction = self.heads[stage * self.passes + number](features).flatten(1, 2)
            raw = given + correction.float()
            proposals.append(raw)
        return proposals

    def _see(self, pixels: Tensor, channels: slice, gain: float) -> Tensor:
        """The stem's convolution of three of its channels, times a gain, without its bias: (B, rows · columns, C)."""
        weight = self.stem.weight[:, channels].flatten(1) * gain
        return F.linear(split_patches(pixels, self.patch_size), weight)

    def _trunk_for(self, features: Tensor, workers: Workers) -> Callable[[Tensor], Tensor]:
        """The trunk as a function of features (B, rows, columns, C) of the shape, dtype and device of `features`."""
        if has_cpu_kernels(features) and not torch.is_grad_enabled():
            from air.predictor.compact import trunk_cpu

            if trunk_cpu.fits(features):
                _, rows, columns, _ = features.shape
                return trunk_cpu.Trunk(self.trunk, rows, columns, workers)  # pyright: ignore[reportArgumentType]
        return self.trunk

    def forward(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> Tensor:
        """As `PredictorNetwork`."""
        return self.proposals(image, canvas, active, stage, threads)[-1]

    def global_feature(self, image: Tensor, canvas: Tensor, stage: int) -> Tensor:
        """As `PredictorNetwork`: mean and mean absolute deviation, over patches, of the stem's output for the image."""
        seen = self._see(image - 0.5, slice(0, 3), 1.0)
        mean = seen.mean(dim=1)
        return torch.cat([mean, (seen - mean[:, None]).abs().mean(dim=1)], dim=1)

    @torch.no_grad()
    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> Prediction:
        """As `PredictorNetwork`, with the colours solved."""
        prediction = super().predict(image, canvas, active, stage, threads)
        if self.training or not self.colour_iterations:
            return prediction
        raw = prediction.raw.clone()
        with limit_torch(threads):
            raw[active] = solve_colours(
                raw[active],
                prediction.anchor[active],
                image,
                self.patch_size,
                self.colour_iterations,
                canvas=canvas,
                threads=threads,
            )
        return Prediction(raw, prediction.anchor)

    def start_stage(self, stage: int) -> None:
        """Copies the embeddings and last layers of the stage before."""
        with torch.no_grad():
            self.embedding[stage] = self.embedding[stage - 1]
        for number in range(self.passes):
            before = self.heads[(stage - 1) * self.passes + number]
            self.heads[stage * self.passes + number].load_state_dict(before.state_dict())


def compact_kernels() -> KernelSet:
    """The kernels that predicting runs on the CPU beside those of an optimisation."""
    from air.predictor.compact import patches_cpu, trunk_cpu
    from air.rendering.raw_cpu import gauss_newton

    def use_each() -> None:
        with torch.random.fork_rng(devices=[]):  # drawing its weights must not advance the caller's generator
            network = CompactPredictor(patch_size=1, num_stages=1, channels=LANES, depth=1).eval()
        image = torch.zeros(3, 1, 1)
        network.predict(image, image, torch.ones(1, dtype=torch.bool), 0)

    trunk = (trunk_cpu.mix_and_normalise, trunk_cpu.add_and_activate, trunk_cpu.add_to_stream)
    return KernelSet((*trunk, gauss_newton), use_each, seconds=1) + patches_cpu.KERNELS
