"""Predictors turn an image, and the canvas drawn so far, into Gaussians, stage after stage.

`GridPredictor` is built in: a closed form without a network. `air.predictor.network` has the base class of the
networks, and each architecture has a folder. `air.predictor.checkpoint` stores and loads networks, and
`air.predictor.load.load_predictor` finds any predictor by name.

A predictor knows nothing of stage control, optimisation or files. The stage loop (`air.stages.loop`) calls it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from air.compute.threads import limit_torch
from air.fitting.grid import grid_initialization
from air.fitting.residual import residual_initialization
from air.gaussians import anchors


class Prediction(NamedTuple):
    """One Gaussian for every patch, in row-major order.

    Attributes:
        raw: Raw form (method.md section 2), shape (rows · columns, 8).
        anchor: The points in pixels that the raw offsets start from, shape (rows · columns, 2); usually
            `air.gaussians.anchors`.
    """

    raw: Tensor
    anchor: Tensor


class Predictor(Protocol):
    """The interface of all predictors.

    Attributes:
        patch_size: Pixels between anchors.
    """

    patch_size: int

    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> Prediction:
        """Predicts one raw Gaussian for every patch. The caller drops those of patches that are not active.

        Args:
            image: The image, shape (3, H, W), float32 in [0, 1].
            canvas: Unclamped render of the Gaussians of earlier stages, shape (3, H, W); zeros in stage 0.
            active: Patches that will keep their Gaussian (method.md section 3), boolean, shape (rows · columns,).
            stage: From 0.
            threads: CPU threads at most, torch's included. The last bits of a network's numbers may depend on it.
        """
        ...


class GridPredictor:
    """The built-in predictor "grid": a closed form without a network.

    Networks are compared with it, and it predicts in the first round of distillation.

    - Stage 0: round Gaussians on the anchors, as wide as the patch size sets, with least-squares colours.
    - Later stages: one narrow Gaussian in each patch, at the pixel where it removes most of the residual.
    """

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> Prediction:
        """As `Predictor`."""
        start = grid_initialization if stage == 0 else residual_initialization
        _, height, width = image.shape
        anchor = anchors(height, width, self.patch_size, image.dtype).to(image.device)
        with limit_torch(threads):
            return Prediction(start(image - canvas, self.patch_size), anchor)
