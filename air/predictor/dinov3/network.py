"""The authors' predictor (method.md section 4): a DINOv3 vision transformer and two convolution stacks for every stage.

The backbone is built with `transformers` (the extra `dinov3`). Weights are never downloaded:
`air.predictor.dinov3.weights` reads them from a file, and `air.predictor.dinov3.authors` reads whole checkpoints of the
authors. This module knows nothing of either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from air.errors import MissingExtraError
from air.gaussians import OFFSET, RAW_CHANNELS, grid_shape
from air.predictor.network import PredictorNetwork

TOKEN_SIZE = 16
"""Pixels that one token of the backbone covers along each side."""

CHANNELS = (1024, 256, 128, 64, 32)
"""The published width of the convolution stacks at each level. Each level doubles the resolution."""

NECK_BLOCKS = (0, 2, 2, 2, 0)
DECODER_BLOCKS = (0, 1, 1, 1, 0)
"""Residual blocks of the two stacks at each level."""

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels, by channel."""

_BACKBONE_RATE = 0.1


@dataclass(frozen=True)
class BackboneSize:
    """The numbers of a DINOv3 vision transformer with patches of 16 pixels.

    Attributes:
        hidden_size: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Hidden channels of a block's perceptron, in tokens' channels.
        num_register_tokens: Tokens, beside the class token, that do not belong to a patch.
    """

    hidden_size: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.heads) < 1 or self.hidden_size % (4 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 4 · heads ({self.heads}), which rotary positions "
                "in two dimensions need"
            )
        if self.depth < 2:
            raise ValueError(f"depth must be at least 2, since the outputs of two blocks are used, got {self.depth}")
        if self.mlp_ratio <= 0 or self.num_register_tokens < 0:
            raise ValueError(
                f"mlp_ratio must be positive and num_register_tokens at least 0, got {self.mlp_ratio} and "
                f"{self.num_register_tokens}"
            )

    @property
    def used_blocks(self) -> tuple[int, int]:
        """The blocks whose outputs are used: the middle and the last one."""
        return self.depth // 2 - 1, self.depth - 1


BACKBONES = {
    "vits16": BackboneSize(384, depth=12, heads=6),
    "vitb16": BackboneSize(768, depth=12, heads=12),
    "vitl16": BackboneSize(1024, depth=24, heads=16),
}
"""The released sizes by their names in the release."""


