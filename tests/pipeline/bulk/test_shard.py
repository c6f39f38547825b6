"""Shards: unchanged images in plain WebDataset tars of bounded size, equal in every run; a changed shard is refused."""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bulk.shard import ShardConfig, ShardJob, plan_shards
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, DamagedDataError, JobFailedError
from pipeline.formats.images import encode_png
from pipeline.inputs.shards import list_shards, read_samples
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.manifest import Manifest, committed_units, read_manifests
from pipeline.work.plan import settle_plan
from pipeline.work.runner import run
from pipeline.work.tally import Tally
from tests.support.paths import AWKWARD
from tests.support.tar_files import write_tar
from tests.support.toys import encode_picture, read_quarantine


def shard(inputs: Sequence[Path | str], out: Path | str, bad: float = 0.5, **options) -> tuple[Storage, Tally]:
    """The whole of `air shard`, in this process."""
    output, config = open_storage(out), ShardConfig(**options)
    given = [str(one) for one in inputs]
    plan, listings = plan_shards(config, given)
    plan = settle_plan(output, plan, listings)
    runner = RunnerConfig(executor="inline", max_bad_share=bad)
    return output, run(ShardJob(config, given, output), plan, output, runner)


def read_back(output: Storage) -> dict[str, bytes]:
    """Key and bytes of every sample, through this project's own reader."""
    return {sample.key: sample.read() for unit in list_shards(output) for sample in read_samples(output, unit)}


def manifests(output: Storage) -> list[Manifest]:
    return list(read_manifests(output))


def noise(seed: int, size: int) -> bytes:
    """A picture of about `size` bytes, of noise that does not compress."""
    side = int((size / 3) ** 0.5)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encode_png(pixels)


def test_images_come_back_byte_for_byte_with_what_is_known_of_them(photographs: Path, tmp_path: Path):
    output, tally = shard([photographs], tmp_path / "out", max_count=3)
    originals = sorted(file.read_bytes() for file in photographs.iterdir())
    assert sorted(read_back(output).values()) == originals
    assert tally.summary["images"] == 4
    assert tally.summary["image_bytes"] == sum(map(len, originals))
    assert [manifest.samples for manifest in manifests(output)] == [3, 1]
    assert tally.summary["pixels"] > 0


def test_plain_webdataset_reads_the_shards(photographs: Path, tmp_path: Path):
    import webdataset

    output, _ = shard([photographs], tmp_path / "out")
    urls = [output.uri(file.path) for manifest in manifests(output) for file in manifest.files]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 4
    for sample in samples:
        about = json.loads(sample["json"])
        name = about["source"].removeprefix(f"{photographs.name}/")
        data = (photographs / name).read_bytes()
        assert sample[name.rpartition(".")[2]] == data
        assert about["key"] == sample["__key__"]
        assert about["sha256"] == hashlib.sha256(data).hexdigest()
        assert (about["bytes"], about["format"]) == (len(data), "PNG" if name.endswith("png") else "JPEG")
    decoded = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png;jpg", "json")
    for pixels, about in decoded:
        assert pixels.shape == (about["height"], about["width"], 3)


def test_two_runs_give_equal_tars(pictures: Path, tmp_path: Path):
    one, _ = shard([pictures], tmp_path / "one", max_count=4)
    os.utime(pictures / "0.png", (0, 0))
    other, _ = shard([pictures], tmp_path / "other", max_count=4)

    def checksums(output: Storage) -> list[str]:
        return [file.sha256 for manifest in manifests(output) for file in manifest.files]

    assert checksums(one) == checksums(other)
    assert len(set(checksums(one))) == 2


def test_shards_are_bounded_by_count(pictures: Path, tmp_path: Path):
    output, _ = shard([pictures], tmp_path / "out", max_count=4)
    assert [unit.samples for unit in list_shards(output)] == [4, 2]
    assert len(read_back(output)) == 6


def long_named(folder: Path) -> list[Path]:
    """Small pictures whose names take more bytes than the pictures."""
    for number in range(40):
        file = folder / ("d" * 200) / ("e" * 200) / f"{'f' * 200}{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_picture(number, 8, 8))
    return [folder]


def small(folder: Path) -> list[Path]:
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.png").write_bytes(encode_picture(number, 8, 8))
    return [folder]


def repeated_rows(folder: Path) -> list[Path]:
    """Rows whose sizes Parquet understates: a dictionary stores the one picture once."""
    folder.mkdir()
    table = pa.table({"image": pa.array([noise(0, 20_000)] * 30, pa.binary())})
    pq.write_table(table, folder / "table.parquet")
    return [folder]


