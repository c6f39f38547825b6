"""Random weights in the layout of the files that others released: DINOv3 backbones, and the authors' checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = {"hidden_size": 24, "depth": 4, "heads": 2, "mlp_ratio": 2.0, "num_register_tokens": 3}
"""Sizes of a backbone for tests, as the setting `backbone`."""

CHANNELS = [12, 10, 8, 6, 4]
FEATURES = 9


class Random:
    """Draws weights, of a size at which every part of a network shows in its output."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        spread = max(torch.Size(shape[1:]).numel(), 1) ** -0.5 if len(shape) > 1 else 0.5
        return spread * torch.randn(shape, generator=self.generator)


def released_backbone(seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the keys of dinov3_vit*16_pretrain_*.pth, of size TINY."""
    random = Random(seed)
    width, heads = TINY["hidden_size"], TINY["heads"]
    hidden = int(width * TINY["mlp_ratio"])
    state = {
        "cls_token": random(1, 1, width),
        "storage_tokens": random(1, TINY["num_register_tokens"], width),
        "mask_token": random(1, width),
        "patch_embed.proj.weight": random(width, 3, 16, 16),
        "patch_embed.proj.bias": random(width),
        # As released: 100^(4 i / channels of a head), rounded to bfloat16.
        "rope_embed.periods": (100 ** (4 * torch.arange(width // heads // 4) / (width / heads))).bfloat16().float(),
        "norm.weight": 1 + random(width),
        "norm.bias": random(width),
    }
    for block in range(TINY["depth"]):
        part = {
            "norm1.weight": 1 + random(width),
            "norm1.bias": random(width),
            "attn.qkv.weight": random(3 * width, width),
            "attn.qkv.bias": random(3 * width),
            "attn.qkv.bias_mask": torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(width),
            "attn.proj.weight": random(width, width),
            "attn.proj.bias": random(width),
            "ls1.gamma": 1 + random(width),
            "norm2.weight": 1 + random(width),
            "norm2.bias": random(width),
            "mlp.fc1.weight": random(hidden, width),
            "mlp.fc1.bias": random(hidden),
            "mlp.fc2.weight": random(width, hidden),
            "mlp.fc2.bias": random(width),
            "ls2.gamma": 1 + random(width),
        }
        state |= {f"blocks.{block}.{key}": value for key, value in part.items()}
    return state


def authors_checkpoint(patch_size: int = 5, stages: int = 2, quantised: bool = False) -> dict[str, Any]:
    """A released checkpoint with the backbone "dinov3_tiny" (TINY) and narrow convolution stacks."""
    random = Random(100)
    state = {}
    for stage in range(stages):
        head = {
            "encoder.image_mean": torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1),
            "encoder.image_std": torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1),
            "patch_embedding.patchify.conv.weight": random(FEATURES, CHANNELS[-1], patch_size, patch_size),
            "feat_layer_norm.weight": 1 + random(FEATURES),
            "feat_layer_norm.bias": random(FEATURES),
            "gaussian_linear.weight": random(8, FEATURES),
            "gaussian_linear.bias": random(8),
        }
        head |= {f"encoder.backbone.{key}": value for key, value in released_backbone(stage).items()}
        for index in range(2):
            head |= _layer(random, f"encoder.output_projections.{index}", CHANNELS[0], TINY["hidden_size"], 1)
        head |= _stack(random, "neck", [CHANNELS[0] + 2, 2, 2, 2, 2], (0, 2, 2, 2, 0))
        head |= _stack(random, "gaussian_feat_decoder", CHANNELS, (0, 1, 1, 1, 0))
        head |= _layer(random, "gaussian_feat_decoder.output_blocks.4", CHANNELS[-1], CHANNELS[-1], 1)
        state |= {f"gaussian_heads.{stage}.{key}": value for key, value in head.items()}
    if quantised:
        for name, bits in (("xy", [8, 8]), ("scaling", [7, 7]), ("rotation", [7]), ("color", [8, 4, 4])):
            prefix = f"feed_forward_gaussian_codec.{name}_quantizer"
            state[f"{prefix}.bits_per_channel"] = torch.tensor(bits, dtype=torch.int32)
            state[f"{prefix}.qmin_per_channel"] = torch.zeros(len(bits))
            state[f"{prefix}.qmax_per_channel"] = 2.0 ** torch.tensor(bits) - 1
            state[f"{prefix}.offset_net.weight"] = random(2 * len(bits), TINY["hidden_size"])
            state[f"{prefix}.offset_net.bias"] = random(2 * len(bits))
    config = {"head_num": stages, "quantize": quantised, "gaussian_head_config": _head_config(patch_size)}
    return {"model_config": config, "model": state, "epoch": 29}


def _layer(random: Random, name: str, out: int, given: int, size: int) -> dict[str, Tensor]:
    return {f"{name}.weight": random(out, given, size, size), f"{name}.bias": random(out)}


def _stack(random: Random, name: str, given: list[int], blocks: tuple[int, ...]) -> dict[str, Tensor]:
    state = {}
    for level, width in enumerate(CHANNELS):
        state |= _layer(random, f"{name}.input_blocks.{level}", width, given[level], 1)
        for block in range(blocks[level]):
            for layer in (2, 5):
                state |= _layer(random, f"{name}.res_blocks.{level}.{block}.layers.{layer}", width, width, 3)
        if level < 3:
            above = CHANNELS[level + 1]
            state[f"{name}.resamplers.{level}.0.weight"] = random(width, above, 2, 2)
            state[f"{name}.resamplers.{level}.0.bias"] = random(above)
            state |= _layer(random, f"{name}.resamplers.{level}.1", above, above, 3)
    return state | _layer(random, f"{name}.resamplers.3.1", CHANNELS[4], CHANNELS[3], 3)


def _head_config(patch_size: int) -> dict[str, Any]:
    stack = {
        "dim_res_blocks": CHANNELS,
        "res_block_in_norm": "none",
        "res_block_hidden_norm": "none",
        "resamplers": ["conv_transpose", "conv_transpose", "conv_transpose", "bilinear"],
    }
    return {
        "encoder": {"backbone": "dinov3_tiny", "intermediate_layers": [1, 3], "dim_out": CHANNELS[0]},
        "neck": {
            **stack,
            "dim_in": [CHANNELS[0] + 2, 2, 2, 2, 2],
            "dim_out": None,
            "num_res_blocks": [0, 2, 2, 2, 0],
        },
        "gaussian_feat_decoder": {
            **stack,
            "dim_in": CHANNELS,
            "dim_out": [None, None, None, None, CHANNELS[-1]],
            "num_res_blocks": [0, 1, 1, 1, 0],
        },
        "patch_embedding": {"in_dim": CHANNELS[-1], "out_dim": FEATURES, "patch_size": patch_size},
    }
