"""Aliases move by compare-and-swap, keep their history, and never point to what was removed."""

import threading
from pathlib import Path

import pytest

from pipeline.errors import DamagedDataError, RegistryError
from pipeline.registry import aliases
from pipeline.registry.aliases import (
    alias_names,
    existing_move,
    history,
    newest_move,
    promote,
    roll_back,
    round_move,
)
from pipeline.registry.gc import find_garbage, needed_versions, remove_attempt, remove_version
from pipeline.registry.versions import Version, find_version, publish, version_ids, version_path
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from tests.support.networks import save_network

DAY = 24 * 3600.0


@pytest.fixture
def registry(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "registry")


@pytest.fixture
def versions(registry: Storage, tmp_path: Path) -> list[Version]:
    """Four published versions, of which no alias knows."""
    return [publish(registry, str(save_network(tmp_path / f"{seed}.safetensors", seed=seed))) for seed in range(4)]


def points_to(registry: Storage, alias: str = "champion") -> str:
    return existing_move(registry, alias).version


def test_a_promotion_says_who_when_why_from_and_to(registry: Storage, versions: list[Version]) -> None:
    first = promote(registry, "champion", versions[0], "the first one").move
    second = promote(registry, "champion", versions[1], "better", round_id="7").move
    assert history(registry, "champion") == [first, second]
    assert [(move.before, move.version, move.why, move.round) for move in (first, second)] == [
        (None, versions[0].id, "the first one", ""),
        (versions[0].id, versions[1].id, "better", "7"),
    ]
    assert "@" in first.who
    assert first.when <= second.when
    assert alias_names(registry) == ["champion"]


def test_a_promotion_to_where_the_alias_is_adds_nothing(registry: Storage, versions: list[Version]) -> None:
    promote(registry, "champion", versions[0], "once")
    again = promote(registry, "champion", versions[0], "twice")
    assert not again.moved
    assert again.move.why == "once"
    assert len(history(registry, "champion")) == 1


def test_what_the_caller_expects_must_hold(registry: Storage, versions: list[Version]) -> None:
    promote(registry, "champion", versions[0], "new", expect="none")
    with pytest.raises(RegistryError, match="and not to none as expected"):
        promote(registry, "champion", versions[1], "new", expect="none")
    with pytest.raises(
        RegistryError, match=rf"points to {versions[0].short} .*: new\), and not to {versions[2].short}"
    ):
        promote(registry, "champion", versions[1], "better", expect=versions[2].id)
    for nothing in ("", "@"):
        with pytest.raises(RegistryError, match="as expected"):
            promote(registry, "champion", versions[1], "better", expect=nothing)
    with pytest.raises(RegistryError, match="does not exist, and not to"):
        promote(registry, "candidate", versions[1], "better", expect=versions[0].id)
    promote(registry, "champion", versions[1], "better", expect=f"@{versions[0].sha256}")
    promote(registry, "champion", versions[2], "better", expect=versions[1].id[:6])
    assert len(history(registry, "champion")) == 3


def test_of_promotions_at_once_that_expect_the_same_one_succeeds(registry: Storage, versions: list[Version]) -> None:
    promote(registry, "champion", versions[0], "begin")
    start = threading.Barrier(6)
    outcomes: list[str] = []

    def work(number: int) -> None:
        start.wait()
        version = versions[1 + number % 3]
        try:
            outcomes.append(promote(registry, "champion", version, f"{number}", expect=versions[0].id).move.version)
        except RegistryError:
            outcomes.append("refused")

    run_threads(work, 6)
    assert outcomes.count("refused") >= 4  # two threads want each version: both may be content with one entry
    moves = history(registry, "champion")
    assert len(moves) == 2
    assert {outcome for outcome in outcomes if outcome != "refused"} == {moves[1].version}


def test_promotions_at_once_without_expectation_all_happen_in_some_order(
    registry: Storage, versions: list[Version]
) -> None:
    run_threads(lambda number: promote(registry, "champion", versions[number], f"{number}"), 4)
    moves = history(registry, "champion")
    assert sorted(move.version for move in moves) == sorted(version.id for version in versions)
    assert [move.before for move in moves[1:]] == [move.version for move in moves[:-1]]


