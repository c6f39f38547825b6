"""Keeps weights in a registry: versions that never change, and aliases such as `champion`, with the history of both.

REGISTRY is a folder, a local path or a URI. A version is named @ and the first digits of its checksum. Where a command
takes a predictor or an update rule, it also takes registry://REGISTRY/champion and registry://REGISTRY/@DIGITS, or
`champion` and @DIGITS of the registry that the environment variable AIR_REGISTRY names.

  air registry add REGISTRY run/best.safetensors --evidence figures.parquet
  air registry promote REGISTRY @1f3a9c0b --reason "0.3 dB more on the frozen set"
  air registry list REGISTRY
  air registry show REGISTRY champion
  air registry rollback REGISTRY --reason "faces look worse"
  air registry gc REGISTRY

`air registry ACTION --help` shows the options of an action.
"""

from __future__ import annotations

import argparse
import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jobs.command import make_parser
from jobs.report import counted, print_table
from pipeline.errors import ConfigError
from pipeline.registry.aliases import (
    CHAMPION,
    NONE,
    Promotion,
    alias_names,
    existing_move,
    history,
    newest_move,
    promote,
    roll_back,
)
from pipeline.registry.gc import find_garbage, remove_attempt, remove_version
from pipeline.registry.names import named_version
from pipeline.registry.versions import SHOWN_DIGITS, publish, read_versions, weights_uri
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.storage.uri import normalise
from pipeline.work.holder import spoken

KEPT_MOVES, KEPT_DAYS = 5, 7.0
"""What `gc` keeps by default: versions of so many newest entries of a history, and all that are younger."""

_DAY = 24 * 3600.0


def main(arguments: Sequence[str]) -> int:
    """The command."""
    if not arguments or arguments[0] not in ACTIONS:
        parser = make_parser("registry", __doc__)
        parser.add_argument("action", choices=list(ACTIONS), metavar="ACTION", help=", ".join(ACTIONS))
        parser.add_argument("registry", metavar="REGISTRY", help="folder of the registry; a local path or a URI")
        parser.parse_args(arguments)
        parser.error(f"give one of the actions {', '.join(ACTIONS)} first")
    name, *rest = arguments
    action = ACTIONS[name]
    parser = make_parser(f"registry {name}", action.about)
    parser.add_argument("registry", metavar="REGISTRY", help="folder of the registry; a local path or a URI")
    if action.add_options is not None:
        action.add_options(parser)
    given = parser.parse_args(rest)
    return action.run(open_storage(given.registry), given)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="NAME.safetensors, with its card beside it; a local path or a URI")
    parser.add_argument(
        "--evidence",
        metavar="FILE",
        action="append",
        default=[],
        help="a file that says why to trust the weights, such as the table of `air evaluate`; may be repeated",
    )


def _add(registry: Storage, given: argparse.Namespace) -> int:
    evidence = {posixpath.basename(normalise(file)): file for file in given.evidence}
    if len(evidence) < len(given.evidence):
        raise ConfigError("two pieces of evidence have the same file name; rename one of them")
    version = publish(registry, given.file, evidence)
    print(f"@{version.short} is {version.model}, published {spoken(version.published)} by {version.by}")
    print(weights_uri(registry, version))
    return 0


def _list(registry: Storage, given: argparse.Namespace) -> int:
    moves = {alias: newest_move(registry, alias) for alias in alias_names(registry)}
    rows = [
        (
            f"@{version.short}",
            ", ".join(alias for alias, move in moves.items() if move and move.version == version.id) or "-",
            version.model,
            spoken(version.published),
            version.by,
            _figures(version.figures),
        )
        for version in sorted(read_versions(registry), key=lambda version: version.published)
    ]
    if not rows:
        print(f"{given.registry} holds no version; `air registry add` adds one")
        return 0
    print_table(given.registry, ("version", "aliases", "weights", "published", "by", "figures"), rows)
    return 0


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", default=CHAMPION, metavar="NAME", help="an alias, or @DIGITS (default: champion)"
    )


