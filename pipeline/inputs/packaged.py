"""The photographs that scikit-image and scikit-learn ship, as input of the demo."""

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
"""Package and file of every photograph, in the order in which the demo takes them."""


def collect_pictures(folder: Path, count: int) -> int:
    """Copies the first `count` packaged photographs into a folder.

    Args:
        folder: Where the copies go; it is made if it does not exist.
        count: Number of photographs, at most all of `PICTURES`.

    Returns:
        The number of copies.

    Raises:
        ConfigError: A package that ships a photograph is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = PICTURES[:count]
    for package, name in chosen:
        try:
            with as_file(files(package).joinpath(name)) as source:
                shutil.copyfile(source, folder / name)
        except (ModuleNotFoundError, FileNotFoundError):
            raise ConfigError(
                f"the demo's picture {name} is missing: install scikit-image and scikit-learn "
                "(pip install 'air-gaussians[demo]')"
            ) from None
    return len(chosen)
