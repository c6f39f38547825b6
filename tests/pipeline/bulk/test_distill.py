"""Distillation end to end: rows have their documented meaning, and are the same with every executor."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from air import metrics
from air.gaussians import Gaussians
from air.predictor.base import GridPredictor, Prediction
from air.rendering.render import render
from air.stages import loop
from jobs.cli import main
from jobs.distill import distill
from jobs.shard import shard
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, DamagedDataError, JobFailedError, PlanMismatchError
from pipeline.formats import images, tables
from pipeline.reports.sheet import save_sheet
from pipeline.storage.open import open_storage
from pipeline.work.audit import verify
from pipeline.work.manifest import read_manifests
from pipeline.work.plan import read_plan
from tests.support.paths import AWKWARD
from tests.support.toys import times_without_lease

INLINE = RunnerConfig(executor="inline")
QUICK = DistillConfig(predictor="grid", patch_size=7, stages=2, steps=(6, 3), joint_steps=5, views=2, min_crop=0.5)


def read_targets(folder: Path) -> pa.Table:
    """All rows that manifests name, in a fixed order."""
    files = [folder / file.path for manifest in read_manifests(open_storage(folder)) for file in manifest.files]
    return pa.concat_tables([pq.read_table(file) for file in sorted(files)]).sort_by(
        [("key", "ascending"), ("view", "ascending")]
    )


@pytest.fixture(scope="module")
def targets(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their targets, made inline."""
    folder = tmp_path_factory.mktemp("distill") / "targets"
    distill(str(shards), str(folder), QUICK, INLINE)
    return folder


def test_there_is_one_row_per_view_with_the_declared_columns(targets: Path) -> None:
    table = read_targets(targets)
    assert table.schema.equals(tables.TARGETS, check_metadata=False)
    assert all(field.metadata[b"unit"] for field in table.schema)
    assert table.num_rows == 8
    assert table["view"].to_pylist() == [0, 1] * 4
    assert len(set(table["seed"].to_pylist())) == 8
    keys = table["key"].to_pylist()
    assert keys == sorted(keys)