class DinoPredictor(PredictorNetwork):
    """The architecture "dinov3". Every stage has its own head, whose input is the residual of the earlier stages.

    Args:
        patch_size: Pixels between anchors; 5, 6, 7 and 14 are published.
        num_stages: Number of stages that it can predict.
        backbone: A name in `BACKBONES`, or the fields of a `BackboneSize`.
        channels: Width of the convolution stacks at their five levels.
        features: Channels of a patch before the last layer.
        rope_rescale: In training, each block multiplies the backbone's coordinates by its own random factor between
            1 / rope_rescale and rope_rescale (method.md section 9.7; the authors: 2). None for no factor.
        pixel_stretch: Draw centres P at P · W / (W - 1), P · H / (H - 1). Only the authors' weights expect it
            (method.md section 9.2).
        quantizer_bits: As for `PredictorNetwork`.

    Raises:
        MissingExtraError: `transformers` is not installed.
        ValueError: A setting is out of its bounds.
    """

    architecture = "dinov3"
    can_checkpoint = True
    untrained_part = "backbone"

    def __init__(
        self,
        *,
        patch_size: int,
        num_stages: int = 4,
        backbone: str | dict[str, Any] = "vitb16",
        channels: Sequence[int] = CHANNELS,
        features: int = 64,
        rope_rescale: float | None = None,
        pixel_stretch: bool = False,
        quantizer_bits: Sequence[int] | None = None,
    ) -> None:
        if min(patch_size, num_stages, features, *channels) < 1:
            raise ValueError(
                "patch_size, num_stages, features and channels must be positive, got "
                f"{patch_size}, {num_stages}, {features} and {list(channels)}"
            )
        if len(channels) != len(CHANNELS):
            raise ValueError(f"channels are {len(CHANNELS)} numbers, one per level, not {len(channels)}")
        if rope_rescale is not None and rope_rescale <= 1:
            raise ValueError(f"rope_rescale is the largest factor and must be above 1, got {rope_rescale}")
        settings: dict[str, Any] = {
            "patch_size": patch_size,
            "num_stages": num_stages,
            "backbone": backbone,
            "channels": list(channels),
            "features": features,
            "rope_rescale": rope_rescale,
            "pixel_stretch": pixel_stretch,
        }
        size = _backbone_size(backbone)
        super().__init__(feature_size=size.hidden_size, quantizer_bits=quantizer_bits, **settings)
        self.backbone_size = size
        self.pixel_stretch = pixel_stretch
        self.heads = nn.ModuleList(
            _Head(patch_size, self.backbone_size, channels, features, rope_rescale) for _ in range(num_stages)
        )

    def forward(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> Tensor:
        """As `PredictorNetwork`; float32 also under autocast. All of it runs in torch, so `threads` has no effect."""
        return self.heads[stage](image - canvas, self.gradient_checkpointing and torch.is_grad_enabled())

    def global_feature(self, image: Tensor, canvas: Tensor, stage: int) -> Tensor:
        """As `PredictorNetwork`: the backbone's class token, after the last block and the final norm, of that stage."""
        head = self.heads[stage]
        assert isinstance(head, _Head)
        return head.class_token(image - canvas, self.gradient_checkpointing and torch.is_grad_enabled())

    def start_stage(self, stage: int) -> None:
        """Copies the head of the stage before."""
        self.heads[stage].load_state_dict(self.heads[stage - 1].state_dict())

    def learning_rate_factor(self, name: str) -> float:
        """A tenth for the backbones, one for all else."""
        return _BACKBONE_RATE if ".backbone." in name else 1.0

    def anchors(self, raw: Tensor, height: int, width: int) -> Tensor:
        """As `PredictorNetwork`; `pixel_stretch` moves them so that anchor + offset is the stretched centre."""
        anchor = super().anchors(raw, height, width)
        if not self.pixel_stretch:
            return anchor
        stretch = anchor.new_tensor([width / max(width - 1, 1), height / max(height - 1, 1)])
        return anchor + (stretch - 1) * (anchor + self.patch_size * torch.tanh(raw[:, OFFSET]))


class _Head(nn.Module):
    """The network of one stage."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self, patch_size: int, size: BackboneSize, channels: Sequence[int], features: int, rope_rescale: float | None
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).reshape(1, 3, 1, 1))
        self.backbone = _Backbone(size, rope_rescale)
        self.projections = nn.ModuleList(nn.Conv2d(size.hidden_size, channels[0], 1) for _ in size.used_blocks)
        self.neck = _Stack([channels[0] + 2, 2, 2, 2, 2], channels, NECK_BLOCKS)
        self.decoder = _Stack(channels, channels, DECODER_BLOCKS)
        self.output = nn.Conv2d(channels[-1], channels[-1], 1)
        self.patch = nn.Conv2d(channels[-1], features, patch_size, stride=patch_size, bias=False)
        self.norm = nn.LayerNorm(features)
        self.linear = nn.Linear(features, RAW_CHANNELS)

    def forward(self, residual: Tensor, checkpointing: bool) -> Tensor:
        """Raw Gaussians (B, rows · columns, 8) for the residual (B, 3, H, W)."""
        _, _, height, width = residual.shape
        token_rows, token_columns = _token_grid(height, width)
        maps = [
            tokens[:, self.backbone.prefix :].transpose(1, 2).unflatten(2, (token_rows, token_columns))
            for tokens in self._encode(residual, checkpointing)
        ]
        encoded = self.projections[0](maps[0]) + self.projections[1](maps[1])
        uv = [_view_plane(token_rows << level, token_columns << level, residual) for level in range(len(CHANNELS))]
        levels = [torch.cat([encoded, uv[0].expand(len(encoded), -1, -1, -1)], dim=1), *uv[1:]]
        dense = self.output(self.decoder(self.neck(levels, checkpointing), checkpointing)[-1])
        dense = F.interpolate(dense, (height, width), mode="bilinear", align_corners=False)
        rows, columns = grid_shape(height, width, self.patch_size)
        padding = (0, columns * self.patch_size - width, 0, rows * self.patch_size - height)
        patches = self.patch(F.pad(dense, padding, mode="replicate")).flatten(2).transpose(1, 2)
        # Eight bits of mantissa are too few for positions. The last layers are cheap, so they run without autocast.
        with torch.autocast(residual.device.type, enabled=False):
            return self.linear(self.norm(patches.to(self.linear.weight.dtype)))

    def class_token(self, residual: Tensor, checkpointing: bool) -> Tensor:
        """The backbone's class token for the residual, shape (B, hidden size), float32."""
        return self._encode(residual, checkpointing)[-1][:, 0].float()

    def _encode(self, residual: Tensor, checkpointing: bool) -> list[Tensor]:
        """The backbone's tokens (B, prefix + N, C) of the two blocks that are used."""
        size = [TOKEN_SIZE * count for count in _token_grid(*residual.shape[2:])]
        resized = F.interpolate(residual, size, mode="bilinear", align_corners=False, antialias=True)
        return self.backbone((resized - self.image_mean) / self.image_std, checkpointing)


class _Backbone(nn.Module):
    """The parts of a DINOv3 model, under names that do not depend on the version of `transformers`."""

    def __init__(self, size: BackboneSize, rope_rescale: float | None) -> None:
        super().__init__()
        try:
            from transformers import DINOv3ViTConfig, DINOv3ViTModel  # pyright: ignore[reportMissingImports] - optional
        except ImportError as error:
            raise MissingExtraError(
                'the architecture "dinov3" needs transformers, 4.56 or later: pip install "air-gaussians[dinov3]" '
                f"({error})"
            ) from None
        model = DINOv3ViTModel(
            DINOv3ViTConfig(
                patch_size=TOKEN_SIZE,
                hidden_size=size.hidden_size,
                num_hidden_layers=size.depth,
                num_attention_heads=size.heads,
                intermediate_size=round(size.hidden_size * size.mlp_ratio),
                num_register_tokens=size.num_register_tokens,
                layer_norm_eps=1e-5,
                rope_theta=100.0,
                layerscale_value=1e-5,
                pos_embed_rescale=rope_rescale,
            )
        )
        self.used_blocks = size.used_blocks
        self.prefix = 1 + size.num_register_tokens
        self.rescales = rope_rescale is not None
        self.embeddings: Any = model.embeddings
        # The mask token is not used; it stays because checkpoints hold it.
        self.embeddings.mask_token.requires_grad_(False)
        self.rope: Any = model.rope_embeddings
        # Released weights have rounded frequencies of their own, so the state dict must hold them.
        self.rope.register_buffer("inv_freq", self.rope.inv_freq)
        # Version 5 of transformers moved the blocks into an encoder.
        self.blocks: Any = getattr(model, "model", model).layer
        self.norm: Any = model.norm

    def forward(self, image: Tensor, checkpointing: bool) -> list[Tensor]:
        """Tokens after the final norm of the two blocks that are used, for images (B, 3, 16 rows, 16 columns).

        Each has shape (B, prefix + rows · columns, C): the class token, the registers, then the patches.
        """
        tokens = self.embeddings(image)
        rope = self.rope(image)
        outputs = []
        for index, block in enumerate(self.blocks):
            if index and self.training and self.rescales:
                rope = self.rope(image)
            tokens = _run(block, checkpointing, tokens, position_embeddings=rope)
            if index in self.used_blocks:
                outputs.append(self.norm(tokens))
        return outputs


class _Stack(nn.Module):
    """Convolutions over five levels, from coarse to fine. Each level has an input of its own.

    Args:
        given: Channels of each level's input.
        channels: Channels of each level.
        blocks: Residual blocks of each level.
    """

    def __init__(self, given: Sequence[int], channels: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        last = len(channels) - 1
        self.inputs = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in zip(given, channels, strict=True))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(_ResidualBlock(width) for _ in range(count)))
            for width, count in zip(channels, blocks, strict=True)
        )
        self.upsamplers = nn.ModuleList(
            _upsampler(channels[level], channels[level + 1], learned=level + 1 < last) for level in range(last)
        )

    def forward(self, given: Sequence[Tensor], checkpointing: bool) -> list[Tensor]:
        """The features of every level."""
        features = self.inputs[0](given[0])
        outputs = []
        for level, blocks in enumerate(self.blocks):
            if level:
                features = _run(self.upsamplers[level - 1], checkpointing, features) + self.inputs[level](given[level])
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues] - a Sequential iterates
                features = _run(block, checkpointing, features)
            outputs.append(features)
        return outputs


