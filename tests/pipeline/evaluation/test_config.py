"""Options of `air evaluate` that contradict themselves are refused."""

import pytest

from pipeline.evaluation.config import EvaluateConfig


@pytest.mark.parametrize(("values", "said"), [({"refine": (10, 0)}, "must rise"), ({"refine": (-1,)}, "counts from 0")])
def test_options_that_mean_nothing_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EvaluateConfig(**values)
