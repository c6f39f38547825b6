"""Finding images, wherever they lie, under keys that depend on an image's place in its input and on nothing else."""

import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, DamagedDataError, Rejected, StorageError
from pipeline.inputs.sources import ItemReader, find_items, root_storage
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from tests.support.tar_files import write_tar
from tests.support.toys import encode_picture


def sources(*inputs: Path | str, column: str | None = None) -> list[str]:
    """The sources of all images, sorted, after all of them were read."""
    given = [str(one) for one in inputs]
    items, reader = find_items(given, column), ItemReader(given, column)
    assert all(reader.read(item).startswith(b"\x89PNG") for item in items)
    return sorted(item.source for item in items)


def keys(*inputs: Path | str) -> dict[str, str]:
    return {item.source: item.key for item in find_items([str(one) for one in inputs])}


ALL = ["0.png", "1.png", "3.png", "4.png", "below/2.png", "below/5.png"]


def test_a_folder_is_searched_to_the_bottom(pictures: Path):
    (pictures / "notes.txt").write_text("no image")
    (pictures / "noending").touch()
    assert sources(pictures) == [f"pictures/{name}" for name in ALL]


def test_items_are_sorted_by_key_and_carry_sizes(pictures: Path):
    items = find_items([str(pictures)])
    assert [item.key for item in items] == sorted(item.key for item in items)
    assert all(item.bytes == (pictures.parent / item.source).stat().st_size for item in items)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", "pictures/0 pictures/1 pictures/3 pictures/4"),
        ("**/*.png", "pictures/0 pictures/1 pictures/3 pictures/4 pictures/below/2 pictures/below/5"),
        ("**", "pictures/0 pictures/1 pictures/3 pictures/4 pictures/below/2 pictures/below/5"),
        ("?.png", "pictures/0 pictures/1 pictures/3 pictures/4"),
        ("[0-3].png", "pictures/0 pictures/1 pictures/3"),
        ("[!0-3].png", "pictures/4"),
        ("*/2.png", "pictures/below/2"),
        ("b*/**/?.png", "pictures/below/2 pictures/below/5"),
        ("below/*", "below/2 below/5"),
    ],
)
def test_globs_mean_what_they_mean_in_a_shell(pictures: Path, pattern: str, expected: str):
    """Sources are named after the folder before the first wildcard."""
    assert sources(f"{pictures}/{pattern}") == [f"{name}.png" for name in expected.split()]


def test_a_glob_that_fits_nothing_and_a_folder_that_is_not_there_are_refused(pictures: Path):
    for given in (f"{pictures}/*.jpg", f"{pictures}/nowhere", f"{pictures}/0.jpg"):
        with pytest.raises(ConfigError, match=f"{re.escape(given)} does not exist, or is empty"):
            find_items([given])


def test_single_files(pictures: Path):
    assert sources(pictures / "0.png", pictures / "below" / "2.png") == ["below/2.png", "pictures/0.png"]


def test_names_that_look_like_globs_are_taken_literally_where_they_exist(pictures: Path):
    folder = shutil.copytree(pictures, pictures.parent / "holidays [2020] *")
    assert sources(folder) == [f"holidays [2020] */{name}" for name in ALL]
    (pictures / "what?[1].png").write_bytes(encode_picture(9))
    assert sources(pictures / "what?[1].png") == ["pictures/what?[1].png"]


def test_a_picture_has_one_key_however_it_is_given(pictures: Path):
    by_folder = keys(pictures)
    assert keys(pictures / "0.png")["pictures/0.png"] == by_folder["pictures/0.png"]
    assert keys(f"{pictures}/**/2.png")["pictures/below/2.png"] == by_folder["pictures/below/2.png"]
    assert keys(f"{pictures}/")["pictures/0.png"] == by_folder["pictures/0.png"]


