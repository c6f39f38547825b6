"""Names in a registry work wherever weights are named, and a plan pins what they stood for."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from air.errors import CheckpointError
from jobs.distill import distill
from jobs.encode import encode
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.encode import EncodeConfig
from pipeline.config import RunnerConfig
from pipeline.errors import PlanMismatchError, RegistryError
from pipeline.predictors import find_predictor
from pipeline.registry.aliases import promote
from pipeline.registry.gc import remove_version
from pipeline.registry.names import locate, named_version, parse_name
from pipeline.registry.versions import Version, publish, weights_uri
from pipeline.rules.config import RuleConfig
from pipeline.rules.plan import plan_rule
from pipeline.rules.reference import find_rule, load_rule
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.plan import plan_training
from pipeline.work.plan import read_plan
from tests.support.networks import save_fresh_rule, save_network


@pytest.fixture
def registry(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "models")


@pytest.fixture
def versions(registry: Storage, tmp_path: Path) -> list[Version]:
    """Two predictors and a rule; `champion` is the first, `rule` the third."""
    found = [publish(registry, str(save_network(tmp_path / f"{seed}.safetensors", seed=seed))) for seed in range(2)]
    found.append(publish(registry, str(save_fresh_rule(tmp_path / "r.safetensors"))))
    promote(registry, "champion", found[0], "begin")
    promote(registry, "rule", found[2], "begin")
    return found


@pytest.mark.parametrize(
    ("text", "location", "name"),
    [
        ("registry:///srv/models/champion", "/srv/models", "champion"),
        ("registry://s3://bucket/models/champion", "s3://bucket/models", "champion"),
        ("registry://s3://bucket/@1f3a", "s3://bucket", "@1f3a"),
        ("registry:///srv/models/champion/", "/srv/models", "champion"),
    ],
)
def test_a_name_has_a_location_and_a_name(text: str, location: str, name: str) -> None:
    found = parse_name(text)
    assert found is not None
    assert (found.registry.uri(), found.name) == (location, name)


def test_a_relative_location_is_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = parse_name("registry://models/champion")
    assert found is not None
    assert found.registry.uri() == str(tmp_path / "models")


@pytest.mark.parametrize("text", ["registry://", "registry://champion", "registry:///champion", "registry:///"])
def test_a_name_without_location_says_how_to_write_it(text: str) -> None:
    with pytest.raises(RegistryError, match="write registry://LOCATION/NAME"):
        parse_name(text)


def test_files_and_built_in_names_are_no_names_of_a_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIR_REGISTRY", str(tmp_path))
    for text in (
        "grid",
        "compact",
        "grow",
        "adam",
        "shipped",
        "auto",
        "run/best.safetensors",
        "x.safetensors",
        "run/x",
    ):
        assert parse_name(text) is None
    monkeypatch.delenv("AIR_REGISTRY")
    assert parse_name("champion") is None


def test_predictors_and_rules_are_found_by_alias_and_by_checksum(
    registry: Storage, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _, rule = versions
    for name in (f"registry://{registry.uri()}/champion", f"registry://{registry.uri()}/@{network.short}"):
        assert find_predictor(name).sha256 == network.sha256
    monkeypatch.setenv("AIR_REGISTRY", registry.uri())
    assert find_predictor("champion").name == weights_uri(registry, network)
    assert find_predictor(f"@{network.id[:6]}").model == network.model
    reference = find_rule("rule")
    assert (reference.sha256, reference.model) == (rule.sha256, rule.model)
    load_rule(reference)


def test_names_that_do_not_exist_list_those_that_do(
    registry: Storage, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"a name of a registry is registry://LOCATION/NAME.* with AIR_REGISTRY"):
        find_predictor("champion")
    with pytest.raises(CheckpointError, match=r"unknown update rule 'best'.*; a name of a registry"):
        find_rule("best")
    monkeypatch.setenv("AIR_REGISTRY", registry.uri())
    with pytest.raises(
        CheckpointError, match=r"no alias 'champoin' \(did you mean 'champion'\?\); it has champion, rule"
    ):
        find_predictor("champoin")
    with pytest.raises(CheckpointError, match=r"has no version @00000000.*; it has @"):
        find_predictor("@00000000")
    with pytest.raises(CheckpointError, match=r"champion is a predictor \(compact:.*, and not an update rule"):
        find_rule("champion")
    with pytest.raises(CheckpointError, match=r"rule is an update rule \(rule:.*, and not a predictor"):
        find_predictor("rule")
    with pytest.raises(CheckpointError, match="is no registry"):
        find_predictor(f"registry://{registry.uri()}-2/champion")


def test_a_removed_champion_says_what_to_do(registry: Storage, versions: list[Version]) -> None:
    registry.delete(f"versions/{versions[0].id}/version.json")
    with pytest.raises(RegistryError, match=f"champion of .* was @{versions[0].short}, which is no longer there"):
        named_version(registry, "champion")


@pytest.fixture
def targets(shards: Path, registry: Storage, versions: list[Version], tmp_path: Path) -> Path:
    """Targets that were made with the champion of that time; then the other network became champion."""
    make_targets(shards, tmp_path / "targets", registry)
    promote(registry, "champion", versions[1], "better")
    return tmp_path / "targets"


def make_targets(shards: Path, out: Path, registry: Storage, name: str = "champion") -> None:
    config = DistillConfig(
        predictor=f"registry://{registry.uri()}/{name}", patch_size=5, stages=1, joint_steps=1, views=1
    )
    distill(str(shards), str(out), config, RunnerConfig(executor="inline"))


def test_a_plan_pins_what_an_alias_stood_for_and_the_job_goes_on_with_it(
    shards: Path, targets: Path, registry: Storage, versions: list[Version], caplog: pytest.LogCaptureFixture
) -> None:
    plan = read_plan(open_storage(targets))
    assert plan.config["predictor"] == f"{versions[0].model}, sha256 {versions[0].sha256}"
    manifest = next((targets / "manifest").iterdir())
    manifest.unlink()
    with caplog.at_level(logging.WARNING):
        make_targets(shards, targets, registry)
    assert manifest.exists()
    assert f"goes on with @{versions[0].short}, which champion was" in caplog.text
    assert f"it is @{versions[1].short} now" in caplog.text


def test_a_new_folder_gets_what_the_alias_stands_for_now(
    shards: Path, targets: Path, registry: Storage, versions: list[Version], tmp_path: Path
) -> None:
    make_targets(shards, tmp_path / "new", registry)
    assert versions[1].sha256 in read_plan(open_storage(tmp_path / "new")).config["predictor"]


def test_another_version_by_checksum_or_by_another_alias_is_another_plan(
    shards: Path, targets: Path, registry: Storage, versions: list[Version]
) -> None:
    with pytest.raises(PlanMismatchError, match="predictor"):
        make_targets(shards, targets, registry, f"@{versions[1].short}")
    promote(registry, "other", versions[1], "an alias that never was the planned version")
    with pytest.raises(PlanMismatchError, match="predictor"):
        make_targets(shards, targets, registry, "other")


def test_a_pinned_version_that_was_removed_is_named(targets: Path, registry: Storage, versions: list[Version]) -> None:
    assert remove_version(registry, versions[0], keep=0)
    with pytest.raises(CheckpointError, match=f"was @{versions[0].short}, which is no longer there"):
        locate(f"registry://{registry.uri()}/champion", "predictor", open_storage(targets), "predictor")


def plan_encoding(shards: Path, out: Path, name: str) -> None:
    encode([str(shards)], str(out), EncodeConfig.model_validate({"predictor": name, **STEPS}), INLINE)


def plan_a_training(shards: Path, out: Path, name: str) -> None:
    config = TrainConfig.model_validate({"from": name, "patch_size": 5, "stages": 2, "valid_images": 1})
    plan_training(str(shards), str(out), config, TrainerConfig.model_validate({"executor": "inline"}), str(shards))


def plan_a_rule(shards: Path, out: Path, name: str) -> None:
    config = RuleConfig.model_validate({"from": name, "valid_images": 1})
    plan_rule([str(shards)], str(out), config, str(shards))


INLINE = RunnerConfig.model_validate({"executor": "inline"})
STEPS = {"steps": 0, "stored_steps": 0}


@pytest.mark.parametrize(
    ("make", "alias", "key"),
    [(plan_encoding, "champion", "predictor"), (plan_a_training, "champion", "from_"), (plan_a_rule, "rule", "from_")],
)
def test_every_kind_of_plan_pins_what_an_alias_stood_for(
    make: Callable[[Path, Path, str], None],
    alias: str,
    key: str,
    shards: Path,
    registry: Storage,
    versions: list[Version],
    tmp_path: Path,
) -> None:
    name, out = f"registry://{registry.uri()}/{alias}", tmp_path / "out"
    make(shards, out, name)
    pinned = read_plan(open_storage(out)).config[key]
    assert pinned.endswith(f", sha256 {versions[0 if alias == 'champion' else 2].sha256}")
    other = publish(registry, str(save_fresh_rule(tmp_path / "other.safetensors", seed=1)))
    promote(registry, alias, versions[1] if alias == "champion" else other, "better")
    make(shards, out, name)
    assert read_plan(open_storage(out)).config[key] == pinned
    make(shards, tmp_path / "new", name)
    assert read_plan(open_storage(tmp_path / "new")).config[key] != pinned
