"""The examples in the docstrings of public functions run and print what they say."""

import doctest
from importlib import import_module
from types import ModuleType

import pytest

import air

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


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    module = import_module(name)
    runner = doctest.DocTestRunner()
    for test in examples_of(module):
        report: list[str] = []
        assert not runner.run(test, out=report.append).failed, "".join(report)


@pytest.mark.parametrize("name", ["encode", "fit"])
def test_functions_of_the_package_have_an_example(name: str) -> None:
    function = getattr(air, name)
    assert function.__module__ in MODULES
    assert ">>>" in (function.__doc__ or ""), f"air.{name} has no example"
