"""The errors this project raises on purpose: one base class, so that a caller can tell ours from a defect.

Messages say what was wrong, where, and what to do. The command line prints them without a traceback.
"""


class AirError(Exception):
    """Base of every error that the project raises for a cause the user can act on."""


class InvalidGaussiansError(AirError, ValueError):
    """Gaussians that cannot be rendered: wrong shapes, non-finite numbers, scales that are not positive."""


class NonFiniteLossError(AirError, ArithmeticError):
    """An optimisation whose loss stopped being a number.

    Attributes:
        image: Which image of a batch it was, from 0.
    """

    image: int = 0


class BackendUnavailableError(AirError, RuntimeError):
    """A renderer that this machine cannot run, asked for by name."""


class CheckpointError(AirError):
    """A predictor's checkpoint is missing, damaged or of another kind."""


class MissingExtraError(AirError, ImportError):
    """A package that only some features need is not installed; the message names the extra that brings it."""


class CodecError(AirError, ValueError):
    """An .air file that is damaged, cut off or of another version, or an image that cannot be written as one."""


class TargetMissedError(CodecError):
    """A target of bits or of quality that no file of the image meets."""
