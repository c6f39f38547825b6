"""Configuration: bounded pydantic models, one per job, read from one YAML file with a section per job.

A section's keys are exactly the options of the command with that name. This module reads, checks and explains what is
wrong; each job declares its keys beside the code that uses them. Here are only those that several jobs have.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from air.stages.control import StageControl

Number = TypeVar("Number", bound=int | float)


class PerStage(tuple[Number, ...]):
    """One number for each stage, at least one; the last one holds for all further stages.

    A field is declared as `PerStage[int]`, or with bounds as `PerStage[Annotated[int, Field(ge=0)]]`. It takes a list
    or a single number, and is written to JSON as a list.
    """

    def at(self, stage: int) -> Number:
        """The number of a stage, counted from 0."""
        return self[min(stage, len(self) - 1)]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        numbers = core_schema.tuple_variable_schema(handler.generate_schema(get_args(source)[0]), min_length=1)
        return core_schema.no_info_after_validator_function(cls, numbers)


def is_list(annotation: Any) -> bool:
    """Whether a field of that type takes several values."""
    return get_origin(annotation) in (tuple, PerStage)


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, numbers are finite, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, values: Any) -> Any:
        """Takes `steps: 50` in YAML for `steps: [50]`, as the command line takes `--steps 50`."""
        if not isinstance(values, dict):
            return values
        lists = {name: field.annotation for name, field in cls.model_fields.items() if is_list(field.annotation)}

        def is_item(key: Any, value: Any) -> bool:
            return key in lists and isinstance(value, str if get_args(lists[key])[0] is str else int | float)

        return {key: (value,) if is_item(key, value) else value for key, value in values.items()}


_Level = Annotated[int, Field(ge=0, le=255)]
Background = Annotated[
    tuple[_Level, _Level, _Level], Field(description="colour behind transparent pixels, each channel 0 to 255")
]
"""The type of a field `background`; a type and not a class to inherit, so that the field keeps its place in plans."""


class StageControlConfig(Config):
    """Which patches are bad, so that the next stage adds Gaussians there."""

    max_patch_mse: float = Field(10**-3.5, ge=0, le=10, description="a patch with a larger mean squared error is bad")
    max_patch_dssim: float = Field(0.05, ge=0, le=2, description="a patch with a larger 1 - SSIM is bad")

    def control(self) -> StageControl:
        """The thresholds as `air.stages` takes them."""
        from air.stages.control import StageControl

        return StageControl(self.max_patch_mse, self.max_patch_dssim)


class LeaseConfig(Config):
    """How a process holds its output folder against others. Nothing here is in a dump, so nothing belongs to a plan."""

    lease_seconds: float = Field(
        30.0,
        ge=1,
        le=3600,
        exclude=True,
        description="others may take over the output folder after so many seconds without a sign of life",
    )
    lease_wait_seconds: float = Field(
        0.0, ge=0, le=1e7, exclude=True, description="wait so long for a command that works in the output folder"
    )


class RunnerConfig(LeaseConfig):
    """Where and how work runs. Nothing here changes a result, so nothing here belongs to a plan."""

    executor: Literal["ray", "inline"] = Field("ray", description="run on Ray, or one shard after another in-process")
    address: str | None = Field(None, description="existing Ray cluster, such as `auto` or ray://host:10001")
    workers: int | None = Field(
        None, ge=1, le=100_000, description="shards that run at the same time, at most; default: as many as fit"
    )
    num_cpus: float = Field(1.0, gt=0, le=1024, description="CPU cores for each running shard")
    num_gpus: float = Field(0.0, ge=0, le=64, description="GPUs for each running shard; 0.5 is half a GPU")
    memory_mb: int | None = Field(None, ge=1, description="memory that Ray reserves for each running shard, in MB")
    max_attempts: int = Field(4, ge=1, le=100, description="attempts at a shard before it counts as failed")
    max_bad_share: float = Field(0.5, ge=0, le=1, description="stop above this fraction of images in quarantine")
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
    # A validator of the whole model has no single key; its message names the keys.
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}" if key else message


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` if a known word is close to this one, else an empty string."""
    names = {name.lstrip("-"): name for name in known}  # dashes would make any two options look alike
    close = difflib.get_close_matches(word.lstrip("-"), list(names), n=1)
    return f" (did you mean '{names[close[0]]}'?)" if close else ""


def read_sections(file: str | Path, sections: Mapping[str, type[Config]]) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file. All sections are checked, not only those of the job that reads the file.

    Args:
        file: Path of the file.
        sections: The configuration class of each section that a file may have.

    Raises:
        ConfigError: The file is missing, is not YAML, or has an unknown section or key.
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
