"""Makes Pillow read and write .air files: import this module once.

    import air.pillow
    from PIL import Image

    picture = Image.open("photo.air")            # reads the header; the first access to pixels draws the Gaussians
    picture.save("photo.png")
    Image.open("photo.jpg").save("photo.air", bpp=0.25)

Images are RGB and of the size that was encoded; `draw` gives other sizes. Pillow limits the number of pixels itself
(`Image.MAX_IMAGE_PIXELS`). `Image.save` empties an existing file before it encodes. If a target may be missed, call
`air.encode` and write its result, so that the old file survives an error.
"""

from __future__ import annotations

from typing import IO, Any

from PIL import Image, ImageFile

from air.codec.bitstream import MAGIC, MAX_SIDE
from air.codec.file import decode, read_header
from air.encoding.encode import encode
from air.errors import CodecError
from air.gaussians import Gaussians
from air.rendering.cpu import draw_levels

FORMAT, ENDING, MIME = "AIR", ".air", "image/x-air"

ENCODE_OPTIONS = ("predictor", "stages", "bpp", "psnr", "gaussians", "steps", "stored_steps", "threads")
"""Options of `Image.save` that are passed to `air.encode`."""

_WRITABLE_MODES = ("RGB", "L", "1", "P", "CMYK", "YCbCr")
_MAX_HEADER_BYTES = 256


def draw(gaussians: Gaussians, height: int, width: int, *, scale: float = 1.0, threads: int = 1) -> Image.Image:
    """Draws Gaussians as an RGB image of 8 bits a channel, rounded to the nearest level.

    Args:
        gaussians: The Gaussians to draw.
        height: Height of the image that they were made for, pixels.
        width: Width of the image that they were made for, pixels.
        scale: Factor on height and width, for a larger or smaller picture of at least one pixel.
        threads: CPU threads at most.
    """
    if scale != 1:
        gaussians = gaussians.rescaled(scale)
        height, width = scaled_size(height, width, scale)
    return Image.fromarray(draw_levels(gaussians, height, width, threads))


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width, in pixels, of a picture drawn `scale` times as large."""
    return max(1, round(height * scale)), max(1, round(width * scale))


class AirImageFile(ImageFile.ImageFile):
    """Pillow's reader of .air files."""

    format = FORMAT
    format_description = "Sum of 2D Gaussians"

    _drawn = False

    def _open(self) -> None:
        assert self.fp is not None
        try:
            header = read_header(self.fp.read(_MAX_HEADER_BYTES), max_pixels=MAX_SIDE**2)
        except CodecError as error:
            raise SyntaxError(str(error)) from error  # Pillow's sign for "not this format"
        self._size = header.width, header.height
        self._mode = "RGB"
        self.info = {"stages": header.num_stages, "patch_size": header.patch_size}

    def load(self) -> Any:
        """Decodes and draws at the first call.

        Raises:
            OSError: The file is damaged or cut off.
        """
        if not self._drawn:
            assert self.fp is not None
            self.fp.seek(0)
            try:
                gaussians = decode(self.fp.read(), max_pixels=MAX_SIDE**2)
            except CodecError as error:
                raise OSError(str(error)) from error
            if getattr(self, "_exclusive_fp", False):
                self.fp.close()
            self.im = draw(gaussians, self.height, self.width).im
            self._drawn = True
        return super().load()


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


def _save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    if image.mode not in _WRITABLE_MODES:
        raise OSError(f"cannot write mode {image.mode} as AIR: convert to RGB first")
    given = getattr(image, "encoderinfo", {})
    options = {name: given[name] for name in ENCODE_OPTIONS if name in given}
    file.write(encode(image.convert("RGB"), **options))


Image.register_open(FORMAT, AirImageFile, _accept)
Image.register_save(FORMAT, _save)
Image.register_extension(FORMAT, ENDING)
Image.register_mime(FORMAT, MIME)
