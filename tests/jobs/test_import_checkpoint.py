"""`air import-checkpoint`: from a released file to a checkpoint that loads and predicts."""

import sys
from pathlib import Path

import pytest
import torch

from jobs.cli import main
from tests.support.released_dinov3 import TINY, authors_checkpoint
from tests.support.toys import encode_picture

pytest.importorskip("transformers", reason="the backbone comes with transformers")

from air.predictor.checkpoint import load_checkpoint
from air.predictor.dinov3 import network as dinov3
from air.predictor.dinov3.authors import read_authors_checkpoint


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(dinov3.BACKBONES, "tiny", dinov3.BackboneSize(**TINY))
    torch.save(authors_checkpoint(quantised=True), tmp_path / "ps_5.pt")
    return tmp_path / "ps_5.pt"


def test_the_command_writes_a_checkpoint_that_predicts_the_same(released: Path, tmp_path: Path, capsys):
    out = tmp_path / "new" / "air-p5.safetensors"
    assert main(["import-checkpoint", str(released), str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 stages, patch size 5" in said
    assert "not imported: the quantiser (20 entries" in said
    network, card = load_checkpoint(out)
    assert card.phase == "imported"
    assert card.settings["pixel_stretch"] is True
    assert card.notes["source"] == "ps_5.pt"
    assert card.notes["epoch"] == 29
    assert len(card.notes["not_imported"]) == 20
    image = torch.rand(3, 33, 48, generator=torch.Generator().manual_seed(0))
    given = (image, torch.zeros_like(image), torch.ones(70, dtype=torch.bool), 1)
    direct = read_authors_checkpoint(released).network.predict(*given)
    for one, other in zip(network.predict(*given), direct, strict=True):
        assert torch.equal(one, other)


def test_a_wrong_file_is_explained_and_nothing_is_written(released: Path, tmp_path: Path, capsys):
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "picture.jpg").write_bytes(encode_picture(0, kind="JPEG"))
    torch.save({"model": print}, tmp_path / "object.pt")
    for name in ("text.pt", "picture.jpg", "object.pt"):
        assert main(["import-checkpoint", str(tmp_path / name), str(tmp_path / "out.safetensors")]) == 1
        said = capsys.readouterr().err
        assert f"{name}: is not a torch file" in said
        assert "weights_only" not in said  # torch advises to run the code in the file
    assert main(["import-checkpoint", str(released), str(tmp_path / "out.pt")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_without_transformers_the_command_names_the_extra(released: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["import-checkpoint", str(released), str(tmp_path / "out.safetensors")]) == 1
    assert 'pip install "air-gaussians[dinov3]"' in capsys.readouterr().err
