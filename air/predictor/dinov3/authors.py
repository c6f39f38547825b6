"""Checkpoints that the method's authors released (method.md section 9.6), as networks of the architecture "dinov3".

Their stretched pixels (9.2) become the setting `pixel_stretch`. The behaviour of their stage control when no patch is
bad (9.4) does not depend on weights and is not reproduced. The weights of their quantiser are recognised and left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from air.errors import CheckpointError
from air.predictor.dinov3.network import BACKBONES, DECODER_BLOCKS, NECK_BLOCKS
from air.predictor.dinov3.weights import (
    is_state,
    load_exactly,
    match,
    read_torch_file,
    release_name,
    release_value,
    without_masks,
)
from air.predictor.network import PredictorNetwork, build

_QUANTISER = re.compile(
    r"feed_forward_gaussian_codec\.(xy|scaling|rotation|color)_quantizer\."
    r"(bits_per_channel|qmin_per_channel|qmax_per_channel|offset_net\.weight|offset_net\.bias)"
)

_HEAD_NAMES = (
    (r"^(image_mean|image_std)$", r"encoder.\1"),
    (r"^projections\.", "encoder.output_projections."),
    (r"^output\.", "gaussian_feat_decoder.output_blocks.4."),
    (r"^decoder\.", "gaussian_feat_decoder."),
    (r"^(neck|gaussian_feat_decoder)\.inputs\.", r"\1.input_blocks."),
    (r"^(neck|gaussian_feat_decoder)\.upsamplers\.", r"\1.resamplers."),
    (r"^(neck|gaussian_feat_decoder)\.blocks\.(\d+)\.(\d+)\.first\.", r"\1.res_blocks.\2.\3.layers.2."),
    (r"^(neck|gaussian_feat_decoder)\.blocks\.(\d+)\.(\d+)\.second\.", r"\1.res_blocks.\2.\3.layers.5."),
    (r"^patch\.", "patch_embedding.patchify.conv."),
    (r"^norm\.", "feat_layer_norm."),
    (r"^linear\.", "gaussian_linear."),
)


@dataclass(frozen=True, eq=False)
class AuthorsCheckpoint:
    """The contents of a released file.

    Attributes:
        network: The network with its weights, in evaluation mode.
        epoch: Epoch of the authors' training.
        left_out: Keys of the quantiser, which the network does not have.
    """

    network: PredictorNetwork
    epoch: int
    left_out: list[str]


def read_authors_checkpoint(path: str | Path) -> AuthorsCheckpoint:
    """Reads a released file. Every key must be known.

    Raises:
        CheckpointError: It is not a released file, or its keys or sizes are not those of the architecture.
        MissingExtraError: `transformers` is not installed.
    """
    path = Path(path)
    document = read_torch_file(path)
    if not isinstance(document, dict) or not {"model_config", "model", "epoch"} <= document.keys():
        raise CheckpointError(
            f"{path}: is not a checkpoint of the authors, which is a dict of model_config, model and epoch"
        )
    state, epoch = document["model"], document["epoch"]
    if not is_state(state) or not isinstance(epoch, int):
        raise CheckpointError(f"{path}: its entry 'model' is not a dict of tensors, or 'epoch' is not a number")
    network = _build(document["model_config"], path)
    left_out = [key for key in state if _QUANTISER.fullmatch(key)]
    plain = without_masks({key: value for key, value in state.items() if key not in left_out}, path)
    weights = match(network.state_dict(), plain, _their_name, _our_value).check(path)
    load_exactly(network, weights, path)
    return AuthorsCheckpoint(network.eval(), epoch, left_out)


def _build(config: Any, path: Path) -> PredictorNetwork:
    """The network that a `model_config` describes, without weights."""
    try:
        head = config["gaussian_head_config"]
        settings = {
            "patch_size": head["patch_embedding"]["patch_size"],
            "num_stages": config["head_num"],
            "backbone": head["encoder"]["backbone"].removeprefix("dinov3_"),
            "channels": head["neck"]["dim_res_blocks"],
            "features": head["patch_embedding"]["out_dim"],
            "pixel_stretch": True,
        }
        network = build("dinov3", settings, empty=True)
        given = _flat(head)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: its model_config does not describe a DINOv3 predictor: {error!r}") from None
    expected = _flat(_head_config(network.settings))
    differing = [
        f"{key} is {given.get(key, 'missing')!r}, expected {expected.get(key, 'nothing')!r}"
        for key in sorted({*given, *expected})
        if key not in given or key not in expected or given[key] != expected[key]
    ]
    if differing:
        raise CheckpointError(f"{path}: its model_config describes another architecture: {'; '.join(differing)}")
    return network


def _flat(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def _head_config(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The authors' `gaussian_head_config` of a network with these settings."""
    channels: Sequence[int] = settings["channels"]
    common = {
        "dim_res_blocks": list(channels),
        "res_block_in_norm": "none",
        "res_block_hidden_norm": "none",
        "resamplers": ["conv_transpose"] * 3 + ["bilinear"],
    }
    return {
        "encoder": {
            "backbone": f"dinov3_{settings['backbone']}",
            "intermediate_layers": list(BACKBONES[settings["backbone"]].used_blocks),
            "dim_out": channels[0],
        },
        "neck": {
            **common,
            "dim_in": [channels[0] + 2, 2, 2, 2, 2],
            "dim_out": None,
            "num_res_blocks": list(NECK_BLOCKS),
        },
        "gaussian_feat_decoder": {
            **common,
            "dim_in": list(channels),
            "dim_out": [None, None, None, None, channels[-1]],
            "num_res_blocks": list(DECODER_BLOCKS),
        },
        "patch_embedding": {
            "in_dim": channels[-1],
            "out_dim": settings["features"],
            "patch_size": settings["patch_size"],
        },
    }


def _their_name(name: str) -> str:
    """The authors' name of a parameter of the network."""
    _, stage, name = name.split(".", 2)
    if name.startswith("backbone."):
        return f"gaussian_heads.{stage}.encoder.backbone.{release_name(name.removeprefix('backbone.'))}"
    for pattern, replacement in _HEAD_NAMES:
        name = re.sub(pattern, replacement, name)
    return f"gaussian_heads.{stage}.{name}"


def _our_value(name: str, value: Tensor) -> Tensor:
    _, _, name = name.split(".", 2)
    return release_value(name.removeprefix("backbone."), value) if name.startswith("backbone.") else value
