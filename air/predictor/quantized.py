"""The learned quantiser of a network, for the Gaussians of one image (method.md section 6).

    table = learned_table(network, image, stages)
    blob = air.codec.file.encode_stages(stages, height, width, network.patch_size, table)

The file holds the table, so decoding does not need the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from air.codec.symbols import Stage
from air.codec.uniform import UniformQuantizer
from air.compute.threads import limit_torch
from air.errors import CodecError
from air.gaussians import Gaussians
from air.predictor.network import PredictorNetwork
from air.rendering.render import render


@torch.no_grad()
def learned_table(
    network: PredictorNetwork, image: Tensor, stages: Sequence[Stage], *, threads: int = 1
) -> UniformQuantizer:
    """The steps and lows with which the network stores its Gaussians of this image.

    Args:
        network: Trained by `air train --phase quantize`.
        image: Shape (3, H, W), float32 in [0, 1], on the network's device.
        stages: All stages in which it added Gaussians.
        threads: CPU threads at most, torch's included.

    Raises:
        CodecError: The network has learned no quantiser.
    """
    if network.quantizer is None:
        raise CodecError(
            "this predictor has learned no quantiser: train one with `air train --phase quantize --from CHECKPOINT`"
        )
    _, height, width = image.shape
    before = Gaussians.concatenate([stage.gaussians for stage in stages[:-1]]).to(image.device)
    canvas = render(before, height, width, threads=threads)
    with limit_torch(threads):
        feature = network.global_feature(image[None], canvas[None], max(0, len(stages) - 1))[0]
        return network.quantizer.table(feature)
