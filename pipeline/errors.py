"""What can go wrong with data in motion, beyond `air.errors`: each class is one thing the operator can act on."""

from enum import StrEnum

from air.errors import AirError


class StorageError(AirError):
    """A path that cannot be read, listed or written."""


class ConfigError(AirError):
    """A configuration that names an unknown key or a value out of bounds."""


class PlanMismatchError(AirError):
    """The output folder belongs to another plan. The message lists what differs."""


class DamagedDataError(AirError):
    """A file is not what a manifest or a plan says it is."""


class JobFailedError(AirError):
    """A job that ended with work undone. What was committed stays; the same command goes on from there."""


class TrainingError(AirError):
    """A training run that cannot begin, go on or be taken up again. Its last checkpoint stays."""


class Rejected(AirError):
    """One sample that cannot be used. It goes to quarantine, and the job goes on.

    Attributes:
        reason: A short code out of a fixed set, such as `truncated`.
        message: What exactly was found.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["Rejected"], tuple[str, str]]:
        """Both parts survive pickling between processes."""
        return Rejected, (self.reason, self.message)


class Reason(StrEnum):
    """Why an image cannot be used: the reason codes of quarantine."""

    EMPTY = "empty"
    """Zero bytes."""
    NOT_AN_IMAGE = "not_an_image"
    """No known image signature at its start."""
    UNSUPPORTED = "unsupported"
    """An image or document, but of a format or pixel type that is not read here, or that cannot be written."""
    TRUNCATED = "truncated"
    """The file ends before its own structure does: fetch it again."""
    CORRUPT = "corrupt"
    """As long as it says, but its content contradicts itself or its checksums."""
    TOO_MANY_PIXELS = "too_many_pixels"
    """The header claims more pixels than allowed. Nothing was decoded."""
    TOO_SMALL = "too_small"
    """Smaller than one patch in height or width."""
