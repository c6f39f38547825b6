"""The examples in docstrings give what they say."""

import doctest
from collections.abc import Callable

import pytest
import torch

from air.codec.file import decode, encode_gaussians, read_info
from air.codec.sensitivity import SensitivityQuantizer
from air.gaussians import Gaussians
from air.rendering.render import render

NAMES = {
    "torch": torch,
    "Gaussians": Gaussians,
    "SensitivityQuantizer": SensitivityQuantizer,
    "decode": decode,
    "encode_gaussians": encode_gaussians,
    "read_info": read_info,
    "render": render,
}


@pytest.mark.parametrize("documented", [render, encode_gaussians, decode, Gaussians])
def test_examples(documented: Callable[..., object]) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, globs=NAMES)
    results = doctest.DocTestRunner().run(example)
    assert results.attempted > 0
    assert results.failed == 0
