"""Batches are made ahead of their use."""

import pytest

from pipeline.errors import TrainingError
from pipeline.training.batches import Prefetcher


def test_batches_are_made_ahead_in_order_and_errors_arrive() -> None:
    def make(step: int) -> int:
        if step == 6:
            raise TrainingError("no step 6")
        return step

    batches = Prefetcher(make, 3, ahead=2)
    assert [batches.take() for _ in range(3)] == [3, 4, 5]
    with pytest.raises(TrainingError, match="no step 6"):
        batches.take()
    batches.close()
