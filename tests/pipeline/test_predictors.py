"""Predictors by name, path and URI are found, checked and loaded once, or refused with a message that helps."""

from pathlib import Path

import pytest
import torch

from air import defaults
from air.errors import CheckpointError
from air.predictor.base import GridPredictor
from air.predictor.checkpoint import save_checkpoint
from air.predictor.load import load_predictor
from air.predictor.network import build
from pipeline.errors import ConfigError
from pipeline.identity import checksum_of
from pipeline.predictors import find_predictor, load

CPU = torch.device("cpu")


def save_network(path: Path, patch_size: int = 5, seed: int = 0, stages: int = 2) -> Path:
    torch.manual_seed(seed)
    network = build("compact", {"patch_size": patch_size, "num_stages": stages, "channels": 4, "depth": 1, "passes": 1})
    save_checkpoint(path, network)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_network(tmp_path / "net.safetensors")


def test_a_predictor_is_loaded_by_name_or_path(checkpoint: Path) -> None:
    assert isinstance(load_predictor("grid", 9), GridPredictor)
    assert (load_predictor("grid", 9).patch_size, load_predictor("grid").patch_size) == (9, 7)
    assert load_predictor(checkpoint).patch_size == load_predictor(str(checkpoint), 5).patch_size == 5


def test_the_shipped_predictor_goes_by_the_name_compact(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "COMPACT_PATH", checkpoint)
    assert load_predictor("compact").patch_size == 5
    reference = find_predictor("compact")
    assert (reference.name, reference.sha256) == ("compact", checksum_of(checkpoint))
    assert load(reference, CPU).patch_size == 5


def test_where_none_is_shipped_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "COMPACT_PATH", tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"ships no compact predictor.*air train"):
        load_predictor("compact")


def test_what_is_no_predictor_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    for find in (load_predictor, find_predictor):
        with pytest.raises(CheckpointError, match=r"unknown predictor.*grid, compact or a file"):
            find("gird")
        with pytest.raises(CheckpointError, match=r"missing\.json"):
            find(str(tmp_path / "missing.safetensors"))
    with pytest.raises(CheckpointError, match="patch size 5, not 7"):
        load_predictor(checkpoint, 7)
    with pytest.raises(ConfigError, match="set patch_size to 5"):
        find_predictor(str(checkpoint), 7)
    with pytest.raises(ConfigError, match="stages = 3"):
        find_predictor(str(checkpoint)).stages(3)


def test_a_reference_names_the_weights_and_loads_them_once(checkpoint: Path) -> None:
    reference = find_predictor(str(checkpoint))
    assert reference.model == f"compact:{checksum_of(checkpoint)[:12]}"
    assert (reference.patch_size, reference.stages(None), reference.stages(1)) == (5, 2, 1)
    assert load(reference, CPU) is load(reference, CPU)


def test_weights_that_change_under_their_name_are_refused(checkpoint: Path) -> None:
    reference = find_predictor(str(checkpoint))
    save_network(checkpoint, seed=1)
    with pytest.raises(CheckpointError, match="has changed since it was looked up"):
        load(reference, CPU)


def test_a_checkpoint_comes_from_an_object_store(checkpoint: Path, s3_bucket: str) -> None:
    from pipeline.storage.open import open_storage

    store = open_storage(f"{s3_bucket}/models")
    for name in ("net.safetensors", "net.json"):
        store.write(name, (checkpoint.parent / name).read_bytes())
    reference = find_predictor(f"{s3_bucket}/models/net.safetensors", 5)
    assert reference.sha256 == checksum_of(checkpoint)
    here, there = load(find_predictor(str(checkpoint)), CPU), load(reference, CPU)
    image = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    arguments = (image, torch.zeros_like(image), torch.ones(16, dtype=torch.bool), 0)
    assert torch.equal(here.predict(*arguments).raw, there.predict(*arguments).raw)
