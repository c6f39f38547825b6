"""Released checkpoints of the method's authors: our network computes what theirs did, and no key is lost on the way."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from air.errors import CheckpointError, MissingExtraError
from air.gaussians import activate, anchors, grid_shape
from air.optimization.config import OptimizeConfig
from air.stages.loop import run_stages
from tests.support.released_dinov3 import CHANNELS, FEATURES, TINY, authors_checkpoint

pytest.importorskip("transformers", reason="the backbone comes with transformers")

from air.predictor.dinov3 import network as dinov3
from air.predictor.dinov3.authors import AuthorsCheckpoint, read_authors_checkpoint


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size that the generated files name."""
    monkeypatch.setitem(dinov3.BACKBONES, "tiny", dinov3.BackboneSize(**TINY))


def read(document: Any, folder: Path) -> AuthorsCheckpoint:
    torch.save(document, folder / "released.pt")
    return read_authors_checkpoint(folder / "released.pt")


# The authors' forward pass, spelt out in float64 on their own keys.


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def rotated(x: Tensor, position: tuple[float, float], periods: Tensor) -> Tensor:
    """One vector of one attention head, turned by its patch's place (y, x), each in [-1, 1]."""
    angle = 2 * torch.pi * torch.cat([position[0] / periods, position[1] / periods])
    first, second = x.chunk(2)
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
    )


