"""Bulk encoding end to end: files decode, rows describe them, and the bytes are the same with every executor."""

import hashlib
import io
import math
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from air.codec.file import decode, read_info
from air.errors import CodecError
from air.metrics import ms_ssim
from air.predictor.checkpoint import save_checkpoint
from air.predictor.network import build
from air.rendering.render import render
from jobs.cli import main
from jobs.encode import encode
from jobs.shard import shard
from pipeline.bulk.encode import EncodeConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, JobFailedError, PlanMismatchError
from pipeline.formats import images, tables
from pipeline.storage.open import open_storage
from pipeline.work.audit import verify
from pipeline.work.plan import read_plan
from tests.support.toys import committed_bytes

INLINE = RunnerConfig(executor="inline")
QUICK = EncodeConfig(pixels_per_gaussian=40, steps=4, stored_steps=2, max_count=2)


def read_rows(folder: Path) -> list[dict]:
    """All committed rows by key."""
    found = committed_bytes(folder)
    parts = [pq.read_table(io.BytesIO(found[name])) for name in sorted(found) if name.endswith(".parquet")]
    return pa.concat_tables(parts).sort_by("key").to_pylist()


def read_files(folder: Path) -> dict[str, bytes]:
    """The .air files by key."""
    files = {}
    for name, content in committed_bytes(folder).items():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                for member in archive:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    files[member.name.removesuffix(".air")] = stream.read()
    return files


