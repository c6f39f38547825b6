"""Configuration: misspelt keys, values out of bounds and invalid YAML are refused; the message names key and file."""

import pickle
import re
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, model_validator

from pipeline.config import Background, Config, PerStage, RunnerConfig, StageControlConfig, build, read_sections
from pipeline.errors import ConfigError


class BakeConfig(Config):
    temperature: float = Field(180.0, ge=50, le=300)
    minutes: int = Field(45, ge=1)
    tins: tuple[int, ...] = Field((1,))

    @model_validator(mode="after")
    def _baked(self) -> "BakeConfig":
        if self.temperature * self.minutes < 1000:
            raise ValueError("temperature times minutes is below 1000")
        return self


SECTIONS = {"bake": BakeConfig, "runner": RunnerConfig}


def read(folder: Path, text: str) -> dict[str, dict]:
    file = folder / "air.yaml"
    file.write_text(text, encoding="utf-8")
    return read_sections(file, SECTIONS)


def test_values_that_fit_are_taken_and_the_rest_are_defaults():
    config = build(BakeConfig, {"minutes": 30, "tins": [1, 2]}, "bake")
    assert (config.temperature, config.minutes, config.tins) == (180.0, 30, (1, 2))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"minuts": 30}, ["unknown key 'minuts'", "did you mean 'minutes'?"]),
        ({"zzz": 30}, ["unknown key 'zzz'"]),
        ({"minutes": 0}, ["minutes = 0", "greater than or equal to 1"]),
        ({"temperature": 301}, ["temperature = 301", "less than or equal to 300"]),
        ({"minutes": "soon"}, ["minutes = 'soon'", "integer"]),
        ({"minutes": 1.5}, ["minutes = 1.5", "integer"]),
        ({"temperature": float("nan")}, ["temperature = nan", "finite"]),
        ({"temperature": float("inf")}, ["temperature = inf"]),
        ({"tins": [1, "two"]}, ["tins.1 = 'two'"]),
        ({"minutes": 0, "temperatur": 1}, ["minutes = 0", "'temperatur'", "did you mean 'temperature'?"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values: dict, said: list[str]):
    with pytest.raises(ConfigError) as caught:
        build(BakeConfig, values, "bake")
    message = str(caught.value)
    assert message.startswith("bake: ")
    assert [part for part in said if part not in message] == []


def test_what_several_keys_do_wrong_together_is_said_without_the_whole_configuration():
    with pytest.raises(ConfigError) as caught:
        build(BakeConfig, {"minutes": 3}, "bake")
    assert str(caught.value) == "bake: temperature times minutes is below 1000"


def test_a_word_unlike_any_key_gets_no_suggestion():
    with pytest.raises(ConfigError) as caught:
        build(BakeConfig, {"zzz": 30}, "bake")
    assert "did you mean" not in str(caught.value)


def test_a_former_key_is_refused_with_its_new_name():
    with pytest.raises(ConfigError) as caught:
        build(BakeConfig, {"duration": 30, "minuts": 30}, "bake", {"duration": "minutes"})
    assert "unknown key 'duration': it is now called 'minutes'" in str(caught.value)
    assert "unknown key 'minuts' (did you mean 'minutes'?)" in str(caught.value)


def test_configurations_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        BakeConfig().minutes = 3  # type: ignore[misc]


def test_sections_of_a_file(tmp_path: Path):
    text = "bake:\n  minutes: 20\nrunner:\n  executor: inline\n"
    assert read(tmp_path, text) == {"bake": {"minutes": 20}, "runner": {"executor": "inline"}}


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "bake:\n", "bake:\n  # minutes: 20\n"])
def test_a_file_with_everything_commented_out_changes_nothing(tmp_path: Path, text: str):
    assert not any(read(tmp_path, text).values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bake:\n  minuts: 20\n", ["section 'bake'", "unknown key 'minuts'", "did you mean 'minutes'?"]),
        ("runner:\n  max_attempts: 0\n", ["section 'runner'", "max_attempts = 0"]),
        ("backe:\n  minutes: 20\n", ["unknown section 'backe'", "did you mean 'bake'?"]),
        ("bake:\n  temperature: .nan\n", ["temperature = nan"]),
        ("bake: [1, 2]\n", ["section 'bake' must be a mapping"]),
        ("- bake\n", ["must be a mapping of sections (bake, runner)", "not list"]),
        ("bake: {minutes: 20\n", ["not valid YAML"]),
        ("bake:\n\tminutes: 20\n", ["not valid YAML"]),
        ("bake:\n  1: 2\n", ["unknown key '1'"]),
        ("bake:\n  on: 2\n", ["unknown key 'True'"]),
        ("7:\n  minutes: 2\n", ["unknown section '7'"]),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, said: list[str]):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "air.yaml" in message
    assert [part for part in said if part not in message] == []


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    file = tmp_path / "air.yaml"
    file.write_bytes(b"bake: \xff\xfe")
    with pytest.raises(ConfigError, match=r"air\.yaml is not valid YAML"):
        read_sections(file, SECTIONS)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read configuration .*nowhere\.yaml: No such file"):
        read_sections(tmp_path / "nowhere.yaml", SECTIONS)


class OvenConfig(StageControlConfig):
    minutes: PerStage[Annotated[int, Field(ge=1, le=90)]] = Field(PerStage((45,)))
    glaze: Background = (255, 255, 255)


def test_the_last_number_holds_for_all_further_stages():
    config = build(OvenConfig, {"minutes": [30, 20]}, "bake")
    assert [config.minutes.at(stage) for stage in range(4)] == [30, 20, 20, 20]
    assert OvenConfig().minutes.at(7) == 45
    assert build(OvenConfig, {"minutes": 10}, "bake").minutes == (10,)


def test_numbers_per_stage_are_a_list_in_json_and_survive_it():
    config = build(OvenConfig, {"minutes": [30, 20]}, "bake")
    document = config.model_dump(mode="json")
    assert document["minutes"] == [30, 20]
    again = build(OvenConfig, document, "bake")
    assert again == config
    assert again.minutes.at(2) == 20
    assert pickle.loads(pickle.dumps(config)).minutes.at(2) == 20


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"minutes": []}, "at least 1 item"),
        ({"minutes": [30, 0]}, "minutes.1 = 0: input should be greater than or equal to 1"),
        ({"minutes": "30,x"}, "minutes = '30,x'"),
        ({"glaze": [0, 0, 256]}, "glaze.2 = 256: input should be less than or equal to 255"),
        ({"glaze": [0, 0]}, "glaze.2"),
        ({"max_patch_mse": -1}, "max_patch_mse = -1"),
    ],
)
def test_lists_out_of_bounds_are_refused_by_name_and_place(values: dict, said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        build(OvenConfig, values, "bake")


def test_the_thresholds_of_bad_patches_are_those_of_the_stages():
    from air.stages.control import StageControl

    assert build(OvenConfig, {}, "bake").control() == StageControl()
