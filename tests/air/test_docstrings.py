"""The examples in the docstrings of public functions run and print what they say."""

import doctest
from importlib import import_module
from types import ModuleType

import pytest
import torch

import air
from air.codec.file import decode, encode_gaussians, read_info
from air.codec.sensitivity import SensitivityQuantizer
from air.gaussians import Gaussians
from air.rendering.render import render

MODULES = (
    "air.codec.file",
    "air.encoding.encode",
    "air.fitting.fit",
    "air.gaussians",
    "air.optimization.config",
    "air.optimization.optimize",
    "air.predictor.load",
    "air.rendering.render",
    "air.stages.loop",
    "air.stages.predict",
)
"""Where the public functions are defined."""


NAMES = {
    "torch": torch,
    "Gaussians": Gaussians,
    "SensitivityQuantizer": SensitivityQuantizer,
    "decode": decode,
    "encode_gaussians": encode_gaussians,
    "read_info": read_info,
    "render": render,
}
"""What an example may use beside the names of its module."""


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=NAMES) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    module = import_module(name)
    runner = doctest.DocTestRunner()
    for test in examples_of(module):
        report: list[str] = []
        assert not runner.run(test, out=report.append).failed, "".join(report)


@pytest.mark.parametrize("name", ["decode", "encode", "fit", "render"])
def test_functions_of_the_package_have_an_example(name: str) -> None:
    function = getattr(air, name)
    assert function.__module__ in MODULES
    assert ">>>" in (function.__doc__ or ""), f"air.{name} has no example"