def test_keys_do_not_depend_on_where_the_folder_lies(pictures: Path, monkeypatch: pytest.MonkeyPatch):
    here = keys(pictures)
    elsewhere = shutil.copytree(pictures, pictures.parent / "far" / "away" / "pictures")
    assert keys(elsewhere) == here
    monkeypatch.chdir(elsewhere.parent)
    assert keys("pictures") == here
    monkeypatch.chdir(elsewhere)
    assert keys(".") == here
    remote = open_storage("memory://bucket/pictures")
    for name in ALL:
        remote.write(name, (pictures / name).read_bytes())
    assert keys("memory://bucket/pictures") == here
    assert keys("memory://bucket/pictures/**/*.png") == here


def test_keys_do_not_depend_on_siblings(pictures: Path):
    before = keys(pictures)
    (pictures / "00.png").write_bytes(encode_picture(10))
    (pictures / "0.jpg").write_bytes(encode_picture(11, kind="JPEG"))
    after = keys(pictures)
    assert {source: after[source] for source in before} == before
    assert len(set(after.values())) == 8


def test_names_that_differ_little_have_keys_that_differ(tmp_path: Path):
    names = ["a.jpg", "a.png", "a.b.jpg", "a_b.jpg", "a b.jpg", "a-b.jpg", "A.jpg", "a.JPG", "a..jpg", "a/b.jpg"]
    names += [
        ".a.jpg",
        "_a.jpg",
        "é.jpg",
        "e\u0301.jpg",
        "猫.jpg",
        "🐈.jpg",
        "a\n.jpg",
        "a\\b.jpg",
        os.fsdecode(b"\xe9.jpg"),
    ]
    for number, name in enumerate(names):
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_picture(number))
    given = [str(tmp_path / "folder")]
    items, reader = find_items(given), ItemReader(given)
    assert {item.source for item in items} == {f"folder/{name}" for name in names}
    assert len({item.key for item in items}) == len(names)
    for item in items:
        assert reader.read(item) == (tmp_path / item.source).read_bytes()
        # What webdataset takes for a key: valid Unicode, with no dot in its last part.
        assert re.fullmatch(r"folder(/[^./]+)*-[0-9a-f]{8}", item.key), item.key
        item.key.encode()


