"""Options of `air evaluate` that contradict themselves are refused."""

import pytest

from pipeline.evaluation.config import EvaluateConfig, FrontConfig


@pytest.mark.parametrize(("values", "said"), [({"refine": (10, 0)}, "must rise"), ({"refine": (-1,)}, "counts from 0")])
def test_options_that_mean_nothing_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EvaluateConfig(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": ()}, "steps must be one or more counts"),
        ({"steps": (0, 100_001)}, "counts from 0 to 100000"),
        ({"steps": (5, 5)}, "steps must rise"),
        ({"rules": ()}, "one or more rules"),
        ({"rules": ("adam", "shipped", "adam")}, "without repetition"),
        ({"refine": (1,)}, "refine"),
    ],
)
def test_options_of_the_front_that_mean_nothing_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FrontConfig(**values)