@pytest.mark.parametrize("make", [small, long_named, repeated_rows])
@pytest.mark.parametrize("max_bytes", [tarfile.RECORDSIZE * 4, 100_000])
def test_shards_are_bounded_by_bytes(tmp_path: Path, make, max_bytes: int):
    output, tally = shard(make(tmp_path / "in"), tmp_path / "out", max_bytes=max_bytes)
    units = list_shards(output)
    assert [unit.name for unit in units if unit.bytes > max_bytes] == []
    assert sum(unit.samples or 0 for unit in units) == tally.summary["images"] == tally.samples_total
    # Well filled: two neighbours never fit into one, but for the estimate of what stands beside the images.
    assert len(units) <= 2 * sum(unit.bytes for unit in units) / max_bytes + 1


def test_where_sizes_are_known_a_unit_is_one_tar(tmp_path: Path):
    """A plan that misjudged the bytes beside an image would leave a small second tar beside every shard."""
    output, _ = shard(small(tmp_path / "in"), tmp_path / "out", max_bytes=50_000)
    assert len(manifests(output)) > 2
    assert {len(manifest.files) for manifest in manifests(output)} == {1}


def test_an_image_larger_than_a_shard_stands_alone(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for name, size in (("a", 5_000), ("b", 90_000), ("c", 5_000)):
        (tmp_path / "in" / f"{name}.png").write_bytes(noise(size, size))
    output, _ = shard([tmp_path / "in"], tmp_path / "out", max_bytes=40_000)
    units = list_shards(output)
    assert [unit.samples for unit in units] == [1, 1, 1]
    assert [unit.bytes > 40_000 for unit in units] == [False, True, False]
    assert len(read_back(output)) == 3


def test_parts_of_a_unit_are_shards_of_their_own_names(tmp_path: Path):
    output, _ = shard(repeated_rows(tmp_path / "in"), tmp_path / "out", max_bytes=100_000)
    (manifest,) = manifests(output)
    units = list_shards(output)
    assert [file.rows for file in manifest.files] == [unit.samples for unit in units]
    assert len(units) > 3
    assert units[0].name == "shard-00000"
    assert {unit.name for unit in units[1:]} == {f"shard-00000-{part}" for part in range(1, len(units))}


def test_a_collection_of_everything_becomes_one(pictures: Path, tmp_path: Path):
    tar = write_tar(tmp_path / "t" / "batch.tar", {"x/cat.png": encode_picture(50), "x/dog.png": encode_picture(51)})
    table = tmp_path / "t" / "table.parquet"
    pq.write_table(pa.table({"image": pa.array([encode_picture(52), None], pa.binary())}), table)
    output, tally = shard([pictures, tar, table], tmp_path / "out")
    assert len(set(read_back(output).values())) == 9
    assert tally.rejected == {"missing": 1}


def test_a_file_that_vanishes_after_planning_goes_to_quarantine(pictures: Path, tmp_path: Path):
    output, config, given = open_storage(tmp_path / "out"), ShardConfig(), [str(pictures)]
    plan, listings = plan_shards(config, given)
    plan = settle_plan(output, plan, listings)
    (pictures / "0.png").unlink()
    run(ShardJob(config, given, output), plan, output, RunnerConfig(executor="inline"))
    (row,) = read_quarantine(output)
    assert (row["reason"], row["sha256"], row["bytes"]) == ("missing", "", 0)
    assert row["message"].startswith("pictures/0.png: ")
    assert len(read_back(output)) == 5


def test_a_name_that_is_no_unicode_makes_its_way(tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "good.png").write_bytes(encode_picture(0))
    (folder / os.fsdecode(b"\xe9.png")).write_bytes(b"bad")
    output, tally = shard([folder], tmp_path / "out")
    assert tally.rejected == {"not_an_image": 1}
    assert "caf\\udce9/\\udce9.png" in read_quarantine(output)[0]["message"]
    assert list(read_back(output).values()) == [encode_picture(0)]


def test_the_plan_is_that_of_the_images_and_not_of_their_place(pictures: Path, tmp_path: Path):
    here, _ = plan_shards(ShardConfig(), [str(pictures)])
    (tmp_path / "away").mkdir()
    moved = pictures.rename(tmp_path / "away" / "pictures")
    there, _ = plan_shards(ShardConfig(), [str(moved)])
    assert here.hash == there.hash
    (moved / "new.png").write_bytes(encode_picture(9))
    assert plan_shards(ShardConfig(), [str(moved)])[0].hash != here.hash


def test_a_changed_listing_is_refused(pictures: Path, tmp_path: Path):
    output, config, given = open_storage(tmp_path / "out"), ShardConfig(), [str(pictures)]
    plan, listings = plan_shards(config, given)
    settle_plan(output, plan, listings)
    output.write(plan.units[0].input, b"[]")
    with pytest.raises(DamagedDataError, match="not the listing that the plan names"):
        list(ShardJob(config, given, output).samples(plan.units[0], tmp_path))


@pytest.mark.parametrize("check", ["decode", "header"])
def test_how_much_is_checked(pictures: Path, tmp_path: Path, check: str):
    (pictures / "half.jpg").write_bytes(encode_picture(9, 200, 200, kind="JPEG")[:-2000])
    _, tally = shard([pictures], tmp_path / "out", check=check)
    assert tally.rejected == ({"truncated": 1} if check == "decode" else {})


def test_pixels_are_limited_before_decoding(pictures: Path, tmp_path: Path):
    _, tally = shard([pictures], tmp_path / "out", max_pixels=24 * 32 - 1, bad=1.0)
    assert tally.rejected == {"too_many_pixels": 6}


def test_a_changed_shard_is_refused(pictures: Path, tmp_path: Path):
    output, _ = shard([pictures], tmp_path / "out")
    (unit,) = list_shards(output)
    data = bytearray(output.read(unit.input))
    data[3000] ^= 1
    output.write(unit.input, bytes(data))
    with pytest.raises(DamagedDataError, match="has changed since the plan was made"):
        list(read_samples(output, unit))
    output.write(unit.input, bytes(data[:-512]))
    with pytest.raises(DamagedDataError, match="not the size its manifest says"):
        list_shards(output)


def test_an_unfinished_output_is_refused(pictures: Path, tmp_path: Path):
    output, _ = shard([pictures], tmp_path / "out", max_count=3)
    output.delete("manifest/shard-00001.json")
    assert committed_units(output) == {"shard-00000"}
    with pytest.raises(
        JobFailedError, match=r"1 of 2 shards are missing \(shard-00001 first\); run the same `air shard`"
    ):
        list_shards(output)


def test_what_no_manifest_names_is_not_read(pictures: Path, tmp_path: Path):
    output, _ = shard([pictures], tmp_path / "out")
    write_tar(tmp_path / "out" / "data" / "shard-00000-killed.tar", {"x.png": encode_picture(99)})
    assert len(read_back(output)) == 6


def test_two_folders_of_one_name_are_refused(pictures: Path, tmp_path: Path):
    other = tmp_path / "other" / "pictures"
    other.mkdir(parents=True)
    (other / "0.png").write_bytes(encode_picture(0))
    with pytest.raises(ConfigError, match=r"both hold pictures/0\.png"):
        plan_shards(ShardConfig(), [str(pictures), str(other)])


@pytest.mark.skipif(not AWKWARD.is_dir(), reason="needs the awkward images of ../shared/data/awkward")
def test_every_awkward_image_gets_what_it_deserves(tmp_path: Path):
    broken = {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "corrupt_data.png": "corrupt",
        "huge_header_60000x60000.png": "too_many_pixels",
        "not_an_image.jpg": "not_an_image",
        "empty.png": "empty",
    }
    images = {file.name: file.read_bytes() for file in AWKWARD.iterdir() if file.suffix != ".md"}
    output, tally = shard([AWKWARD], tmp_path / "out")
    quarantined = {row["message"].partition(": ")[0]: row for row in read_quarantine(output)}
    assert {name.removeprefix("awkward/"): row["reason"] for name, row in quarantined.items()} == broken
    for name, row in quarantined.items():
        data = images[name.removeprefix("awkward/")]
        assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    kept = {data for name, data in images.items() if name not in broken}
    assert set(read_back(output).values()) == kept
    assert (tally.samples, tally.summary["images"]) == (len(images), len(images) - len(broken))
    (unit,) = list_shards(output)
    with output.local_file(unit.input) as local, tarfile.open(local) as archive:
        names = [name.rpartition("/")[2] for name in archive.getnames() if not name.endswith(".json")]
    endings = {name.rpartition("-")[0]: name.rpartition(".")[2] for name in names}
    assert endings["png_named"] == "png"
    assert (endings["gray"], endings["lossy"], endings["animated"]) == ("jpg", "webp", "gif")


def test_a_plan_that_loses_leaves_the_winners_listings_alone(pictures: Path, tmp_path: Path):
    """Of two drivers with two configurations in one folder, the loser may write listings after the winner's plan."""
    output, given = open_storage(tmp_path / "out"), [str(pictures)]
    plan, listings = plan_shards(ShardConfig(max_count=4), given)
    _, others = plan_shards(ShardConfig(max_count=3), given)
    settle_plan(output, plan, listings)
    for path, content in others.items():
        output.write(path, content)
    job = ShardJob(ShardConfig(max_count=4), given, output)
    assert sum(len(list(job.samples(unit, tmp_path))) for unit in plan.units) == 6
