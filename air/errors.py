"""The errors that this project raises on purpose. Their common base class distinguishes them from defects.

Messages say what is wrong, where, and what to do. The command line prints them without a traceback.
"""


class AirError(Exception):
    """Base of every error that the project raises for a cause the user can act on."""


class InvalidGaussiansError(AirError, ValueError):
    """Gaussians that cannot be rendered: wrong shapes, non-finite numbers, scales that are not positive."""


class NonFiniteLossError(AirError, ArithmeticError):
    """The loss of an optimisation became NaN or infinite.

    Attributes:
        image: Index of the image in its batch, from 0.
    """

    image: int = 0


class BackendUnavailableError(AirError, RuntimeError):
    """This machine cannot run the backend or device that was asked for by name."""


class CheckpointError(AirError):
    """A predictor's checkpoint is missing, damaged or of another format."""


class MissingExtraError(AirError, ImportError):
    """A package that only some features need is not installed; the message names the extra that brings it."""


class CodecError(AirError, ValueError):
    """An .air file is damaged, cut off or of another version, or the format cannot hold an image."""


class TargetMissedError(CodecError):
    """The encoder found no file of the image that meets a target of bits or quality."""
