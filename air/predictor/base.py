"""Predictors: what turns an image, and what is drawn of it so far, into Gaussians, stage after stage.

`GridPredictor` is the built-in closed form and needs no network. Networks are in `network` (what they share) and in a
module for each architecture; `checkpoint` stores and loads them. Importing this package loads none of those;
`load_predictor` finds any of them by name.

A predictor knows nothing of stage control, optimisation or files: the stage loop (`air.stages.loop`) calls it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from air.fitting.grid import grid_initialization
from air.fitting.residual import residual_initialization
from air.gaussians import anchors


class Prediction(NamedTuple):
    """One Gaussian for every patch, in row-major order.

    Attributes:
        raw: Raw form (method.md section 2), shape (rows · columns, 8).
        anchor: What their offsets count from, in pixels, shape (rows · columns, 2); as a rule `air.gaussians.anchors`.
    """

    raw: Tensor
    anchor: Tensor


class Predictor(Protocol):
    """Anything that turns what is missing of an image into Gaussians.

    Attributes:
        patch_size: Pixels between anchors.
    """

    patch_size: int

    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> Prediction:
        """Raw Gaussians for every patch; those of patches that are not active are not used.

        Args:
            image: What is to be reached, shape (3, H, W), float32 in [0, 1].
            canvas: Unclamped render of the Gaussians of earlier stages, shape (3, H, W); zeros in stage 0.
            active: Which patches will keep their Gaussian (method.md section 3), boolean, shape (rows · columns,).
            stage: From 0.
        """
        ...


class GridPredictor:
    """The built-in predictor "grid": closed form, no network. The baseline, and the first round's predictor.

    - Stage 0: round Gaussians on the anchors, as wide as the patch asks for, with least-squares colours.
    - Later stages: narrow ones at that pixel of each patch where they take most of the residual away.
    """

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> Prediction:
        """As `Predictor`."""
        start = grid_initialization if stage == 0 else residual_initialization
        _, height, width = image.shape
        anchor = anchors(height, width, self.patch_size, image.dtype).to(image.device)
        return Prediction(start(image - canvas, self.patch_size), anchor)