def test_lists_have_one_entry_per_gaussian_and_per_stage(targets: Path) -> None:
    for row in read_targets(targets).to_pylist():
        count = sum(row["gaussians"])
        for name in tables.GAUSSIAN_QUANTITIES:
            assert len(row[f"predicted_{name}"]) == len(row[f"target_{name}"]) == count
        assert np.bincount(row["stage"]).tolist() == row["gaussians"]
        assert row["steps"] == [6, 3]
        patches = (row["height"] // 7) * (row["width"] // 7)
        assert max(row["anchor"]) < patches
        assert row["height"] % 7 == row["width"] % 7 == 0


def test_the_stored_gaussians_render_to_the_stored_psnr(targets: Path) -> None:
    """Gaussians read from Parquet, drawn by the reference renderer in float64, have the PSNR in the table."""
    for row in read_targets(targets).to_pylist():
        columns = [torch.tensor(row[f"target_{name}"], dtype=torch.float64) for name in tables.GAUSSIAN_QUANTITIES]
        gaussians = Gaussians(
            torch.stack(columns[:2], 1), torch.stack(columns[2:4], 1), columns[4], torch.stack(columns[5:], 1)
        )
        picture = render(gaussians, row["height"], row["width"], backend="reference").clamp(0, 1)
        original = torch.from_numpy(images.decode_png(row["image"])).permute(2, 0, 1) / 255
        psnr = -10 * torch.log10((picture - original).square().mean()).item()
        assert psnr == pytest.approx(row["psnr_target"][-1], abs=5e-3)
        assert row["psnr_target"][-1] > row["psnr_predicted"][0]


def test_files_say_which_plan_and_model_made_them(targets: Path) -> None:
    manifests = list(read_manifests(open_storage(targets)))
    for manifest in manifests:
        metadata = pq.read_metadata(targets / manifest.files[0].path).metadata
        assert metadata[b"air.plan"].decode() == manifest.plan
        assert metadata[b"air.model"] == b"grid"
        assert metadata[b"air.schema_version"].decode() == str(tables.SCHEMA_VERSION)
    assert sum(manifest.summary["views"] for manifest in manifests) == 8


def test_running_again_does_nothing_and_changes_nothing(shards: Path, targets: Path) -> None:
    before = times_without_lease(targets)
    tally = distill(str(shards), str(targets), QUICK, INLINE)
    assert tally.summary["views"] == 8
    assert times_without_lease(targets) == before


def test_another_run_gives_the_same_values(shards: Path, targets: Path, tmp_path: Path) -> None:
    distill(str(shards), str(tmp_path / "again"), QUICK, INLINE)
    assert read_targets(tmp_path / "again").equals(read_targets(targets))


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_gives_the_same_values(shards: Path, targets: Path, tmp_path: Path, workers: int, local_ray: None) -> None:
    distill(str(shards), str(tmp_path / "ray"), QUICK, RunnerConfig(executor="ray", workers=workers))
    assert read_targets(tmp_path / "ray").equals(read_targets(targets))
    assert not list(verify(open_storage(tmp_path / "ray")))


def test_resharding_gives_the_same_values(photographs: Path, targets: Path, tmp_path: Path) -> None:
    """Seeds depend on keys alone, so other shards of the same pictures change only the column `shard`."""
    shard([str(photographs)], str(tmp_path / "shards"), ShardConfig(max_count=3), INLINE)
    distill(str(tmp_path / "shards"), str(tmp_path / "targets"), QUICK, INLINE)
    other, expected = read_targets(tmp_path / "targets"), read_targets(targets)
    assert other.drop_columns("shard").equals(expected.drop_columns("shard"))


@pytest.mark.parametrize(
    ("change", "named"), [({"seed": 1}, "seed: 0 -> 1"), ({"patch_size": 8}, "patch_size: 7 -> 8")]
)
def test_another_plan_is_refused_by_name(shards: Path, targets: Path, change: dict, named: str) -> None:
    with pytest.raises(PlanMismatchError, match=named):
        distill(str(shards), str(targets), QUICK.model_copy(update=change), INLINE)


@pytest.mark.parametrize(("output", "named"), [("shards/targets", "lies in the input"), (".", "lies in the output")])
def test_targets_lie_beside_the_shards(tmp_path: Path, output: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        distill(str(tmp_path / "shards"), str(tmp_path / output), QUICK, INLINE)


def test_an_image_below_one_patch_goes_to_quarantine(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "thin.png").write_bytes(images.encode_png(np.full((3, 40, 3), 200, np.uint8)))
    (tmp_path / "in" / "fine.png").write_bytes(images.encode_png(np.full((14, 14, 3), 200, np.uint8)))
    shard([str(tmp_path / "in")], str(tmp_path / "shards"), ShardConfig(), INLINE)
    tally = distill(str(tmp_path / "shards"), str(tmp_path / "targets"), QUICK, INLINE)
    assert tally.rejected == {"too_small": 1}
    assert tally.summary["images"] == 1


def test_a_black_image_needs_no_gaussians(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "black.png").write_bytes(images.encode_png(np.zeros((21, 21, 3), np.uint8)))
    shard([str(tmp_path / "in")], str(tmp_path / "shards"), ShardConfig(), INLINE)
    distill(str(tmp_path / "shards"), str(tmp_path / "targets"), QUICK, INLINE)
    row = read_targets(tmp_path / "targets").to_pylist()[0]
    assert row["gaussians"] == row["stage"] == row["psnr_target"] == []
    save_sheet(open_storage(tmp_path / "targets"), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_all_readers_open_the_targets(targets: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    pandas = pytest.importorskip("pandas", reason="pandas is a development dependency")
    polars = pytest.importorskip("polars", reason="polars is a development dependency")
    pattern = f"{targets}/data/*.parquet"
    expected = read_targets(targets)
    total = sum(map(len, expected["target_x"].to_pylist()))
    assert duckdb.sql(f"select sum(len(target_x)) from '{pattern}'").fetchall() == [(total,)]
    assert polars.read_parquet(pattern)["target_x"].list.len().sum() == total
    assert pandas.read_parquet(targets / "data")["target_x"].map(len).sum() == total


@pytest.mark.skipif(not AWKWARD.is_dir(), reason="../shared/data/awkward is not beside this checkout")
def test_every_awkward_file_is_distilled_or_refused_for_its_reason(tmp_path: Path) -> None:
    sharded = shard([str(AWKWARD)], str(tmp_path / "shards"), ShardConfig(), INLINE)
    assert sharded.rejected == {"truncated": 2, "corrupt": 1, "empty": 1, "not_an_image": 1, "too_many_pixels": 1}
    distill(str(tmp_path / "shards"), str(tmp_path / "targets"), DistillConfig(stages=1, steps=(20,)), INLINE)
    rows = {
        row["key"].rpartition("-")[0].removeprefix("awkward/"): row
        for row in read_targets(tmp_path / "targets").to_pylist()
    }
    quarantine = pa.concat_tables(map(pq.read_table, (tmp_path / "targets" / "quarantine").glob("*.parquet")))
    refused = {Path(row["message"].partition(":")[0]).stem: row["reason"] for row in quarantine.to_pylist()}
    assert refused == {"width1_1x400": "too_small", "height1_400x1": "too_small", "single_pixel_1x1": "too_small"}
    assert len(rows) == 16
    assert (rows["exif_rotated6"]["height"], rows["exif_rotated6"]["width"]) == (119, 77)  # upright, in whole patches
    assert rows["constant_colour"]["psnr_target"][-1] > 45
    # The transparent corner of this picture is drawn over white; the colour under alpha 0 does not show.
    assert (images.decode_png(rows["rgba_soft_alpha"]["image"])[0, 0] > 250).all()
    # Few steps would make this plain colour worse, so the prediction stays.
    unchanged = {name for name, row in rows.items() if row["loss_last"] == row["loss_first"]}
    assert unchanged <= {"constant_colour"}
    for name in rows.keys() - unchanged:
        assert rows[name]["loss_last"][-1] < rows[name]["loss_first"][0], name


def test_a_picture_that_is_met_exactly_does_not_stop_its_shard(tmp_path: Path) -> None:
    """The PSNR of a picture without error is finite, so that sums over images can be committed."""
    assert metrics.psnr_of(0.0) == metrics.HIGHEST_PSNR
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "red.png").write_bytes(images.encode_png(np.full((4, 4, 3), (255, 0, 0), np.uint8)))
    shard([str(tmp_path / "in")], str(tmp_path / "shards"), ShardConfig(), INLINE)
    config = DistillConfig(patch_size=2, stages=1, steps=(10,), learning_rate_factor=3.0)
    tally = distill(str(tmp_path / "shards"), str(tmp_path / "targets"), config, INLINE)
    assert tally.summary["views"] == 1


def test_a_lost_file_is_noticed_and_repaired(shards: Path, targets: Path, tmp_path: Path) -> None:
    distill(str(shards), str(tmp_path / "targets"), QUICK, INLINE)
    lost = next((tmp_path / "targets" / "data").iterdir())
    lost.unlink()
    with pytest.raises(DamagedDataError, match="verify --repair"):
        distill(str(shards), str(tmp_path / "targets"), QUICK, INLINE)
    assert main(["verify", "--repair", str(tmp_path / "targets")]) == 1
    distill(str(shards), str(tmp_path / "targets"), QUICK, INLINE)
    assert read_targets(tmp_path / "targets").equals(read_targets(targets))


@pytest.mark.parametrize("batch", [3, 256])
def test_views_that_go_together_give_the_same_values(shards: Path, targets: Path, tmp_path: Path, batch: int) -> None:
    """A batch of three holds the views of one and a half images; a batch of 256 holds all views."""
    distill(str(shards), str(tmp_path / "targets"), QUICK.model_copy(update={"batch": batch}), INLINE)
    assert read_targets(tmp_path / "targets").equals(read_targets(targets))


def test_how_work_is_done_is_no_part_of_the_plan(shards: Path, targets: Path) -> None:
    plan = read_plan(open_storage(targets))
    tally = distill(str(shards), str(targets), QUICK.model_copy(update={"batch": 5, "device": "cpu"}), INLINE)
    assert tally.summary["views"] == 8
    assert not {"batch", "device"} & plan.config.keys()


class Diverging(GridPredictor):
    """Predicts NaN for pictures that are red in the middle."""

    def predict(
        self, image: torch.Tensor, canvas: torch.Tensor, active: torch.Tensor, stage: int, threads: int = 1
    ) -> Prediction:
        raw, anchor = super().predict(image, canvas, active, stage, threads)
        middle = image[:, image.shape[1] // 2, image.shape[2] // 2]
        return Prediction(raw * torch.nan if middle.tolist() == [1, 0, 0] else raw, anchor)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_view_that_diverges_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        colour = (255, 0, 0) if number in (1, 4) else (0, 40 * number, 200)
        (tmp_path / "in" / f"{number}.png").write_bytes(images.encode_png(np.full((14, 21, 3), colour, np.uint8)))
    shard([str(tmp_path / "in")], str(tmp_path / "shards"), ShardConfig(), INLINE)
    distill(str(tmp_path / "shards"), str(tmp_path / "expected"), QUICK, INLINE)
    monkeypatch.setattr("pipeline.bulk.distill.load", lambda reference, device: Diverging(reference.patch_size))
    tally = distill(
        str(tmp_path / "shards"), str(tmp_path / "targets"), QUICK.model_copy(update={"batch": batch}), INLINE
    )
    assert tally.rejected == {"non_finite": 2}
    expected = read_targets(tmp_path / "expected")
    good = [not key.rpartition("-")[0].endswith(("1", "4")) for key in expected["key"].to_pylist()]
    assert sum(good) == 6
    assert read_targets(tmp_path / "targets").equals(expected.filter(pa.array(good)))
    (file,) = (tmp_path / "targets" / "quarantine").iterdir()
    assert all("Gaussian 0 has a non-finite" in message for message in pq.read_table(file)["message"].to_pylist())


def test_a_batch_that_memory_does_not_hold_is_halved(
    shards: Path, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def small_gpu(pictures, *arguments, **options):
        taken.append(len(pictures))
        if len(pictures) > 2:
            raise torch.OutOfMemoryError("this GPU has 640 KB, which ought to be enough")
        return run_stages_batch(pictures, *arguments, **options)

    run_stages_batch = loop.run_stages_batch
    monkeypatch.setattr(loop, "run_stages_batch", small_gpu)
    distill(str(shards), str(tmp_path / "targets"), QUICK.model_copy(update={"batch": 16}), INLINE)
    assert taken == [4, 2, 2] * 2
    assert read_targets(tmp_path / "targets").equals(read_targets(targets))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_asked_for_and_not_there_stops_the_job(shards: Path, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"device": "cuda"})
    with pytest.raises(JobFailedError, match="no CUDA device"):
        distill(str(shards), str(tmp_path / "targets"), config, INLINE)
    with pytest.raises(ConfigError, match="num_gpus = 1"):
        distill(str(shards), str(tmp_path / "ray"), config, RunnerConfig(executor="ray"))
