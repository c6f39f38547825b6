"""The photographs in the packages scikit-image and scikit-learn, for the demo.

This module copies files; it must not know what the demo does with them.
"""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from pipeline.errors import ConfigError

# (package, file name)
PICTURES = (
    ("sklearn.datasets.images", "china.jpg"),
    ("sklearn.datasets.images", "flower.jpg"),
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "rocket.jpg"),
    ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "hubble_deep_field.jpg"),
    ("skimage.data", "camera.png"),
    ("skimage.data", "coins.png"),
    ("skimage.data", "moon.png"),
    ("skimage.data", "gravel.png"),
)


def collect_pictures(folder: Path, count: int) -> int:
    """Copies the first `count` packaged photographs into a folder.

    Returns:
        The number of photographs copied.

    Raises:
        ConfigError: The packages that contain the photographs are not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package, name in PICTURES[:count]:
        try:
            with as_file(files(package).joinpath(name)) as source:
                shutil.copyfile(source, folder / name)
        except (ModuleNotFoundError, FileNotFoundError):
            raise ConfigError(
                f"the demo's picture {name} is missing: install scikit-image and scikit-learn "
                "(pip install 'air-gaussians[demo]')"
            ) from None
    return len(PICTURES[:count])