def backbone(image: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    """Patch tokens of all blocks, after the final norm, each (rows · columns, channels)."""
    rows, columns = image.shape[1] // 16, image.shape[2] // 16
    places = [((2 * r + 1) / rows - 1, (2 * c + 1) / columns - 1) for r in range(rows) for c in range(columns)]
    patches = [
        image[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].flatten() for r in range(rows) for c in range(columns)
    ]
    embedded = torch.stack(patches) @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat([state["cls_token"][0], state["storage_tokens"][0], embedded])
    prefix, heads = len(tokens) - len(patches), TINY["heads"]
    outputs = []
    for block in range(TINY["depth"]):
        part = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"blocks.{block}.")}
        bias = part["attn.qkv.bias"] * part["attn.qkv.bias_mask"]
        fused = layer_norm(tokens, part, "norm1") @ part["attn.qkv.weight"].T + bias
        mixed = []
        for head in range(heads):
            query, key, value = (each.chunk(heads, 1)[head].clone() for each in fused.chunk(3, 1))
            for index, place in enumerate(places):
                query[prefix + index] = rotated(query[prefix + index], place, state["rope_embed.periods"])
                key[prefix + index] = rotated(key[prefix + index], place, state["rope_embed.periods"])
            mixed.append(torch.softmax(query @ key.T / query.shape[1] ** 0.5, dim=1) @ value)
        tokens = tokens + part["ls1.gamma"] * linear(torch.cat(mixed, 1), part, "attn.proj")
        hidden = linear(layer_norm(tokens, part, "norm2"), part, "mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        tokens = tokens + part["ls2.gamma"] * linear(hidden, part, "mlp.fc2")
        outputs.append(layer_norm(tokens, state, "norm")[prefix:])
    return outputs


def convolution(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    weight = state[f"{name}.weight"]
    margin = weight.shape[2] // 2
    padded = F.pad(x[None], [margin] * 4, mode="replicate")
    return F.conv2d(padded, weight, state[f"{name}.bias"])[0]


def stack(given: list[Tensor], state: dict[str, Tensor], name: str, blocks: list[int]) -> list[Tensor]:
    outputs = []
    features = torch.zeros(())
    for level in range(5):
        features = features + convolution(given[level], state, f"{name}.input_blocks.{level}")
        for block in range(blocks[level]):
            layers = f"{name}.res_blocks.{level}.{block}.layers"
            inner = convolution(features.relu(), state, f"{layers}.2")
            features = features + convolution(inner.relu(), state, f"{layers}.5")
        outputs.append(features)
        if level < 3:
            kernel = state[f"{name}.resamplers.{level}.0.weight"]
            _, rows, columns = features.shape
            doubled = torch.einsum("irc,ioab->oracb", features, kernel).reshape(-1, 2 * rows, 2 * columns)
            features = doubled + state[f"{name}.resamplers.{level}.0.bias"][:, None, None]
        elif level == 3:
            features = F.interpolate(features[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
        if level < 4:
            features = convolution(features, state, f"{name}.resamplers.{level}.1")
    return outputs


def authors_forward(residual: Tensor, released: dict[str, Tensor], stage: int, patch_size: int) -> Tensor:
    """Raw Gaussians (rows · columns, 8) of one stage for one residual (3, H, W)."""
    prefix = f"gaussian_heads.{stage}."
    state = {key.removeprefix(prefix): value.double() for key, value in released.items() if key.startswith(prefix)}
    _, height, width = residual.shape
    rows, columns = height // 16, width // 16
    image = F.interpolate(
        residual.double()[None], (16 * rows, 16 * columns), mode="bilinear", align_corners=False, antialias=True
    )[0]
    image = (image - state["encoder.image_mean"][0]) / state["encoder.image_std"][0]
    tokens = backbone(
        image, {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith("encoder.backbone.")}
    )
    features = torch.zeros(())
    for index, block in enumerate((1, 3)):
        grid = tokens[block].T.reshape(-1, rows, columns)
        features = features + convolution(grid, state, f"encoder.output_projections.{index}")
    levels = []
    for level in range(5):
        down, across = rows * 2**level, columns * 2**level
        aspect = across / down
        span_x, span_y = aspect / (1 + aspect**2) ** 0.5, 1 / (1 + aspect**2) ** 0.5
        u = torch.linspace(-span_x * (across - 1) / across, span_x * (across - 1) / across, across).double()
        v = torch.linspace(-span_y * (down - 1) / down, span_y * (down - 1) / down, down).double()
        levels.append(torch.stack(torch.meshgrid(u, v, indexing="xy")))
    levels[0] = torch.cat([features, levels[0]])
    decoded = stack(stack(levels, state, "neck", [0, 2, 2, 2, 0]), state, "gaussian_feat_decoder", [0, 1, 1, 1, 0])[-1]
    dense = convolution(decoded, state, "gaussian_feat_decoder.output_blocks.4")
    dense = F.interpolate(dense[None], (height, width), mode="bilinear", align_corners=False)
    patch_rows, patch_columns = grid_shape(height, width, patch_size)
    whole = (0, patch_columns * patch_size - width, 0, patch_rows * patch_size - height)
    padded = F.pad(dense, whole, mode="replicate")[0]
    out = []
    for r in range(patch_rows):
        for c in range(patch_columns):
            part = padded[:, r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size]
            patch = (state["patch_embedding.patchify.conv.weight"] * part).sum(dim=(1, 2, 3))
            out.append(linear(layer_norm(patch, state, "feat_layer_norm"), state, "gaussian_linear"))
    return torch.stack(out)


@pytest.mark.parametrize(("height", "width", "patch_size"), [(37, 58, 5), (64, 32, 7)])
def test_the_imported_network_computes_what_the_authors_network_computes(
    tmp_path: Path, height: int, width: int, patch_size: int
):
    document = authors_checkpoint(patch_size)
    network = read(document, tmp_path).network
    generator = torch.Generator().manual_seed(height)
    image, canvas = torch.rand(2, 1, 3, height, width, generator=generator)
    rows, columns = grid_shape(height, width, patch_size)
    active = torch.ones(1, rows * columns, dtype=torch.bool)
    for stage in range(2):
        expected = authors_forward((image - canvas)[0], document["model"], stage, patch_size)
        assert expected.std(dim=0).min() > 0.05  # patches differ, or there would be little to compare
        torch.testing.assert_close(network(image, canvas, active, stage)[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_centres_are_stretched_as_the_weights_expect(tmp_path: Path):
    network = read(authors_checkpoint(), tmp_path).network
    height, width = 33, 48
    raw = torch.randn(7 * 10, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = activate(raw, anchors(height, width, 5, torch.float64), 5)
    drawn = activate(raw, network.anchors(raw, height, width), 5)
    stretch = torch.tensor([width / (width - 1), height / (height - 1)], dtype=torch.float64)
    torch.testing.assert_close(drawn.xy, plain.xy * stretch, atol=1e-12, rtol=0)
    for same in ("scale", "angle", "colour"):
        assert torch.equal(getattr(drawn, same), getattr(plain, same))


def test_the_stage_loop_draws_the_stretched_gaussians(tmp_path: Path):
    network = read(authors_checkpoint(), tmp_path).network
    image = torch.rand(3, 33, 48, generator=torch.Generator().manual_seed(0))
    stages = list(run_stages(image, network, [OptimizeConfig(steps=0)] * 2, canvas="predicted"))
    assert [stage.stage for stage in stages] == [0, 1]
    for stage in stages:
        drawn = activate(stage.predicted, stage.anchor, 5).xy
        plain = activate(stage.predicted, anchors(33, 48, 5)[stage.patch], 5).xy
        torch.testing.assert_close(drawn, plain * torch.tensor([48 / 47, 33 / 32]), atol=1e-4, rtol=0)


def test_one_pixel_wide_images_are_not_stretched_to_infinity(tmp_path: Path):
    network = read(authors_checkpoint(), tmp_path).network
    prediction = network.predict(torch.rand(3, 1, 1), torch.zeros(3, 1, 1), torch.ones(1, dtype=torch.bool), 0)
    torch.testing.assert_close(prediction.anchor, torch.zeros(1, 2))


def test_settings_and_the_quantiser_are_reported(tmp_path: Path):
    checkpoint = read(authors_checkpoint(patch_size=7, stages=3, quantised=True), tmp_path)
    assert checkpoint.epoch == 29
    assert len(checkpoint.left_out) == 4 * 5
    assert "feed_forward_gaussian_codec.color_quantizer.offset_net.bias" in checkpoint.left_out
    assert not checkpoint.network.training
    assert checkpoint.network.settings == {
        "patch_size": 7,
        "num_stages": 3,
        "backbone": "tiny",
        "channels": CHANNELS,
        "features": FEATURES,
        "rope_rescale": None,
        "pixel_stretch": True,
    }


def changed(**changes: Tensor | None) -> dict[str, Any]:
    """A released checkpoint with other weights; None takes a key away."""
    document = authors_checkpoint(quantised=True)
    for key, value in changes.items():
        document["model"].pop(key, None)
        if value is not None:
            document["model"][key] = value
    return document


HEAD = "gaussian_heads.1."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{HEAD}gaussian_linear.bias": None}, f"missing keys (1): {HEAD}gaussian_linear.bias"),
        ({f"{HEAD}encoder.backbone.blocks.3.attn.qkv.weight": None}, "missing keys (1): gaussian_heads.1.encoder.back"),
        ({"extra": torch.ones(1), "gaussian_heads.2.x": torch.ones(1)}, "unknown keys (2): extra, gaussian_heads.2.x"),
        ({f"{HEAD}encoder.backbone.blocks.9.ls1.gamma": torch.ones(24)}, "unknown keys (1): gaussian_heads.1.encoder."),
        ({"feed_forward_gaussian_codec.xy_quantizer.raw_scale": torch.ones(2)}, "unknown keys (1): feed_forward_gaus"),
        ({f"{HEAD}gaussian_linear.bias": torch.ones(9)}, "heads.1.linear.bias is (9,), expected (8,)"),
        ({f"{HEAD}encoder.image_std": None}, f"missing keys (1): {HEAD}encoder.image_std"),
        ({f"{HEAD}encoder.backbone.blocks.9.attn.qkv.bias_mask": torch.ones(72)}, "unknown keys (1): gaussian_heads.1"),
    ],
)
def test_every_key_is_accounted_for(tmp_path: Path, changes: dict[str, Tensor | None], said: str):
    with pytest.raises(CheckpointError) as caught:
        read(changed(**changes), tmp_path)
    assert said in str(caught.value)
    assert "released.pt" in str(caught.value)


def test_another_architecture_is_refused(tmp_path: Path):
    def refuses(section: str, key: str, value: Any, said: str) -> None:
        document = authors_checkpoint()
        document["model_config"]["gaussian_head_config"][section][key] = value
        with pytest.raises(CheckpointError) as caught:
            read(document, tmp_path)
        assert said in str(caught.value)

    refuses(
        "neck", "num_res_blocks", [0, 1, 1, 1, 0], "neck.num_res_blocks is [0, 1, 1, 1, 0], expected [0, 2, 2, 2, 0]"
    )
    refuses("neck", "activation", "silu", "neck.activation is 'silu', expected 'nothing'")
    refuses("encoder", "intermediate_layers", [0, 3], "encoder.intermediate_layers is [0, 3], expected [1, 3]")
    refuses("encoder", "backbone", "convnext_base", "unknown backbone 'convnext_base'")
    refuses("patch_embedding", "patch_size", None, "does not describe a DINOv3 predictor")


def test_files_of_other_kinds_are_refused(tmp_path: Path):
    whole = authors_checkpoint()
    documents = [
        ({"model_config": whole["model_config"], "epoch": 3}, "is not a checkpoint of the authors"),
        ({**whole, "model": {"weights": [1.0]}}, "'model' is not a dict of tensors"),
        ({**whole, "model_config": []}, "does not describe a DINOv3 predictor"),
        ({**whole, "epoch": "last"}, "'epoch' is not a number"),
        ([1, 2], "is not a checkpoint of the authors"),
        ({**whole, "epoch": Path("code")}, "is not a torch file of tensors and plain values"),
    ]
    for document, said in documents:
        with pytest.raises(CheckpointError) as caught:
            read(document, tmp_path)
        assert said in str(caught.value)


def test_without_transformers_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"air-gaussians\[dinov3\]"):
        read(authors_checkpoint(), tmp_path)
