"""Baselines of the codec: files within a limit, and codecs that cannot hold an image."""

import numpy as np
import pytest

from pipeline.errors import Rejected
from pipeline.evaluation import baselines


def test_a_codec_that_cannot_hold_an_image_says_so() -> None:
    (webp,) = (baseline for baseline in baselines.BASELINES if baseline.name == "WebP")
    if webp not in baselines.available():
        pytest.skip("this Pillow is built without WebP")
    with pytest.raises(Rejected, match=r"unsupported: WebP cannot hold it: .*16383"):
        baselines.encode_within(webp, np.zeros((1, 16384, 3), np.uint8), 1000)


def test_a_limit_below_the_smallest_file_gives_the_smallest() -> None:
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    face = data.astronaut()[60:124, 180:276]
    for baseline in baselines.available():
        file = baselines.encode_within(baseline, face, 10)
        assert file.setting == baseline.settings[0]
        assert baselines.decode(baseline, file.data).shape == face.shape