def test_hidden_files_upper_case_endings_and_what_is_no_image(tmp_path: Path):
    for name in (".hidden.png", ".private/x.PNG", "Y.Png", ".png", "z.png.part", ".tmp-unfinished.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode_picture(0))
    name = tmp_path.name
    assert sources(tmp_path) == [f"{name}/.hidden.png", f"{name}/.private/x.PNG", f"{name}/Y.Png"]


def test_inputs_of_one_name_that_hold_the_same_file_are_refused(tmp_path: Path):
    one, other = tmp_path / "one" / "photos", tmp_path / "other" / "photos"
    for folder in (one, other):
        folder.mkdir(parents=True)
        (folder / "cat.png").write_bytes(encode_picture(0))
    with pytest.raises(ConfigError) as caught:
        find_items([str(one), str(other)])
    message = str(caught.value)
    assert str(one) in message
    assert str(other) in message
    assert "photos/cat.png" in message
    (other / "cat.png").rename(other / "dog.png")
    assert sources(one, other) == ["photos/cat.png", "photos/dog.png"]


def test_a_tar_gives_its_members(tmp_path: Path):
    long = "/".join(["d" * 100, "e" * 100, "f" * 100])
    names = ["a.png", "./b/c.png", "b/d.PNG", ".hidden.png", "hidden.png", f"{long}.png", "ünï cödé.png", "notes.txt"]
    file = write_tar(tmp_path / "batch.tar", {name: encode_picture(n) for n, name in enumerate(names)})
    found = {item.source.split("batch.tar/")[1]: item for item in find_items([str(file)])}
    expected = {name.removeprefix("./"): encode_picture(n) for n, name in enumerate(names) if name != "notes.txt"}
    reader = ItemReader([str(file)])
    assert {name: reader.read(item) for name, item in found.items()} == expected
    assert all(item.source.startswith(f"{tmp_path.name}/batch.tar/") for item in found.values())
    # The tar may as well lie in a folder that is given.
    shutil.move(file, (tmp_path / "in").mkdir() or tmp_path / "in" / "batch.tar")
    assert len(sources(tmp_path / "in")) == 7


def test_a_tar_with_folders_and_links_gives_files_only(tmp_path: Path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, kind in (("folder.png", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
        info = tarfile.TarInfo("real.png")
        info.size = len(encode_picture(0))
        archive.addfile(info, io.BytesIO(encode_picture(0)))
    assert [source.rpartition("/")[2] for source in sources(tmp_path / "t.tar")] == ["real.png"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_and_told_what_to_do(tmp_path: Path, mode: str):
    file = write_tar(tmp_path / "batch.tar", {"a.png": encode_picture(0)}, mode)
    with pytest.raises(DamagedDataError, match=r"batch\.tar is not a plain tar.*compressed, unpack it first"):
        find_items([str(file)])


def test_a_tar_that_ends_early_is_refused(tmp_path: Path):
    file = write_tar(tmp_path / "batch.tar", {"a.png": bytes(5000), "b.png": bytes(5000)})
    os.truncate(file, 8000)
    with pytest.raises(DamagedDataError, match=r"batch\.tar is not a plain tar"):
        find_items([str(file)])


def test_a_tar_that_holds_a_name_twice_is_refused(tmp_path: Path):
    file = write_tar(tmp_path / "batch.tar", [("a.png", encode_picture(0)), ("./a.png", encode_picture(1))])
    with pytest.raises(ConfigError, match=r"batch\.tar holds .*batch\.tar/a\.png twice"):
        find_items([str(file)])


def write_parquet(file: Path, column: str, values: list, kind: pa.DataType | None = None, group: int = 2) -> Path:
    table = pa.table({"label": [str(n) for n in range(len(values))], column: pa.array(values, kind)})
    pq.write_table(table, file, row_group_size=group)
    return file


HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [(pa.binary(), lambda data: data), (pa.large_binary(), lambda data: data), (HF, lambda data: {"bytes": data})],
    ids=["binary", "large_binary", "hugging_face"],
)
def test_parquet_gives_its_rows(tmp_path: Path, kind: pa.DataType, wrap):
    data = [encode_picture(n) for n in range(5)]
    file = write_parquet(tmp_path / "table.parquet", "image", [wrap(one) for one in data], kind)
    items, reader = find_items([str(file)]), ItemReader([str(file)])
    assert [item.source for item in items] == [f"{tmp_path.name}/table.parquet/{row:09d}" for row in range(5)]
    assert [reader.read(item) for item in items] == data
    # In any order, and from several files at once.
    assert [reader.read(items[row]) for row in (4, 0, 3, 1, 2)] == [data[row] for row in (4, 0, 3, 1, 2)]
    assert sum(item.bytes for item in items) > 0


def test_rows_without_bytes_are_missing(tmp_path: Path):
    plain = write_parquet(tmp_path / "plain.parquet", "image", [encode_picture(0), None], pa.binary())
    nested = write_parquet(tmp_path / "nested.parquet", "image", [None, {"bytes": None, "path": "x.png"}], HF)
    given = [str(plain), str(nested)]
    items, reader = find_items(given), ItemReader(given)
    reasons = {}
    for item in items:
        try:
            reader.read(item)
        except Rejected as rejection:
            reasons[item.source.partition("/")[2]] = rejection.reason
    assert reasons == {
        "plain.parquet/000000001": "missing",
        "nested.parquet/000000000": "missing",
        "nested.parquet/000000001": "missing",
    }


def test_the_image_column_can_be_named_and_a_wrong_name_lists_what_is_there(tmp_path: Path):
    file = write_parquet(tmp_path / "table.parquet", "photo", [encode_picture(0)], pa.binary())
    assert len(sources(file, column="photo")) == 1
    for column in (None, "foto", "label"):
        with pytest.raises(ConfigError) as caught:
            find_items([str(file)], column)
        assert "columns: label, photo" in str(caught.value)
        assert "--image-column" in str(caught.value)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("damage", ["no parquet", "cut", "footer"])
def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path, damage: str):
    file = write_parquet(tmp_path / "table.parquet", "image", [encode_picture(0)], pa.binary())
    data = bytearray(file.read_bytes())
    if damage == "no parquet":
        data = bytearray(b"hello")
    elif damage == "cut":
        del data[len(data) // 2 :]
    else:
        length = int.from_bytes(data[-8:-4], "little")
        data[-8 - length : -8] = b"\xff" * length
    file.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"table\.parquet is not a Parquet file"):
        find_items([str(file)])


def test_a_parquet_file_without_rows_holds_no_images(tmp_path: Path):
    file = write_parquet(tmp_path / "table.parquet", "image", [], pa.binary())
    with pytest.raises(ConfigError, match="holds no images"):
        find_items([str(file)])


@pytest.mark.parametrize("given", ["pictures", "pictures/0.png", "pictures/*.png"])
def test_a_file_that_vanishes_after_planning_is_missing(pictures: Path, given: str):
    inputs = [str(pictures.parent / given)]
    item = next(item for item in find_items(inputs) if item.source == "pictures/0.png")
    (pictures / "0.png").unlink()
    with pytest.raises(Rejected) as caught:
        ItemReader(inputs).read(item)
    assert caught.value.reason == "missing"


def test_a_file_without_permission_is_forbidden(pictures: Path, monkeypatch: pytest.MonkeyPatch):
    """The superuser may read anything, so the refusal is made up."""
    (item, *_) = find_items([str(pictures)])

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(Rejected) as caught:
        ItemReader([str(pictures)]).read(item)
    assert caught.value.reason == "forbidden"


def test_a_tar_that_shrank_after_planning_is_damaged(tmp_path: Path):
    file = write_tar(tmp_path / "batch.tar", {"a.png": bytes(5000)})
    (item,) = find_items([str(file)])
    os.truncate(file, 3000)
    with pytest.raises(DamagedDataError, match=r"batch\.tar has shrunk"):
        ItemReader([str(file)]).read(item)


def test_a_parquet_file_that_lost_rows_after_planning_is_damaged(tmp_path: Path):
    file = write_parquet(tmp_path / "table.parquet", "image", [b"1", b"2", b"3"], pa.binary())
    item = find_items([str(file)])[-1]
    write_parquet(file, "image", [b"1"], pa.binary())
    with pytest.raises(DamagedDataError, match=r"table\.parquet has lost rows"):
        ItemReader([str(file)]).read(item)


def test_a_worker_reads_an_item_without_listing_the_input_again(pictures: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of a million files is listed once, by the driver."""
    inputs = [str(pictures), f"{pictures}/*.png"]
    items = [find_items([given])[0] for given in inputs]

    def refuse(self: Storage, prefix: str = ""):
        if self.root == str(pictures):
            raise AssertionError("the folder was listed")
        return iter(())

    monkeypatch.setattr(type(open_storage(pictures)), "list", refuse)
    for given, item in zip(inputs, items, strict=True):
        assert root_storage(given).root == str(pictures)
        assert ItemReader([given]).read(item)


def test_an_input_that_cannot_be_reached_is_a_storage_error():
    with pytest.raises(StorageError, match="ftp:// is not supported"):
        find_items(["ftp://host/pictures"])


def test_tables_and_tars_without_images_in_a_folder_are_skipped(pictures: Path, caplog: pytest.LogCaptureFixture):
    """img2dataset leaves a table of captions beside its tars; one broken tar must not stop the rest."""
    pq.write_table(pa.table({"url": ["x"], "caption": ["y"]}), pictures / "00000.parquet")
    (pictures / "junk.tar").write_bytes(b"junk" * 300)
    assert len(find_items([str(pictures)])) == 6
    assert "00000.parquet" in caplog.text
    assert "junk.tar" in caplog.text
    for name, error in (("00000.parquet", ConfigError), ("junk.tar", DamagedDataError)):
        with pytest.raises(error, match=name):
            find_items([str(pictures / name)])
