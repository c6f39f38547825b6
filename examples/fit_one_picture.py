"""Fits Gaussians to one picture, prints how the fit went, and draws the Gaussians at twice the picture's size.

python examples/fit_one_picture.py
python examples/fit_one_picture.py photo.jpg --gaussians 20000 --steps 100 --out fitted.png
"""

import argparse
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

import air
from air.pillow import draw


def open_picture(path: Path | None) -> Image.Image:
    """The picture at a path, or a photograph that scikit-image ships, in RGB."""
    if path is not None:
        return Image.open(path).convert("RGB")
    with as_file(files("skimage.data").joinpath("coffee.png")) as packaged:
        return Image.open(packaged).convert("RGB")


def main() -> None:
    """Fits, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", type=Path, help="default: a photograph that scikit-image ships")
    parser.add_argument("--gaussians", type=int, default=10_000, help="most Gaussians (default: 10000)")
    parser.add_argument("--steps", type=int, default=100, help="optimisation steps (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("fitted.png"), help="default: fitted.png")
    given = parser.parse_args()

    picture = open_picture(given.picture)
    result = air.fit(picture, given.steps, num_gaussians=given.gaussians)

    # The trajectory has an entry for the start and one after every step.
    psnr = result.trajectory.psnr
    for step in sorted({0, given.steps // 4, given.steps // 2, given.steps}):
        print(f"after {step:>4} steps: {psnr[step]:.2f} dB")
    print(f"{len(result.gaussians)} Gaussians for {result.width} x {result.height} pixels, {result.seconds:.2f} s")

    # Gaussians have no resolution of their own: the same table is drawn at any size.
    draw(result.gaussians, result.height, result.width, scale=2).save(given.out)
    print(f"drawn at twice the size: {given.out}")


if __name__ == "__main__":
    main()
