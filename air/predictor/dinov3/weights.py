"""Reads weights of DINOv3 backbones from files in the layout of the release or of `transformers`. Downloads nothing.

The release fuses queries, keys and values, masks the bias of the keys, and stores the rotary positions' periods as they
were rounded in training. `transformers` keeps queries, keys and values apart, has no bias of the keys, and computes the
periods.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from air.errors import CheckpointError
from air.predictor.dinov3.network import DinoPredictor

_RELEASE_NAMES = (
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.patch_embeddings", "patch_embed.proj"),
    (r"^embeddings\.", ""),
    (r"^rope\.inv_freq$", "rope_embed.periods"),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)

# Keys of the config.json of `transformers` that the network must share; shapes of weights check the rest.
_SHARED_CONFIG = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_register_tokens",
    "patch_size",
    "layer_norm_eps",
    "use_gated_mlp",
    "key_bias",
)

_LISTED = 20


def load_backbone(network: DinoPredictor, path: str | Path) -> None:
    """Loads the weights of a file into every stage's backbone, as the start of a training.

    Args:
        network: Changed in place.
        path: A file of the DINOv3 release (`dinov3_vitb16_pretrain_....pth`), or a folder that `transformers` wrote
            (`config.json` and `*.safetensors`).

    Raises:
        CheckpointError: The file cannot be read, or holds another architecture or size. The network keeps its weights.
    """
    path = Path(path)
    own = network.heads[0].get_submodule("backbone")
    weights = _from_folder(own, path) if path.is_dir() else _from_release(own, path)
    for head in network.heads:
        load_exactly(head.get_submodule("backbone"), weights, path)


class Matched(NamedTuple):
    """Weights matched with the names of a network.

    Attributes:
        weights: Weights by the network's names.
        missing: Keys that the network needs and the file lacks.
        unknown: Keys that the file has and the network does not use.
    """

    weights: dict[str, Tensor]
    missing: list[str]
    unknown: list[str]

    def check(self, path: Path) -> dict[str, Tensor]:
        """The weights.

        Raises:
            CheckpointError: A key is missing or unknown; the message lists them.
        """
        faults = [
            f"{word} keys ({len(keys)}): {_listed(keys)}"
            for word, keys in (("missing", self.missing), ("unknown", self.unknown))
            if keys
        ]
        if faults:
            raise CheckpointError(f"{path}: does not fit the network: {'; '.join(faults)}")
        return self.weights


def match(
    names: Iterable[str],
    state: Mapping[str, Tensor],
    rename: Callable[[str], str],
    convert: Callable[[str, Tensor], Tensor] | None = None,
) -> Matched:
    """Matches `names` with the keys of a state dict that has other names.

    Args:
        names: Names of the network's parameters.
        state: State dict of the file.
        rename: Gives the file's key for a name.
        convert: Gives the network's value from its name and the file's value; by default the file's value.
    """
    weights, missing, used = {}, dict[str, None](), set[str]()
    for name in names:
        key = rename(name)
        if key in state:
            used.add(key)
            weights[name] = convert(name, state[key]) if convert else state[key]
        else:
            missing[key] = None
    return Matched(weights, list(missing), [key for key in state if key not in used])


def release_name(name: str) -> str:
    """The release's name of a backbone's parameter: `blocks.3.attention.q_proj.bias` is in `blocks.3.attn.qkv.bias`."""
    for pattern, replacement in _RELEASE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def release_value(name: str, value: Tensor) -> Tensor:
    """A backbone's parameter from the release's value, once `without_masks` has applied the masks."""
    if projection := re.search(r"\.([qkv])_proj\.", name):
        return value.chunk(3)["qkv".index(projection[1])]
    if name == "rope.inv_freq":
        return 1 / value.float()
    if name == "embeddings.mask_token":
        return value[:, None]
    return value


def without_masks(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state with the release's masks applied to biases, and without the parts that only pre-training used.

    Raises:
        CheckpointError: The bias of the keys is not masked, as it is in all released models.
    """
    plain = {}
    for key, value in state.items():
        if re.search(r"(^|\.)local_cls_norm\.(weight|bias)$", key):
            continue
        if key.endswith(".attn.qkv.bias_mask") and key.removesuffix("_mask") in state:
            continue
        mask = state.get(f"{key}_mask")
        if key.endswith(".attn.qkv.bias") and mask is not None:
            if mask.shape != value.shape or (value * mask).chunk(3)[1].any():
                raise CheckpointError(f"{path}: {key} has a part for the keys that {key}_mask does not mask")
            value = value * mask
        plain[key] = value
    return plain


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Calls `load_state_dict`. Wrong sizes are an error that names the file."""
    own = module.state_dict()
    wrong = [
        f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in weights.items()
        if value.shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{path}: holds a network of another size: {_listed(wrong)}")
    module.load_state_dict(weights)


def read_torch_file(path: Path) -> Any:
    """Reads a file of `torch.save` that holds tensors and plain values only. Nothing in the file is run.

    Raises:
        CheckpointError: It is not such a file, or holds other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        # torch's own message advises to load the file in a way that runs code from it.
        raise CheckpointError(
            f"{path}: is not a torch file of tensors and plain values: it is damaged, of another kind, or holds "
            "objects, which are not loaded"
        ) from None


def is_state(document: Any) -> bool:
    """Whether a document maps names to tensors."""
    return isinstance(document, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in document.items()
    )


def _listed(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _from_release(backbone: nn.Module, path: Path) -> dict[str, Tensor]:
    state = read_torch_file(path)
    if not is_state(state):
        raise CheckpointError(f"{path}: is not a backbone of the DINOv3 release, which is a dict of tensors")
    return match(backbone.state_dict(), without_masks(state, path), release_name, release_value).check(path)


def _from_folder(backbone: nn.Module, folder: Path) -> dict[str, Tensor]:
    try:
        stored = json.loads((folder / "config.json").read_text())
        files = sorted(folder.glob("*.safetensors"))
        state = {key: value for file in files for key, value in safetensors.torch.load_file(file).items()}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: is not a folder of a transformers model: {error}") from None
    config = backbone.get_submodule("embeddings").config
    differing = [
        f"{key} is {stored[key]!r}, the network's {getattr(config, key)!r}"
        for key in _SHARED_CONFIG
        if key in stored and stored[key] != getattr(config, key)
    ]
    if differing:
        raise CheckpointError(f"{folder / 'config.json'}: holds another model: {'; '.join(differing)}")
    # Version 5 writes the blocks as model.layer.N, earlier ones as layer.N.
    renamed = {re.sub(r"^(model\.)?layer\.", "blocks.", key): value for key, value in state.items()}
    own = backbone.state_dict()
    renamed.setdefault("rope.inv_freq", own["rope.inv_freq"])
    return match(own, renamed, lambda name: name).check(folder)
