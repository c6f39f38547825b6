"""Versions of a registry: published once, by the checksum of their weights, whichever publication is killed."""

import threading
from pathlib import Path

import pytest

from air.errors import CheckpointError
from pipeline.errors import RegistryError
from pipeline.identity import checksum_of
from pipeline.predictors import find_predictor
from pipeline.registry.versions import publish, read_version, read_versions, version_by_digits, version_ids, weights_uri
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.open import open_storage
from tests.support.networks import save_fresh_rule, save_network


@pytest.fixture
def registry(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "registry")


def files_of(registry: Storage) -> dict[str, int]:
    return dict(registry.list())


def test_a_version_has_the_weights_the_card_and_the_evidence(registry: Storage, tmp_path: Path) -> None:
    network = save_network(tmp_path / "net.safetensors", metrics={"valid_psnr": 31.5, "lost": float("inf")})
    (tmp_path / "figures.parquet").write_bytes(b"figures")
    version = publish(registry, str(network), {"figures.parquet": str(tmp_path / "figures.parquet")}, {"psnr": 30.25})
    assert version.sha256 == checksum_of(network)
    assert version.id == version.sha256[:16]
    assert (version.kind, version.model) == ("predictor", f"compact:{version.sha256[:12]}")
    assert version.figures == {"valid_psnr": 31.5, "psnr": 30.25}
    assert read_version(registry, version.id) == version
    stored = {Path(file.path).name: file for file in version.files}
    assert sorted(stored) == ["figures.parquet", "predictor.json", "predictor.safetensors"]
    for file in stored.values():
        data = registry.read(file.path)
        assert len(data) == file.bytes
    assert registry.read(stored["predictor.safetensors"].path) == network.read_bytes()
    assert find_predictor(weights_uri(registry, version)).sha256 == version.sha256


def test_the_same_weights_are_the_same_version(registry: Storage, tmp_path: Path) -> None:
    network = save_network(tmp_path / "net.safetensors")
    first = publish(registry, str(network))
    before = files_of(registry)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(network.read_bytes())
    copy.with_suffix(".json").write_bytes(network.with_suffix(".json").read_bytes())
    assert publish(registry, str(copy), figures={"psnr": 1.0}) == first
    assert files_of(registry) == before


def test_rules_are_versions_too(registry: Storage, tmp_path: Path) -> None:
    version = publish(registry, str(save_fresh_rule(tmp_path / "rule.safetensors")))
    assert (version.kind, version.model) == ("rule", f"rule:{version.sha256[:12]}")


def test_of_publications_at_once_one_counts_and_the_others_clean_up(registry: Storage, tmp_path: Path) -> None:
    network = save_network(tmp_path / "net.safetensors")
    start = threading.Barrier(4)
    versions = []

    def work() -> None:
        start.wait()
        versions.append(publish(registry, str(network)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(versions) == 4
    assert len(set(map(str, versions))) == 1
    named = {file.path for file in versions[0].files}
    assert {path for path in files_of(registry) if not path.endswith("version.json")} == named


def test_a_killed_publication_is_no_version_and_the_next_one_is_whole(
    registry: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = save_network(tmp_path / "net.safetensors")

    def killed(self: LocalStorage, path: str, data: bytes) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStorage, "put_if_absent", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(registry, str(network))
    monkeypatch.undo()
    assert files_of(registry)
    assert version_ids(registry) == []
    version = publish(registry, str(network))
    assert list(read_versions(registry)) == [version]


def test_damaged_or_foreign_weights_are_refused(registry: Storage, tmp_path: Path) -> None:
    network = save_network(tmp_path / "net.safetensors")
    data = bytearray(network.read_bytes())
    data[-1] ^= 1
    network.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not the file that its card"):
        publish(registry, str(network))
    with pytest.raises(CheckpointError, match="the card of none"):
        publish(registry, str(tmp_path / "none.safetensors"))
    network.with_suffix(".json").write_text('{"format": "strange"}')
    with pytest.raises(CheckpointError, match="is not the card of a predictor"):
        publish(registry, str(network))
    assert files_of(registry) == {}


def test_other_weights_whose_checksum_begins_alike_are_refused(registry: Storage, tmp_path: Path) -> None:
    network = save_network(tmp_path / "net.safetensors")
    version = publish(registry, str(network))
    other = version.model_copy(update={"sha256": version.sha256[:16] + "0" * 48})
    registry.write(f"versions/{version.id}/version.json", other.model_dump_json().encode())
    with pytest.raises(RegistryError, match="holds other weights"):
        publish(registry, str(network))


def test_digits_that_name_none_or_several_list_what_there_is(registry: Storage, tmp_path: Path) -> None:
    versions = [publish(registry, str(save_network(tmp_path / f"{seed}.safetensors", seed=seed))) for seed in (0, 1)]
    for version in versions:
        assert version_by_digits(registry, version.id[:8]) == version
        assert version_by_digits(registry, version.sha256.upper()) == version
        with pytest.raises(RegistryError, match=f"no version @{version.id}ffff"):
            version_by_digits(registry, version.id + "ffff")
    with pytest.raises(RegistryError, match=f"it has @{min(v.id for v in versions)[:12]}, @"):
        version_by_digits(registry, "123456789")
    with pytest.raises(RegistryError, match="give more digits"):
        version_by_digits(registry, versions[0].id[:3])
