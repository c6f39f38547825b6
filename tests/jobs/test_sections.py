"""What a configuration file may hold, and what a command loads to read one."""

import subprocess
import sys

import pytest

from jobs.sections import sections
from pipeline.config import RENAMED_KEYS


def test_former_names_are_not_keys_and_their_new_names_are():
    for section, renamed in RENAMED_KEYS.items():
        fields = sections()[section].model_fields
        assert set(renamed.values()) <= set(fields)
        assert not set(renamed) & set(fields)


@pytest.mark.parametrize("command", ["shard", "distill", "encode", "decode", "evaluate", "fit", "status"])
def test_a_command_starts_and_reads_its_configuration_without_torch(command: str):
    """Torch takes seconds to load, and a driver of a bulk job does without it."""
    code = f"import sys, jobs.{command}, jobs.sections; jobs.sections.sections(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
