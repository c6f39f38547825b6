"""Where the repository is, and the pictures beside it that tests use where they are there."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""

AWKWARD = ROOT.parent / "shared" / "data" / "awkward"
"""Pictures with a fault each; tests of them are skipped where the folder is not there."""

WILD = ROOT.parent / "shared" / "data" / "wild"
"""Small files that stand for a kind of fault each; tests of them are skipped where the folder is not there."""
