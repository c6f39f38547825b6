"""Command lines made from configuration models: every key of a job's section is an option, which wins over the file.

parser = make_parser("shard", __doc__, ShardConfig, RunnerConfig)
...
arguments = parser.parse_args(argv)
config, runner = configure(arguments, shard=ShardConfig, runner=RunnerConfig)

`check_command` does as much of a command and stops there.
"""

import argparse
import json
import logging
import types
import typing
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from jobs.sections import sections
from pipeline import logs
from pipeline.config import RENAMED_KEYS, Config, build, is_list, read_sections, suggestion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A command line that its command takes.

    Attributes:
        positionals: The values without an option, in order: inputs and outputs.
        configs: The configurations, built of the file and the options; none if the command has none.
        options: All values that the command line gives, by the option's key.
        flags: Every option that the command has, such as `--config`.
    """

    positionals: tuple[str, ...]
    configs: tuple[Config, ...]
    options: Mapping[str, Any]
    flags: frozenset[str]


@dataclass
class _Check:
    """What a check has found so far."""

    positionals: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()

    def accept(self, given: argparse.Namespace, configs: Sequence[Config]) -> NoReturn:
        raise _Accepted(Checked(self.positionals, tuple(configs), vars(given), self.flags))


class _Accepted(Exception):
    """The end of a check: everything on the command line is right."""

    def __init__(self, checked: Checked) -> None:
        super().__init__()
        self.checked = checked


_checking: ContextVar[_Check | None] = ContextVar("checking", default=None)
"""The check that is going on; None while commands run."""


def check_command(command: str, arguments: Sequence[str]) -> Checked:
    """Checks a command line with the command's own parser and configurations, and does not run it.

    Args:
        command: The command, such as `distill`.
        arguments: What follows the command.

    Raises:
        SystemExit: An option is unknown or a value is missing, as the parser has said on stderr; or `--help`.
        ConfigError: A key or a value is wrong.
    """
    before = _checking.set(_Check())
    try:
        import_module(f"jobs.{command.replace('-', '_')}").main(arguments)
    except _Accepted as accepted:
        return accepted.checked
    finally:
        _checking.reset(before)
    raise RuntimeError(f"air {command} parses its arguments without make_parser and configure of jobs.command")


class _Parser(argparse.ArgumentParser):
    """Explains a wrong option in a line or two, and names the option that was meant.

    Attributes:
        renamed: The new name of each key that has a former name.
        configured: Whether the command calls `configure` with what was parsed.
    """

    renamed: Mapping[str, str] = {}
    configured = False

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        given = super().parse_args(*args, **kwargs)
        check = _checking.get()
        if check is not None:
            values = [getattr(given, action.dest, None) for action in self._get_positional_actions()]
            lists = [value if isinstance(value, list) else [value] for value in values]
            check.positionals = tuple(text for texts in lists for text in texts if isinstance(text, str))
            check.flags = frozenset(self._option_string_actions)
            if not self.configured:
                check.accept(given, ())
        return given

    def error(self, message: str) -> NoReturn:
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        hint = ""
        if "unrecognized" in message and unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            hint = self._hint(unknown[0])
        logger.error("%s: %s%s\nSee `%s --help`.", self.prog, message, hint, self.prog)
        self.exit(2)

    def _hint(self, flag: str) -> str:
        key = flag.removeprefix("--").replace("-", "_")
        if key in self.renamed:
            return f" ({flag} is now called {_flag(self.renamed[key])})"
        return suggestion(flag, self._option_string_actions)


def option_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value that a command line gives an option, before it is parsed; None if it does not give the option.

    A command whose option chooses between two sets of options looks here which parser to make.
    """
    value = None
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, given = word.partition("=")
        if name == flag:
            value = given if equals else following
    return value


def make_parser(command: str, description: str | None, *models: type[Config]) -> argparse.ArgumentParser:
    """A parser with `--log-format`, `--config` and an option for every field of the models."""
    parser = _Parser(
        prog=f"air {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.renamed = RENAMED_KEYS.get(command, {})
    parser.configured = bool(models)
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        default=logs.FORMATS[0],
        help="form of the lines on stderr: text for people, or json, a line for each event (default: %(default)s)",
    )
    if models:
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file with values for these options; options given here win"
        )
    for model in models:
        title = "where and how it runs" if model.__name__ in ("RunnerConfig", "TrainerConfig") else "what it does"
        group = parser.add_argument_group(title)
        for name, field in model.model_fields.items():
            _add_option(group, name, field)
    return parser


def _add_option(group: Any, name: str, field: FieldInfo) -> None:
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    kind = _plain(field.annotation)
    text = f"{field.description} ({_bounds(field)}default: {_shown(field.default)})"
    options["help"] = text.replace("%", "%%")
    flag = _flag(field.alias or name)
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif typing.get_origin(kind) is typing.Literal:
        group.add_argument(flag, choices=typing.get_args(kind), **options)
    elif is_list(kind):
        metavar = "TEXT,TEXT,..." if typing.get_args(kind)[0] is str else "N,N,..."
        group.add_argument(flag, type=lambda text: tuple(text.split(",")), metavar=metavar, **options)
    elif typing.get_origin(kind) is dict:
        group.add_argument(flag, type=_mapping, metavar="JSON", **options)
    else:
        metavar = {int: "N", float: "X"}.get(kind, "TEXT")
        group.add_argument(flag, metavar=metavar, **options)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _mapping(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"name\": 1}}'")
    return value


def _plain(annotation: Any) -> Any:
    """The type without `| None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [
        f"{sign} {_shown(getattr(bound, name))}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return " and ".join(parts) + "; " if parts else ""


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def configure(arguments: argparse.Namespace, **models: type[Config]) -> list[Any]:
    """One configuration per section: the file's keys, overridden by the options on the command line.

    Args:
        arguments: Parsed by `make_parser`.
        models: Configuration classes by the section of the file that holds them.

    Raises:
        ConfigError: A key is unknown, or a value is out of bounds.
    """
    file = read_sections(arguments.config, sections()) if arguments.config else {}
    built = []
    for section, model in models.items():
        values = dict(file.get(section, {}))
        values.update(
            {
                field.alias or name: getattr(arguments, name)
                for name, field in model.model_fields.items()
                if hasattr(arguments, name)
            }
        )
        built.append(build(model, values, section))
    check = _checking.get()
    if check is not None:
        check.accept(arguments, built)
    return built
