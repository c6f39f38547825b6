"""`air stats`: the summary has the numbers of the table, and SQL has the documented views."""

from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from jobs.distill import distill
from jobs.shard import shard
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.formats import images
from pipeline.reports.query import connect
from pipeline.storage.open import open_storage

INLINE = RunnerConfig(executor="inline")


@pytest.fixture(scope="module")
def targets(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of four photographs, and of one picture that is too small."""
    folder = tmp_path_factory.mktemp("stats")
    (folder / "more").mkdir()
    (folder / "more" / "thin.png").write_bytes(images.encode_png(np.full((2, 40, 3), 9, np.uint8)))
    shard([str(photographs), str(folder / "more")], str(folder / "shards"), ShardConfig(max_count=3), INLINE)
    distill(str(folder / "shards"), str(folder / "targets"), DistillConfig(stages=2, steps=(4,)), INLINE)
    return folder / "targets"


def query(targets: Path, sql: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that --sql prints as CSV, without the header."""
    assert main(["stats", str(targets), "--sql", sql, "--format", "csv"]) == 0
    return capsys.readouterr().out.splitlines()[1:]


def test_views_and_gaussians_agree(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    per_view = query(targets, "select key, len(target_x) from views order by key", capsys)
    exploded = query(targets, "select key, count(*) from gaussians group by key order by key", capsys)
    assert len(per_view) == 4
    assert per_view == exploded


def test_gaussians_keep_their_values_together(targets: Path) -> None:
    with connect(open_storage(targets)) as connection:
        row = connection.execute("select key, target_x, target_blue, anchor, stage from views order by key").fetchall()[
            0
        ]
        key, x, blue, anchor, stage = row
        found = connection.execute(
            "select target_x, target_blue, anchor, stage from gaussians where key = ? and anchor = 3 order by stage",
            [key],
        ).fetchall()
    expected = [values for values in zip(x, blue, anchor, stage, strict=True) if values[2] == 3]
    assert found == sorted(expected, key=lambda values: values[3])


def test_shards_and_quarantine_are_there(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert query(targets, "select count(*), sum(samples), sum(rejected) from shards", capsys) == ["2,5,1"]
    assert query(targets, "select reason, bytes > 0 from quarantine", capsys) == ["too_small,True"]


def test_the_summary_states_what_the_table_holds(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    views, gaussians, psnr = query(targets, "select count(*), sum(len(stage)), avg(psnr) from views", capsys)[0].split(
        ","
    )
    assert main(["stats", str(targets)]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"views {views}" in text
    assert f"Gaussians {int(gaussians):,}" in text
    assert f"PSNR after the last stage, dB {float(psnr):.2f}" in text
    assert "too_small 1" in text
    assert "anisotropy" in text


@pytest.mark.parametrize("job", ["distill", "encode"])
def test_without_a_usable_image_there_are_zeros(targets: Path, tmp_path: Path, capsys, job: str) -> None:
    """Shards without a usable image have empty summaries."""
    command = [job, str(targets.parent / "more"), str(tmp_path / "out"), "--executor", "inline"]
    if job == "distill":
        shard([str(targets.parent / "more")], str(tmp_path / "shards"), ShardConfig(), INLINE)
        command[1] = str(tmp_path / "shards")
    else:
        command += ["--bpp", "0.01", "--steps", "1"]
    assert main(command) == 1
    capsys.readouterr()
    assert main(["stats", str(tmp_path / "out")]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert " images 0 " in text
    assert " Gaussians 0 " in text
    assert " images seen 1 " in text
    assert {"distill": "too_small 1", "encode": "target_missed 1"}[job] in text
    assert query(tmp_path / "out", "select summary['pixels'] is null from shards", capsys) == ["True"]


def test_a_wrong_query_is_explained(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(targets), "--sql", "select nonsense from views"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_other_folders_are_refused(targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(tmp_path)]) == 1
    assert "not the output of a job" in capsys.readouterr().err
    assert main(["stats", str(targets.parent / "shards")]) == 1
    assert "air shard" in capsys.readouterr().err