def _show(registry: Storage, given: argparse.Namespace) -> int:
    version = named_version(registry, given.name)
    rows: list[tuple[str, object]] = [
        ("version", f"@{version.short}"),
        ("kind", version.kind),
        ("weights", version.model),
        ("published", f"{spoken(version.published)} by {version.by}"),
        ("sha256", version.sha256),
        ("figures", _figures(version.figures)),
        *(("file", f"{file.path} ({counted(file.bytes, 'byte')})") for file in version.files),
    ]
    print_table(f"{given.name} of {given.registry}", ("", ""), rows)
    print(weights_uri(registry, version))
    if not given.name.startswith("@"):
        print_table(
            f"history of {given.name}",
            ("", "from", "to", "when", "by", "why"),
            [
                (
                    move.number,
                    f"@{move.before[:SHOWN_DIGITS]}" if move.before else "-",
                    f"@{move.version[:SHOWN_DIGITS]}",
                    spoken(move.when),
                    move.who,
                    move.why,
                )
                for move in history(registry, given.name)
            ],
        )
    return 0


def _promote_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the version to promote: @DIGITS, or another alias")
    _move_options(parser)


def _promote(registry: Storage, given: argparse.Namespace) -> int:
    version = named_version(registry, given.name)
    _tell(given.alias, promote(registry, given.alias, version, given.reason, given.expect))
    return 0


def _move_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", required=True, metavar="TEXT", help="why, for the history")
    parser.add_argument("--alias", default=CHAMPION, metavar="NAME", help=f"the alias that moves (default: {CHAMPION})")
    parser.add_argument(
        "--expect",
        metavar="VERSION",
        help=f"move only if the alias is @DIGITS now, or `{NONE}` if it must not exist (default: wherever it is)",
    )


def _roll_back(registry: Storage, given: argparse.Namespace) -> int:
    existing_move(registry, given.alias)
    _tell(given.alias, roll_back(registry, given.alias, given.reason, given.expect))
    return 0


def _tell(alias: str, promotion: Promotion) -> None:
    move = promotion.move
    if not promotion.moved:
        print(f"{alias} is @{move.version[:SHOWN_DIGITS]} already, since {spoken(move.when)}")
        return
    before = f"@{move.before[:SHOWN_DIGITS]}" if move.before else "nothing"
    print(f"{alias}: {before} -> @{move.version[:SHOWN_DIGITS]}")


def _gc_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep",
        type=_number(int, 0),
        default=KEPT_MOVES,
        metavar="N",
        help=f"newest entries of each alias's history whose versions stay (default: {KEPT_MOVES})",
    )
    parser.add_argument(
        "--days",
        type=_number(float, 0),
        default=KEPT_DAYS,
        metavar="X",
        help=f"what was published less than so many days ago stays (default: {KEPT_DAYS:g})",
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be removed")


def _gc(registry: Storage, given: argparse.Namespace) -> int:
    garbage = find_garbage(registry, given.keep, given.days * _DAY)
    for version in garbage.versions:
        print(f"@{version.short}  {version.model}, published {spoken(version.published)} by {version.by}")
    for attempt in garbage.attempts:
        print(f"{attempt}  a publication that was not completed")
    if given.dry_run:
        print(f"would remove {_counts(len(garbage.versions), len(garbage.attempts))}")
        return 0
    versions = [version for version in garbage.versions if remove_version(registry, version, given.keep)]
    attempts = [attempt for attempt in garbage.attempts if remove_attempt(registry, attempt)]
    for version in garbage.versions:
        if version not in versions:
            print(f"kept @{version.short}, which has got an alias meanwhile")
    print(f"removed {_counts(len(versions), len(attempts))}")
    return 0


def _counts(versions: int, attempts: int) -> str:
    return f"{counted(versions, 'version')} and {counted(attempts, 'incomplete publication')}"


def _number(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value < 1e6:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least:g} or more")
        return value

    return parse


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items()) or "-"


class Action(NamedTuple):
    """One action of the command: what it does, its options, and the function that does it."""

    about: str
    add_options: Callable[[argparse.ArgumentParser], None] | None
    run: Callable[[Storage, argparse.Namespace], int]


ACTIONS: Mapping[str, Action] = {
    "add": Action(
        "Publishes weights. The same weights again are the same version; no alias moves.", _add_options, _add
    ),
    "list": Action("Lists all versions, the oldest first, and the aliases that point to them.", None, _list),
    "show": Action("Shows a version; of an alias, also who moved it, when and why.", _show_options, _show),
    "promote": Action(
        "Moves an alias to a version by compare-and-swap, and keeps the reason in its history.",
        _promote_options,
        _promote,
    ),
    "rollback": Action(
        "Moves an alias back to where it was before its last promotion. Again, it goes back one promotion more.",
        _move_options,
        _roll_back,
    ),
    "gc": Action(
        "Removes versions that no alias points to and no new entry of a history names, and incomplete publications.",
        _gc_options,
        _gc,
    ),
}
