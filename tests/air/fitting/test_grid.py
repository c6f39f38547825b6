"""The start in closed form on long images: solved in blocks, as if it were solved whole, in memory that stays small."""

import pytest
import torch

from air.fitting import grid
from air.fitting.grid import grid_initialization


@pytest.mark.parametrize("patch_size", [1, 2, 7])
def test_blocks_give_what_the_whole_axis_gives(patch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    long = 600 * patch_size - patch_size // 2  # three blocks, the last patch cut off
    wide = torch.rand(3, 9, long, generator=torch.Generator().manual_seed(patch_size))
    found = [grid_initialization(image, patch_size) for image in (wide, wide.mT)]
    monkeypatch.setattr(grid, "_BLOCK", 10_000)
    for image, in_blocks in zip((wide, wide.mT), found, strict=True):
        torch.testing.assert_close(in_blocks, grid_initialization(image, patch_size), rtol=0, atol=2e-5)


def test_an_axis_of_any_length_is_solved_in_matrices_of_bounded_size() -> None:
    blocks = list(grid.axis_solvers(700_001, 7, 3.0))
    assert sum(matrix.shape[0] for _, matrix in blocks) == 100_001
    assert max(matrix.shape[0] for _, matrix in blocks) <= 192
    assert max(pixels.stop - pixels.start for pixels, _ in blocks) <= 256 * 7
    assert blocks[-1][0].stop == 700_001
