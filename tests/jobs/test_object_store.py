"""Every command on an object store, over the S3 protocol: the same values, the same resume, quick errors."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.distill import distill
from jobs.shard import shard
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.inputs.shards import list_shards, read_samples
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.manifest import read_manifests
from tests.support.paths import ROOT

INLINE = RunnerConfig(executor="inline")
TWO_EACH = ShardConfig(max_count=2)
QUICK = DistillConfig(predictor="grid", patch_size=7, stages=2, steps=(6, 3), views=2, min_crop=0.5)
QUICK_OPTIONS = [
    "--predictor",
    "grid",
    "--patch-size",
    "7",
    "--stages",
    "2",
    "--steps",
    "6,3",
    "--views",
    "2",
    "--min-crop",
    "0.5",
]
SECONDS = 30
"""An error must be there by then, on a busy machine too."""


def rows_of(output: Storage) -> pa.Table:
    """All target rows that manifests name, in a fixed order."""
    files = [file.path for manifest in read_manifests(output) for file in manifest.files]
    found = [pq.read_table(io.BytesIO(output.read(path))) for path in files]
    return pa.concat_tables(found).sort_by([("key", "ascending"), ("view", "ascending")])


def images_of(shards: Storage) -> dict[str, bytes]:
    """The images of a folder of shards by source."""
    return {sample.source: sample.read() for unit in list_shards(shards) for sample in read_samples(shards, unit)}


def run(*arguments: str, status: int = 0) -> None:
    """Runs `air` in this process."""
    assert main(arguments) == status


def run_for_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs `air`, which must fail quickly; returns its one line of error."""
    begin = time.monotonic()
    capsys.readouterr()
    assert main(arguments) == 1
    assert time.monotonic() - begin < SECONDS
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"air {arguments[0]}: ")
    return lines[0]


@pytest.fixture(scope="module")
def place(s3_bucket: str) -> str:
    """A fresh folder in the bucket, shared by the tests of this module."""
    return f"{s3_bucket}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def shards(place: str, photographs: Path) -> str:
    """Local photographs in two shards in the bucket."""
    shard([str(photographs)], f"{place}/shards", TWO_EACH, INLINE)
    return f"{place}/shards"


@pytest.fixture(scope="module")
def targets(place: str, shards: str) -> str:
    """Their targets, from the bucket into the bucket."""
    distill(shards, f"{place}/targets", QUICK, INLINE)
    return f"{place}/targets"


