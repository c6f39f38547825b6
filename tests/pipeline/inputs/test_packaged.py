"""The demo's photographs: copied in order, or the message says what to install."""

from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.inputs import packaged
from pipeline.inputs.packaged import PICTURES, collect_pictures


def test_the_first_photographs_are_copied(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="photographs come with scikit-image")
    pytest.importorskip("sklearn", reason="photographs come with scikit-learn")
    assert collect_pictures(tmp_path / "new" / "folder", 3) == 3
    copies = sorted((tmp_path / "new" / "folder").iterdir())
    assert [copy.name for copy in copies] == sorted(name for _, name in PICTURES[:3])
    for copy in copies:
        with Image.open(copy) as picture:
            assert min(picture.size) > 100


def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "PICTURES", (("no_such_package.data", "lena.png"),))
    with pytest.raises(ConfigError, match=r"lena\.png is missing: install scikit-image and scikit-learn"):
        collect_pictures(tmp_path, 1)