def run_threads(work, count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_round_promotes_once_even_after_a_rollback(registry: Storage, versions: list[Version]) -> None:
    promote(registry, "champion", versions[0], "begin")
    first = promote(registry, "champion", versions[1], "better", expect=versions[0].id, round_id="r1")
    again = promote(registry, "champion", versions[1], "better", expect=versions[0].id, round_id="r1")
    assert (again.move, again.moved) == (first.move, False)
    roll_back(registry, "champion", "worse")
    assert not promote(registry, "champion", versions[1], "better", expect=versions[0].id, round_id="r1").moved
    assert points_to(registry) == versions[0].id
    assert round_move(registry, "champion", "r1") == first.move
    assert round_move(registry, "champion", "r2") is None


def test_rollbacks_go_back_one_promotion_each(registry: Storage, versions: list[Version]) -> None:
    for version in versions[:3]:
        promote(registry, "champion", version, "better")
    assert roll_back(registry, "champion", "worse").move.version == versions[1].id
    assert roll_back(registry, "champion", "still worse").move.version == versions[0].id
    with pytest.raises(RegistryError, match="nothing to go back to"):
        roll_back(registry, "champion", "still")
    promote(registry, "champion", versions[3], "a new try")
    assert roll_back(registry, "champion", "worse").move.version == versions[0].id
    assert [move.why for move in history(registry, "champion")][-3:] == ["still worse", "a new try", "worse"]


def test_a_rollback_of_an_alias_that_moved_meanwhile_is_refused(registry: Storage, versions: list[Version]) -> None:
    for version in versions[:2]:
        promote(registry, "champion", version, "better")
    with pytest.raises(RegistryError, match="another process has moved it"):
        roll_back(registry, "champion", "worse", expect=versions[0].id)
    with pytest.raises(RegistryError, match=r"no alias 'champoin' \(did you mean 'champion'\?\); it has champion"):
        roll_back(registry, "champoin", "worse")


@pytest.mark.parametrize("alias", ["compact", "adam", "grow", "none", "@abc", "Champion", "a/b", "", "../x", "1a"])
def test_names_that_mean_something_else_are_no_aliases(registry: Storage, versions: list[Version], alias: str) -> None:
    with pytest.raises(RegistryError, match="cannot be an alias"):
        promote(registry, alias, versions[0], "reason")
    assert alias_names(registry) == []


def test_a_move_needs_a_reason_and_an_existing_version(registry: Storage, versions: list[Version]) -> None:
    with pytest.raises(RegistryError, match="reason is empty"):
        promote(registry, "champion", versions[0], " ")
    registry.delete(version_path(versions[0].id))
    with pytest.raises(RegistryError, match="no longer has the version"):
        promote(registry, "champion", versions[0], "reason")
    assert newest_move(registry, "champion") is None


def test_a_damaged_entry_is_named(registry: Storage, versions: list[Version]) -> None:
    promote(registry, "champion", versions[0], "reason")
    for nonsense in (b"{", b"[1]", b"{}", b'{"version": 3}'):
        registry.write("aliases/champion/000000000001.json", nonsense)
        with pytest.raises(DamagedDataError, match=r"000000000001\.json is not an entry"):
            newest_move(registry, "champion")


def test_gc_keeps_what_aliases_and_their_new_history_name(registry: Storage, versions: list[Version]) -> None:
    for version in versions[:3]:
        promote(registry, "champion", version, "better")
    ids = [version.id for version in versions]
    assert needed_versions(registry, keep=0) == {ids[2]}
    assert needed_versions(registry, keep=1) == {ids[2], ids[1]}  # the newest entry says where it came from
    assert [v.id for v in find_garbage(registry, 1, 0.0).versions] == sorted([ids[0], ids[3]])
    assert find_garbage(registry, 1, DAY).versions == ()
    assert [v.id for v in find_garbage(registry, 5, 0.0).versions] == [ids[3]]
    promote(registry, "candidate", versions[3], "next")
    assert find_garbage(registry, 5, 0.0).versions == ()


def test_gc_removes_all_files_of_a_version_and_nothing_else(registry: Storage, versions: list[Version]) -> None:
    promote(registry, "champion", versions[0], "begin")
    assert remove_version(registry, versions[1], 5)
    assert version_ids(registry) == sorted(version.id for version in versions if version is not versions[1])
    assert not [path for path, _ in registry.list() if versions[1].id in path]
    assert not remove_version(registry, versions[0], 0)
    assert find_version(registry, versions[0].id) == versions[0]
    for file in versions[0].files:
        assert registry.size(file.path) == file.bytes


def test_a_version_that_gets_an_alias_while_gc_removes_it_is_kept(
    registry: Storage, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promotion looked for the version before `version.json` went, and appends before the aliases are read."""
    promote(registry, "champion", versions[0], "begin")
    present = aliases._check_present

    def remove_meanwhile(storage: Storage, identity: str) -> None:
        present(storage, identity)
        storage.delete(version_path(identity))

    with monkeypatch.context() as patch:
        patch.setattr(aliases, "_check_present", remove_meanwhile)
        patch.setattr(aliases, "_check_kept", lambda *arguments: None)
        promote(registry, "champion", versions[1], "better")
    assert not remove_version(registry, versions[1], 0)
    assert find_version(registry, versions[1].id) == versions[1]


def test_a_promotion_to_a_version_that_is_removed_meanwhile_is_taken_back(
    registry: Storage, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gc has read the aliases before the promotion appends, so it removes the version, and the promotion sees that."""
    promote(registry, "champion", versions[0], "begin")
    present = aliases._check_present

    def remove_meanwhile(storage: Storage, identity: str) -> None:
        present(storage, identity)
        assert remove_version(storage, versions[1], 0)

    monkeypatch.setattr(aliases, "_check_present", remove_meanwhile)
    with pytest.raises(RegistryError, match="no longer has the version"):
        promote(registry, "champion", versions[1], "better", round_id="r")
    assert points_to(registry) == versions[0].id
    monkeypatch.undo()
    assert find_version(registry, versions[0].id)
    with pytest.raises(RegistryError, match="no longer has"):  # not "promoted already"
        promote(registry, "champion", versions[1], "better", round_id="r")


def test_gc_removes_old_publications_that_were_not_completed(registry: Storage, versions: list[Version]) -> None:
    killed = f"versions/{versions[0].id}/20200101T000000Z-0123abcd"
    young = f"versions/{'0' * 16}/29990101T000000Z-0123abcd"
    for folder in (killed, young):
        registry.write(f"{folder}/predictor.safetensors", b"half")
    registry.write("versions/notes.txt", b"not ours")
    garbage = find_garbage(registry, 5, DAY)
    assert garbage.attempts == (killed,)
    assert remove_attempt(registry, killed)
    assert find_garbage(registry, 5, DAY).attempts == ()
    assert registry.exists(f"{young}/predictor.safetensors")
    assert registry.exists("versions/notes.txt")
    completed = versions[1].weights.rsplit("/", 1)[0]
    assert not remove_attempt(registry, completed)
    assert registry.exists(versions[1].weights)
