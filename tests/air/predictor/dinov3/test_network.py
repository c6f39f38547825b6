"""The authors' architecture: its size, its gradients, its settings, and the weights of its backbone."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from air.errors import CheckpointError, MissingExtraError
from air.gaussians import grid_shape
from air.predictor.checkpoint import load_checkpoint, save_checkpoint
from air.predictor.network import build
from tests.support.released_dinov3 import CHANNELS, FEATURES, TINY, released_backbone

pytest.importorskip("transformers", reason="the backbone comes with transformers")

from air.predictor.dinov3.network import DinoPredictor
from air.predictor.dinov3.weights import load_backbone


def tiny(**settings) -> DinoPredictor:
    """A network of random weights, evaluation mode."""
    torch.manual_seed(3)
    given = {"patch_size": 5, "num_stages": 2, "backbone": TINY, "channels": CHANNELS, "features": FEATURES}
    network = DinoPredictor(**(given | settings)).eval()
    with torch.no_grad():  # fresh weights are so small that much would not show: layer scales are 1e-5
        for name, parameter in network.named_parameters():
            if "lambda1" in name:
                parameter.uniform_(0.5, 1)
            elif parameter.ndim == 4:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network


def inputs(height: int, width: int, batch: int = 1, patch_size: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(height * width)
    image, canvas = torch.rand(2, batch, 3, height, width, generator=generator)
    rows, columns = grid_shape(height, width, patch_size)
    return image, canvas, torch.ones(batch, rows * columns, dtype=torch.bool)


def test_four_heads_with_vit_b_have_the_published_number_of_parameters():
    with torch.device("meta"):
        network = DinoPredictor(patch_size=7)
    count = sum(parameter.numel() for parameter in network.parameters())
    # The release counts the bias of the keys, too, which its mask keeps at zero: 768 numbers in each of 12 blocks.
    assert round((count + 4 * 12 * 768) / 1e6, 1) == 392.8


@pytest.mark.parametrize(("height", "width"), [(32, 48), (37, 50), (5, 9), (1, 1), (16, 90)])
def test_every_patch_of_any_image_gets_a_gaussian(height: int, width: int):
    network = tiny()
    image, canvas, active = inputs(height, width)
    prediction = network.predict(image[0], canvas[0], active[0], stage=1)
    rows, columns = grid_shape(height, width, 5)
    assert prediction.raw.shape == (rows * columns, 8)
    assert prediction.raw.isfinite().all()
    assert prediction.anchor.shape == (rows * columns, 2)


def test_images_of_a_batch_do_not_see_each_other():
    network = tiny()
    image, canvas, active = inputs(40, 33, batch=3)
    together = network(image, canvas, active, 0)
    alone = [network(*(tensor[index : index + 1] for tensor in (image, canvas, active)), 0) for index in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_the_head_sees_the_residual():
    network = tiny()
    image, canvas, active = inputs(40, 33)
    shifted = network(image + 0.25, canvas + 0.25, active, 0)
    torch.testing.assert_close(shifted, network(image, canvas, active, 0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_slope_of_the_output(checkpointing: bool):
    """Against differences in float64, along a random direction in the parameters of the stage."""
    network = tiny().double()
    network.gradient_checkpointing = checkpointing
    image, canvas, active = inputs(33, 36)
    parameters = [parameter for parameter in network.heads[0].parameters() if parameter.requires_grad]

    def loss() -> torch.Tensor:
        return network(image.double(), canvas.double(), active, 0).square().sum()

    gradients = torch.autograd.grad(loss(), parameters)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    directions = [1e-6 * torch.randn_like(parameter) for parameter in parameters]
    sides = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * direction
            sides.append(loss())
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    torch.testing.assert_close(2 * slope, sides[0] - sides[1], rtol=1e-3, atol=0)


def test_under_autocast_the_output_is_float32_and_close():
    network = tiny()
    given = inputs(48, 64)
    plain = network(*given, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(*given, 0)
    mixed.sum().backward()
    assert mixed.dtype == torch.float32
    assert (mixed - plain).abs().mean() < 0.05 * plain.abs().mean()


def test_a_stage_starts_as_a_copy_of_the_one_before():
    network = tiny()
    given = inputs(40, 33)
    before = network(*given, 0)
    assert not torch.equal(network(*given, 1), before)
    network.start_stage(1)
    assert torch.equal(network(*given, 1), before)
    with torch.no_grad():
        network.heads[1].linear.bias += 1
    assert torch.equal(network(*given, 0), before)


def test_the_backbones_learn_at_a_tenth_of_the_rate():
    network = tiny()
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in network.parameter_groups(learning_rate=1e-3, weight_decay=0.5)
        for parameter in group["params"]
    }
    head = network.heads[1]
    assert rates[id(head.backbone.blocks[0].mlp.up_proj.weight)] == pytest.approx((1e-4, 0.5))
    assert rates[id(head.backbone.embeddings.cls_token)] == pytest.approx((1e-4, 0.0))
    assert rates[id(head.neck.upsamplers[0][0].weight)] == (1e-3, 0.5)
    assert rates[id(head.linear.bias)] == (1e-3, 0.0)
    assert id(head.backbone.embeddings.mask_token) not in rates


def test_coordinates_are_rescaled_in_training_only_and_only_if_asked():
    given = inputs(48, 64)
    for rescale, differs in ((None, False), (2.0, True)):
        network = tiny(rope_rescale=rescale)
        still = network(*given, 0)
        assert torch.equal(network(*given, 0), still)
        network.train()
        assert torch.equal(network(*given, 0), still) != differs


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backbone": "vith16"}, "unknown backbone 'vith16'; known are vits16, vitb16, vitl16"),
        ({"backbone": {**TINY, "heads": 5}}, "hidden_size 24 is not a multiple of 4 · heads (5)"),
        ({"backbone": {**TINY, "width": 5}}, "width"),
        ({"channels": [4, 4]}, "channels are 5 numbers"),
        ({"patch_size": 0}, "must be positive"),
        ({"rope_rescale": 0.5}, "must be above 1"),
        ({"patchsize": 4}, "patchsize"),
    ],
)
def test_wrong_settings_are_explained(settings: dict, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        build("dinov3", {"patch_size": 5, "backbone": TINY, "channels": CHANNELS} | settings)


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "air-gaussians\[dinov3\]"'):
        build("dinov3", {"patch_size": 5, "backbone": TINY})


def test_a_checkpoint_gives_the_same_network_again(tmp_path: Path):
    network = tiny(pixel_stretch=True, rope_rescale=2.0)
    save_checkpoint(tmp_path / "network.safetensors", network)
    loaded, card = load_checkpoint(tmp_path / "network.safetensors")
    assert card.settings == network.settings
    image, canvas, active = inputs(33, 48)
    for one, other in zip(
        network.predict(image[0], canvas[0], active[0], 1),
        loaded.predict(image[0], canvas[0], active[0], 1),
        strict=True,
    ):
        assert torch.equal(one, other)


def write_folder(folder: Path, state: dict[str, torch.Tensor], prefix: str, **changes) -> Path:
    """A released backbone as a folder of transformers, whose layout is spelt out here."""
    names = {"cls_token": "cls_token", "storage_tokens": "register_tokens"}
    width = TINY["hidden_size"]
    out = {f"embeddings.{name}": state[key] for key, name in names.items()}
    out["embeddings.mask_token"] = state["mask_token"].reshape(1, 1, width)
    for kind in ("weight", "bias"):
        out[f"embeddings.patch_embeddings.{kind}"] = state[f"patch_embed.proj.{kind}"]
        out[f"norm.{kind}"] = state[f"norm.{kind}"]
    for index in range(TINY["depth"]):
        theirs, ours = f"blocks.{index}", f"{prefix}layer.{index}"
        for kind in ("weight", "bias"):
            query, key, value = state[f"{theirs}.attn.qkv.{kind}"].split(width)
            out[f"{ours}.attention.q_proj.{kind}"] = query
            out[f"{ours}.attention.v_proj.{kind}"] = value
            if kind == "weight":
                out[f"{ours}.attention.k_proj.weight"] = key
            out[f"{ours}.attention.o_proj.{kind}"] = state[f"{theirs}.attn.proj.{kind}"]
            out[f"{ours}.mlp.up_proj.{kind}"] = state[f"{theirs}.mlp.fc1.{kind}"]
            out[f"{ours}.mlp.down_proj.{kind}"] = state[f"{theirs}.mlp.fc2.{kind}"]
            for norm in ("norm1", "norm2"):
                out[f"{ours}.{norm}.{kind}"] = state[f"{theirs}.{norm}.{kind}"]
        for scale in ("1", "2"):
            out[f"{ours}.layer_scale{scale}.lambda1"] = state[f"{theirs}.ls{scale}.gamma"]
    folder.mkdir()
    safetensors.torch.save_file({key: value.clone() for key, value in out.items()}, folder / "model.safetensors")
    config = {
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "num_hidden_layers": TINY["depth"],
        "num_attention_heads": TINY["heads"],
        "num_register_tokens": TINY["num_register_tokens"],
        "patch_size": 16,
        "key_bias": False,
        "use_gated_mlp": False,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_the_release_and_transformers_folders_give_the_same_backbone(tmp_path: Path):
    state = released_backbone()
    # What transformers computes, not rounded: then both files say the same.
    exact = 100 ** (4 * torch.arange(3) / 12)
    # Some released sizes hold a norm that only their training used.
    unused = {f"local_cls_norm.{kind}": torch.full((24,), torch.nan) for kind in ("weight", "bias")}
    torch.save(state | unused | {"rope_embed.periods": exact}, tmp_path / "release.pth")
    networks = [tiny() for _ in range(3)]
    load_backbone(networks[0], tmp_path / "release.pth")
    load_backbone(networks[1], write_folder(tmp_path / "five", state, "model."))
    load_backbone(networks[2], write_folder(tmp_path / "four", state, ""))
    image, _, _ = inputs(48, 64)
    for stage in range(2):
        fresh, *outputs = (network.heads[stage].backbone(image, False)[1] for network in (tiny(), *networks))
        assert (outputs[0] - fresh).abs().mean() > 0.1
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(outputs[1], outputs[2])


def test_a_backbone_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path):
    network = tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = released_backbone()

    def refuses(path: Path, said: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            load_backbone(network, path)
        assert said in str(caught.value)
        assert path.name in str(caught.value)

    torch.save({key: value for key, value in state.items() if key != "blocks.2.ls1.gamma"}, tmp_path / "short.pth")
    refuses(tmp_path / "short.pth", "missing keys (1): blocks.2.ls1.gamma")
    torch.save(state | {"blocks.4.ls1.gamma": torch.ones(24)}, tmp_path / "long.pth")
    refuses(tmp_path / "long.pth", "unknown keys (1): blocks.4.ls1.gamma")
    torch.save(state | {"norm.bias": torch.ones(48)}, tmp_path / "wide.pth")
    refuses(tmp_path / "wide.pth", "norm.bias is (48,), expected (24,)")
    torch.save(state | {"blocks.1.attn.qkv.bias_mask": torch.ones(72)}, tmp_path / "unmasked.pth")
    refuses(tmp_path / "unmasked.pth", "blocks.1.attn.qkv.bias")
    torch.save([state], tmp_path / "list.pth")
    refuses(tmp_path / "list.pth", "is not a backbone of the DINOv3 release")
    torch.save({"network": network}, tmp_path / "code.pth")
    refuses(tmp_path / "code.pth", "is not a torch file of tensors and plain values")
    (tmp_path / "text.pth").write_text("no weights")
    refuses(tmp_path / "text.pth", "is not a torch file of tensors and plain values")
    refuses(tmp_path / "absent.pth", "No such file")
    refuses(
        write_folder(tmp_path / "other", state, "", num_attention_heads=4), "num_attention_heads is 4, the network's 2"
    )
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "is not a folder of a transformers model")
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.slow
def test_the_published_size_runs_forward_and_backward(record_property):
    torch.manual_seed(0)
    network = DinoPredictor(patch_size=7).train()
    image, canvas, active = inputs(96, 128, patch_size=7)
    start = time.perf_counter()
    for stage in range(4):
        raw = network(image, canvas, active, stage)
        assert raw.shape == (1, 14 * 19, 8)
        raw.square().mean().backward()
    record_property("seconds", time.perf_counter() - start)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
