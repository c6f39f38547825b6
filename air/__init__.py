"""AIR represents images as sums of 2D Gaussians.

    import air

    result = air.fit(image, num_gaussians=20_000, steps=100)
    picture = air.render(result.gaussians, height, width)

    blob = air.encode(image, bpp=0.5)
    gaussians = air.decode(blob)

Names load on first use, so `import air` imports neither torch, numpy nor numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AirError": "air.errors",
    "Gaussians": "air.gaussians",
    "__version__": "air.version",
    "decode": "air.codec.file",
    "encode": "air.encoding.encode",
    "fit": "air.fitting.fit",
    "render": "air.rendering.render",
}

__all__ = ["AirError", "Gaussians", "__version__", "decode", "encode", "fit", "render"]

if TYPE_CHECKING:
    from air.codec.file import decode
    from air.encoding.encode import encode
    from air.errors import AirError
    from air.fitting.fit import fit
    from air.gaussians import Gaussians
    from air.rendering.render import render
    from air.version import __version__


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'air' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