@pytest.fixture(scope="module")
def local_rows(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The rows of the same two jobs on local disks."""
    folder = tmp_path_factory.mktemp("local")
    shard([str(photographs)], str(folder / "shards"), TWO_EACH, INLINE)
    distill(str(folder / "shards"), str(folder / "targets"), QUICK, INLINE)
    return rows_of(open_storage(folder / "targets"))


@pytest.fixture
def uploaded(s3_bucket: str, pictures: Path) -> str:
    """The six pictures in a folder `pictures` of the bucket, and beside it a tar and a Parquet file of them."""
    here = open_storage(f"{s3_bucket}/{uuid.uuid4().hex}")
    files = sorted(pictures.rglob("*.png"))
    for file in files:
        here.upload(file, f"pictures/{file.relative_to(pictures)}")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for file in files:
            tar.add(file, file.name)
    here.write("packed.tar", archive.getvalue())
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [file.read_bytes() for file in files]}), table, row_group_size=4)
    here.write("rows.parquet", table.getvalue())
    return here.uri()


# The way of the data.


def test_the_values_are_those_of_a_local_run(targets: str, local_rows: pa.Table) -> None:
    assert rows_of(open_storage(targets)).equals(local_rows)
    assert local_rows.num_rows == 8


def test_local_and_remote_folders_mix(shards: str, local_rows: pa.Table, tmp_path: Path) -> None:
    distill(shards, str(tmp_path / "targets"), QUICK, INLINE)
    assert rows_of(open_storage(tmp_path / "targets")).equals(local_rows)


def test_commands_read_a_folder_in_the_store(targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("status", targets)
    text = capsys.readouterr().out
    assert "2 of 2" in text
    assert "complete" in text
    run("verify", targets)
    assert "verified 2 shards, 2 files, 8 rows" in capsys.readouterr().out
    run("stats", targets)
    assert "anisotropy" in capsys.readouterr().out
    run("stats", targets, "--sql", "select count(*), count(distinct key) from views", "--format", "csv")
    assert capsys.readouterr().out.splitlines()[1] == "8,4"


def test_gc_removes_what_no_manifest_names(targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = open_storage(targets)
    before = [entry for entry in output.list() if not entry.path.startswith("lease/")]
    output.write("data/left-over.parquet", b"x" * 2_000_000)
    run("gc", targets)
    assert "removed 1 file (2.0 MB)" in capsys.readouterr().out
    assert [entry for entry in output.list() if not entry.path.startswith("lease/")] == before


def test_images_are_found_in_the_store(uploaded: str, pictures: Path, tmp_path: Path) -> None:
    """A folder, a glob, one image, a tar and a Parquet file; each gives the bytes that were uploaded."""
    whole = {f"pictures/{file.relative_to(pictures)}": file.read_bytes() for file in pictures.rglob("*.png")}
    ordered = [content for _, content in sorted((Path(name).name, content) for name, content in whole.items())]
    above = Path(uploaded).name
    inputs = {
        "pictures": whole,
        "pictures/": whole,
        "pictures/*.png": {name: content for name, content in whole.items() if name.count("/") == 1},
        "pictures/**/*.png": whole,
        "pictures/0.png": {"pictures/0.png": (pictures / "0.png").read_bytes()},
        "packed.tar": {f"{above}/packed.tar/{number}.png": content for number, content in enumerate(ordered)},
        "rows.parquet": {
            f"{above}/rows.parquet/{row:09d}": file.read_bytes()
            for row, file in enumerate(sorted(pictures.rglob("*.png")))
        },
    }
    for number, (given, expected) in enumerate(inputs.items()):
        output = f"{uploaded}/shards-{number}"
        shard([f"{uploaded}/{given}"], output, ShardConfig(max_count=4), INLINE)
        assert images_of(open_storage(output)) == expected, given


def test_keys_do_not_depend_on_where_the_images_lie(uploaded: str, pictures: Path, tmp_path: Path) -> None:
    shard([f"{uploaded}/pictures"], str(tmp_path / "of-remote"), TWO_EACH, INLINE)
    shard([str(pictures)], f"{uploaded}/of-local", TWO_EACH, INLINE)
    remote, local = list_shards(open_storage(tmp_path / "of-remote")), list_shards(open_storage(f"{uploaded}/of-local"))
    assert [unit.sha256 for unit in remote] == [unit.sha256 for unit in local]


def test_foreign_tars_in_the_store_are_shards(uploaded: str, tmp_path: Path) -> None:
    output = open_storage(f"{uploaded}/wild")
    output.write("a.tar", open_storage(uploaded).read("packed.tar"))
    distill(output.uri(), str(tmp_path / "targets"), QUICK.model_copy(update={"views": 1}), INLINE)
    assert rows_of(open_storage(tmp_path / "targets")).num_rows == 6


# Resume and damage.


def test_only_the_shard_without_a_manifest_is_done_again(shards: str, s3_bucket: str, local_rows: pa.Table) -> None:
    output = open_storage(f"{s3_bucket}/{uuid.uuid4().hex}")
    distill(shards, output.uri(), QUICK, INLINE)
    before = {manifest.unit: manifest for manifest in read_manifests(output)}
    lost, kept = sorted(before)
    output.delete(f"manifest/{lost}.json")
    run("status", output.uri())
    run("verify", output.uri(), status=1)
    run("distill", shards, output.uri(), "--executor", "inline", *QUICK_OPTIONS)
    after = {manifest.unit: manifest for manifest in read_manifests(output)}
    assert after[kept] == before[kept]
    assert after[lost].attempt != before[lost].attempt
    assert rows_of(output).equals(local_rows)
    run("verify", output.uri())
    assert len(list(output.list("data"))) == 2  # the first attempt's file is gone


def test_verify_finds_damaged_and_missing_objects(
    shards: str, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = open_storage(f"{s3_bucket}/{uuid.uuid4().hex}")
    for path, _ in open_storage(shards).list():
        copy.write(path, open_storage(shards).read(path))
    run("verify", copy.uri())
    first, second = [file.path for manifest in read_manifests(copy) for file in manifest.files]
    data = bytearray(copy.read(first))
    data[len(data) // 2] ^= 1
    copy.write(first, bytes(data))
    copy.delete(second)
    capsys.readouterr()
    run("verify", copy.uri(), status=1)
    text = capsys.readouterr().err
    assert f"{first} is damaged" in text
    assert f"{second} is missing" in text
    assert "2 problems" in text


# Errors.


def test_a_missing_bucket_is_named(photographs: Path, capsys: pytest.CaptureFixture[str], s3_bucket: str) -> None:
    missing, here = "s3://no-such-bucket/x", f"{s3_bucket}/{uuid.uuid4().hex}"
    inline = ("--executor", "inline")
    for arguments in (
        ("shard", str(photographs), missing, *inline),
        ("shard", missing, here, *inline),
        ("distill", missing, here, *inline),
        ("status", missing),
        ("verify", missing),
        ("stats", missing),
        ("gc", missing),
    ):
        assert missing in run_for_error(capsys, *arguments), arguments
    assert not list(open_storage(here).list())


def test_wrong_credentials_are_reported(
    shards: str, photographs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pytest.importorskip("moto.settings", reason="the S3 tests need moto[server] (pip install '.[dev]')")
    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on the server refuses all credentials
    for arguments in (
        ("shard", str(photographs), f"{shards}-new", "--executor", "inline"),
        ("distill", shards, f"{shards}-new", "--executor", "inline"),
        ("status", shards),
    ):
        line = run_for_error(capsys, *arguments)
        assert shards in line
        assert "403" in line
        assert "AWS_ACCESS_KEY_ID" in line


def test_a_dead_endpoint_is_given_up_soon(
    shards: str, photographs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:  # bound and not listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        line = run_for_error(capsys, "distill", shards, f"{shards}-new", "--executor", "inline")
    assert f"{shards}/plan.json" in line
    assert "check the bucket, the network" in line


# On Ray.


@pytest.mark.slow
def test_ray_workers_reach_the_store(shards: str, s3_bucket: str, local_rows: pa.Table) -> None:
    """The job runs in a process of its own, because workers of a running Ray keep the environment of its start."""
    output = f"{s3_bucket}/{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "jobs.cli", "distill", shards, output, "--executor", "ray", *QUICK_OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert rows_of(open_storage(output)).equals(local_rows)
    run("verify", output)
