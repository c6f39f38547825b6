"""The version of the package, which needs nothing to be read."""

from __future__ import annotations

__version__ = "0.1.0"