@pytest.fixture(scope="module")
def encoded(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, encoded inline from their folder."""
    folder = tmp_path_factory.mktemp("encode") / "encoded"
    encode([str(photographs)], str(folder), QUICK, INLINE)
    return folder


def test_there_is_one_row_per_image_with_the_declared_columns(encoded: Path) -> None:
    rows = read_rows(encoded)
    assert [row["key"].split("/")[1].split("-")[0] for row in rows] == ["astronaut", "chelsea", "china", "flower"]
    for name, content in committed_bytes(encoded).items():
        if name.endswith(".parquet"):
            assert pq.read_table(io.BytesIO(content)).schema.equals(tables.ENCODED, check_metadata=False)
    assert not list(verify(open_storage(encoded)))


def test_rows_say_what_the_files_are(encoded: Path, photographs: Path) -> None:
    files = read_files(encoded)
    for row in read_rows(encoded):
        blob = files[row["key"]]
        name = row["key"].split("/")[1].rsplit("-", 1)[0]
        original = images.decode(next(photographs.glob(f"{name}.*")).read_bytes())
        height, width = original.shape[:2]
        assert (row["height"], row["width"], row["bytes"]) == (height, width, len(blob))
        assert row["bpp"] == 8 * len(blob) / (height * width)
        assert row["gaussians"] == list(read_info(blob).num_gaussians)
        assert sum(row["gaussians"]) <= height * width // 40
        drawn = render(decode(blob).to(torch.float64), height, width, backend="reference").clamp(0, 1)
        target = torch.from_numpy(original).permute(2, 0, 1) / 255
        psnr = -10 * math.log10((drawn - target).square().mean())
        assert row["psnr"] == pytest.approx(psnr, abs=5e-3)
        assert row["ms_ssim"] == pytest.approx(ms_ssim(drawn, target), abs=1e-4)


def test_shards_give_the_files_that_images_give(encoded: Path, photographs: Path, tmp_path: Path) -> None:
    shard([str(photographs)], str(tmp_path / "shards"), ShardConfig(max_count=3), INLINE)
    encode([str(tmp_path / "shards")], str(tmp_path / "encoded"), QUICK, INLINE)
    assert read_files(tmp_path / "encoded") == read_files(encoded)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(encoded: Path, photographs: Path, tmp_path: Path, local_ray: None) -> None:
    encode([str(photographs)], str(tmp_path / "encoded"), QUICK, RunnerConfig(executor="ray", workers=2))
    assert committed_bytes(tmp_path / "encoded") == committed_bytes(encoded)


def test_a_shard_done_again_gives_the_same_bytes(encoded: Path, photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(encoded, tmp_path / "encoded")
    lost = next((tmp_path / "encoded" / "manifest").iterdir())
    lost.unlink()
    encode([str(photographs)], str(tmp_path / "encoded"), QUICK, INLINE)
    assert committed_bytes(tmp_path / "encoded") == committed_bytes(encoded)
    assert not list(verify(open_storage(tmp_path / "encoded")))


def test_files_can_be_embedded(encoded: Path, photographs: Path, tmp_path: Path) -> None:
    encode([str(photographs)], str(tmp_path / "encoded"), QUICK.model_copy(update={"embed": True}), INLINE)
    rows = read_rows(tmp_path / "encoded")
    assert {row["key"]: row.pop("air") for row in rows} == read_files(encoded)
    assert rows == read_rows(encoded)
    assert not list((tmp_path / "encoded" / "data").glob("*.tar"))


def test_a_target_of_bits_is_kept_and_an_impossible_one_is_quarantined(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dot.png").write_bytes(images.encode_png(np.full((2, 2, 3), 90, np.uint8)))
    shutil.copy(photographs / "china.jpg", tmp_path / "in")
    config = EncodeConfig(bpp=1.0, steps=4, stored_steps=2)
    tally = encode([str(tmp_path / "in")], str(tmp_path / "encoded"), config, INLINE)
    assert tally.rejected == {"target_missed": 1}
    (row,) = read_rows(tmp_path / "encoded")
    assert 0.9 < row["bpp"] <= 1.0


def test_an_image_that_the_format_cannot_hold_misses_no_target(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise CodecError("this image cannot be written as .air: too many stages")

    monkeypatch.setattr("air.encoding.encode.encode", refuse)
    with pytest.raises(
        JobFailedError, match=r"china-\w+: .*china\.jpg: this image cannot be written .*\(unsupported\)"
    ):
        encode([str(photographs / "china.jpg")], str(tmp_path / "encoded"), EncodeConfig(), INLINE)


def test_a_predictor_gives_the_stages(photographs: Path, tmp_path: Path) -> None:
    """More steps give better pictures, a budget is kept, and the same plan in another folder gives the same bytes."""
    config = EncodeConfig(predictor="grid", stages=2, pixels_per_gaussian=40, steps=0, stored_steps=0)
    (tmp_path / "in").mkdir()
    for name in ("chelsea.jpg", "china.jpg"):
        shutil.copy(photographs / name, tmp_path / "in")
    (tmp_path / "in" / "black.png").write_bytes(images.encode_png(np.zeros((20, 30, 3), np.uint8)))
    rows = {}
    for name, steps in (("plain", 0), ("better", 20), ("again", 20)):
        update = {"steps": steps, "stored_steps": steps}
        tally = encode([str(tmp_path / "in")], str(tmp_path / name), config.model_copy(update=update), INLINE)
        assert not tally.rejected
        rows[name] = read_rows(tmp_path / name)
    assert committed_bytes(tmp_path / "again") == committed_bytes(tmp_path / "better")
    black, *plain = rows["plain"]
    assert black["psnr"] > 60
    assert all(1 <= len(row["gaussians"]) <= 2 for row in plain)
    for row, better in zip(plain, rows["better"][1:], strict=True):
        assert 0 < sum(row["gaussians"]) <= row["height"] * row["width"] // 40
        assert better["psnr"] > row["psnr"] + 1


def test_a_network_starts_and_a_resumed_run_leaves_the_same_bytes(photographs: Path, tmp_path: Path) -> None:
    """End to end: encode, verify, take a commit back, encode again, decode."""
    torch.manual_seed(0)
    network = build("compact", {"patch_size": 5, "num_stages": 2, "channels": 4, "depth": 1, "passes": 1})
    checkpoint = tmp_path / "net.safetensors"
    save_checkpoint(checkpoint, network)
    output = tmp_path / "encoded"
    config = EncodeConfig(predictor=str(checkpoint), steps=2, stored_steps=2, max_count=2)
    tally = encode([str(photographs)], str(output), config, INLINE)
    assert tally.summary["images"] == 4
    assert not tally.rejected
    assert not list(verify(open_storage(output)))
    plan = read_plan(open_storage(output))
    assert plan.config["stages"] == 2
    assert plan.config["predictor"].startswith("compact:")
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() in plan.config["predictor"]
    before = committed_bytes(output)
    next((output / "manifest").iterdir()).unlink()
    encode([str(photographs)], str(output), config, INLINE)
    assert committed_bytes(output) == before
    assert main(["decode", str(output), str(tmp_path / "pictures"), "--executor", "inline"]) == 0
    save_checkpoint(checkpoint, build("compact", {**network.settings, "channels": 5}))
    with pytest.raises(PlanMismatchError, match="predictor"):
        encode([str(photographs)], str(output), config, INLINE)


def test_the_shipped_predictor_starts_where_no_target_is_given(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(photographs / "china.jpg", tmp_path / "in")
    config = EncodeConfig(steps=0, stored_steps=0)
    for name, predictor, given in (
        ("default", "compact:", config),
        ("named", "compact:", config.model_copy(update={"predictor": "compact"})),
        ("grown", "grow", config.model_copy(update={"predictor": "grow"})),
        ("target", "grow", config.model_copy(update={"gaussians": 50})),
        ("both", "compact:", config.model_copy(update={"predictor": "compact", "gaussians": 50})),
    ):
        encode([str(tmp_path / "in")], str(tmp_path / name), given, INLINE)
        assert read_plan(open_storage(tmp_path / name)).config["predictor"].startswith(predictor)
    assert read_files(tmp_path / "default") == read_files(tmp_path / "named")
    assert sum(read_rows(tmp_path / "both")[0]["gaussians"]) <= 50
    # Nothing was optimised: the quality is the network's.
    assert read_rows(tmp_path / "default")[0]["psnr"] > read_rows(tmp_path / "grown")[0]["psnr"] + 3


def test_stages_of_no_predictor_are_refused() -> None:
    for given in ({"predictor": "grow"}, {"bpp": 1.0}):
        with pytest.raises(ValidationError, match="stages = 2 needs a predictor"):
            EncodeConfig.model_validate({"stages": 2, **given})


def test_two_targets_are_refused(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["encode", str(photographs), str(tmp_path / "out"), "--bpp", "1", "--psnr", "30"]) == 2
    assert "bpp and psnr are targets: give only one of them" in capsys.readouterr().err


def test_another_plan_is_refused_by_name(encoded: Path, photographs: Path) -> None:
    with pytest.raises(PlanMismatchError, match="steps: 4 -> 5"):
        encode([str(photographs)], str(encoded), QUICK.model_copy(update={"steps": 5}), INLINE)


def test_an_output_of_a_job_stands_alone(encoded: Path, photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give it alone"):
        encode([str(encoded), str(photographs)], str(tmp_path / "out"), QUICK, INLINE)


def test_stats_status_verify_and_gc_know_encoded_images(encoded: Path, capsys: pytest.CaptureFixture) -> None:
    rows = read_rows(encoded)
    query = "select count(*), sum(bytes), max(bpp) from images"
    assert main(["stats", str(encoded), "--sql", query, "--format", "csv"]) == 0
    expected = f"4,{sum(row['bytes'] for row in rows)},{max(row['bpp'] for row in rows)}"
    assert capsys.readouterr().out.splitlines()[1] == expected
    for command, said in (
        ("stats", "MS-SSIM"),
        ("status", "complete"),
        ("verify", "4 rows"),
        ("gc", "removed 0 files"),
    ):
        assert main([command, str(encoded)]) == 0
        assert said in capsys.readouterr().out
