"""The global order of samples: what a number of workers, a stop or a resumption must never change."""

import pytest

from pipeline.training.order import FeedConfig, GlobalOrder, rank_slice

COUNTS = (5, 1, 7, 4, 6, 3)


def stream(order: GlobalOrder, steps: int) -> list[tuple[int, int, int]]:
    return [tuple(place) for step in range(steps) for place in order.batch(step)]


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_every_epoch_is_a_permutation_of_all_samples(window: int) -> None:
    order = GlobalOrder(COUNTS, FeedConfig(seed=3, batch=4, window=window))
    everything = {(block, row) for block, count in enumerate(COUNTS) for row in range(count)}
    places = stream(order, 3 * 13)  # 156 samples: six epochs of 26
    for epoch in range(6):
        members = [(block, row) for which, block, row in places if which == epoch]
        assert len(members) == 26
        assert set(members) == everything


def test_epochs_differ_and_the_seed_decides() -> None:
    one, same, other = (stream(GlobalOrder(COUNTS, FeedConfig(seed=seed, batch=13, window=3)), 4) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert [place[1:] for place in one[:26]] != [place[1:] for place in one[26:52]]


def test_a_window_bounds_how_many_blocks_are_needed_at_a_time() -> None:
    order = GlobalOrder([10] * 12, FeedConfig(batch=10, window=3))
    for step in range(0, 12, 3):
        assert len({order.place(index).block for index in range(10 * step, 10 * step + 30)}) == 3


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_slices_of_the_ranks_make_up_the_batch_evenly(batch: int, size: int) -> None:
    samples = list(range(batch))
    slices = [samples[rank_slice(batch, rank, size)] for rank in range(size)]
    assert [sample for part in slices for sample in part] == samples
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
