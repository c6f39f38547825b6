"""Encodes one picture as .air files of several sizes, decodes them, and decodes the beginning of the largest.

python examples/encode_and_decode.py
python examples/encode_and_decode.py photo.jpg --bpp 0.25 0.5 1.0 --out photo.air
"""

import argparse
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

import air
from air.arguments import image_tensor
from air.codec.file import read_info
from air.metrics import psnr


def open_picture(path: Path | None) -> Image.Image:
    """The picture at a path, or a photograph that scikit-image ships, in RGB."""
    if path is not None:
        return Image.open(path).convert("RGB")
    with as_file(files("skimage.data").joinpath("chelsea.png")) as packaged:
        return Image.open(packaged).convert("RGB")


def main() -> None:
    """Encodes, decodes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", type=Path, help="default: a photograph that scikit-image ships")
    parser.add_argument("--bpp", nargs="+", type=float, default=[0.25, 0.5, 1.0], help="most bits per pixel")
    parser.add_argument("--out", type=Path, default=Path("picture.air"), help="the last file (default: picture.air)")
    given = parser.parse_args()

    picture = open_picture(given.picture)
    image, (width, height) = image_tensor(picture), picture.size
    blob = b""
    for bits in given.bpp:
        blob = air.encode(picture, bpp=bits)
        gaussians = air.decode(blob)
        quality = psnr(air.render(gaussians, height, width), image)
        print(f"at most {bits:g} bits per pixel: {len(blob)} bytes, {len(gaussians)} Gaussians, {quality:.2f} dB")
    given.out.write_bytes(blob)

    # A file holds its stages one after another, so the first bytes of a file are a coarser picture.
    info = read_info(blob)
    for stages, end in enumerate(info.ends, start=1):
        gaussians = air.decode(blob[:end], stages)
        quality = psnr(air.render(gaussians, height, width), image)
        print(f"{given.out}, first {stages} of {len(info.ends)} stages: {end} bytes, {quality:.2f} dB")


if __name__ == "__main__":
    main()