class _ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu x))) with 3 x 3 kernels; the border is replicated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate")
        self.second = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate")

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(F.relu(self.first(F.relu(features))))


def _token_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens, each at least one."""
    return max(height // TOKEN_SIZE, 1), max(width // TOKEN_SIZE, 1)


def _upsampler(channels: int, out: int, learned: bool) -> nn.Sequential:
    """Doubles the resolution: a transposed convolution, initialised to repeat pixels, or bilinear; then a 3 x 3
    convolution.
    """
    if not learned:
        bilinear = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        return nn.Sequential(bilinear, nn.Conv2d(channels, out, 3, padding=1, padding_mode="replicate"))
    repeat = nn.ConvTranspose2d(channels, out, 2, stride=2)
    with torch.no_grad():
        repeat.weight.copy_(repeat.weight[:, :, :1, :1].expand_as(repeat.weight).clone())
    return nn.Sequential(repeat, nn.Conv2d(out, out, 3, padding=1, padding_mode="replicate"))


def _view_plane(rows: int, columns: int, like: Tensor) -> Tensor:
    """Coordinates (u, v) of all pixels, shape (1, 2, rows, columns): 0 in the centre, half the diagonal is 1."""
    diagonal = (rows**2 + columns**2) ** 0.5
    u = torch.linspace(1 - columns, columns - 1, columns, device=like.device, dtype=like.dtype) / diagonal
    v = torch.linspace(1 - rows, rows - 1, rows, device=like.device, dtype=like.dtype) / diagonal
    return torch.stack([u.expand(rows, columns), v[:, None].expand(rows, columns)])[None]


def _run(module: nn.Module, checkpointing: bool, *inputs: Tensor, **options: Any) -> Tensor:
    """The module's output. With `checkpointing`, the backward pass computes the activations again."""
    if not checkpointing:
        return module(*inputs, **options)
    return checkpoint(module, *inputs, use_reentrant=False, **options)


def _backbone_size(backbone: str | dict[str, Any]) -> BackboneSize:
    fields = [field.name for field in dataclasses.fields(BackboneSize)]
    if isinstance(backbone, dict) and backbone.keys() <= set(fields):
        return BackboneSize(**backbone)
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        raise ValueError(
            f"unknown backbone {backbone!r}; known are {', '.join(BACKBONES)}, or give its {', '.join(fields)}"
        )
    return BACKBONES[backbone]
