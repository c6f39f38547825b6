"""Configuration: bounded pydantic models, one per job, read from one YAML file with a section per job.

A section's keys are exactly the options of the command with that name. This module knows how to read and to complain;
which keys exist is said beside the code that uses them.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, numbers are finite, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, values: Any) -> Any:
        """`steps: 50` in YAML, as `--steps 50` on the command line."""
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is tuple}
        return {
            key: (value,) if key in lists and isinstance(value, int | float) else value for key, value in values.items()
        }


class RunnerConfig(Config):
    """Where and how work runs. Nothing here changes a result, so nothing here belongs to a plan."""

    executor: Literal["ray", "inline"] = Field("ray", description="run on Ray, or one shard after another in-process")
    address: str | None = Field(None, description="existing Ray cluster, such as `auto` or ray://host:10001")
    workers: int | None = Field(None, ge=1, le=100_000, description="most shards at work at once; default: what fits")
    num_cpus: float = Field(1.0, gt=0, le=1024, description="CPU cores per shard at work")
    num_gpus: float = Field(0.0, ge=0, le=64, description="GPUs per shard at work; 0.5 is half of one")
    memory_mb: int | None = Field(None, ge=1, description="memory per shard at work that Ray reserves, in MB")
    max_attempts: int = Field(4, ge=1, le=100, description="times a shard is tried before it counts as failed")
    max_bad_share: float = Field(0.5, ge=0, le=1, description="stop above this share of images in quarantine")
    straggler_factor: float = Field(
        4.0, gt=1, le=1000, description="run a shard twice after this many times the 95th percentile of durations"
    )


ConfigT = TypeVar("ConfigT", bound=Config)

RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {
    "distill": {"rate": "learning_rate_factor"},
    "evaluate": {"rate": "learning_rate_factor"},
    "fit": {"rate": "learning_rate_factor"},
    "train": {
        "average": "ema_decay",
        "clip": "max_grad_norm",
        "final_share": "final_fraction",
        "horizon_rate": "horizon_learning_rate_factor",
        "rate": "learning_rate",
    },
}
"""Former names of keys and options, by section. They are not read: the error about one gives the new name."""


def build(
    model: type[ConfigT], values: Mapping[str, Any], where: str, renamed: Mapping[str, str] | None = None
) -> ConfigT:
    """Validates `values` and returns them as a `model`.

    Args:
        model: The class of the configuration.
        values: By key.
        where: The section or file that holds the values; messages begin with it.
        renamed: The new name of each key that has a former name.

    Raises:
        ConfigError: A key is unknown, or a value is out of bounds. For an unknown key the message gives its new name
            if the key was renamed, or else the nearest known key.
    """
    try:
        return model.model_validate({str(key): value for key, value in values.items()})
    except ValidationError as error:
        problems = [_describe(problem, model.model_fields, renamed or {}) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def _describe(problem: Any, known: Iterable[str], renamed: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        if key in renamed:
            return f"unknown key '{key}': it is now called '{renamed[key]}'"
        return f"unknown key '{key}'{suggestion(key, known)}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    # A model's own validator speaks of several keys, and names them.
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}" if key else message


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def read_sections(file: str | Path, sections: Mapping[str, type[Config]]) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file, every one of them checked, whichever job asked.

    Raises:
        ConfigError: The file is missing, is not YAML, or has a section or key that nobody knows.
    """
    try:
        document = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    document = {} if document is None else document
    if not isinstance(document, dict):
        raise ConfigError(
            f"{file} must be a mapping of sections ({', '.join(sections)}), not {type(document).__name__}"
        )
    for name, values in document.items():
        if name not in sections:
            raise ConfigError(f"{file}: unknown section '{name}'{suggestion(str(name), sections)}")
        if not isinstance(values, dict | None):
            raise ConfigError(f"{file}: section '{name}' must be a mapping of keys")
        build(sections[name], values or {}, f"{file}, section '{name}'", RENAMED_KEYS.get(name))
    return {name: values or {} for name, values in document.items()}
