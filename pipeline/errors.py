"""Errors of pipeline beyond `air.errors`, and the reasons why a sample goes to quarantine.

Each class stands for one thing that the operator can act on. This module knows no storage, no job and no image.
"""

from enum import StrEnum

from air.errors import AirError


class StorageError(AirError):
    """A path cannot be read, listed or written."""


class ConfigError(AirError):
    """A configuration has an unknown key or a value out of bounds, or a command is given what it cannot use."""


class PlanMismatchError(AirError):
    """The output folder belongs to another plan. The message lists what differs."""


class DamagedDataError(AirError):
    """A file is not what a manifest or a plan says it is."""


class JobFailedError(AirError):
    """A job ended with work undone. What was committed stays; the same command goes on from there."""


class LeaseHeldError(AirError):
    """Another process holds the lease of the output folder. The message says who, and since when."""


class LeaseLostError(AirError):
    """Another process has taken over the lease of the output folder, and this process must write no more."""


class RegistryError(AirError):
    """A registry has no such version or alias, or an alias is not where it is expected. The message lists what is."""


class AliasMovedError(RegistryError):
    """An alias is not where it is expected: another process or person has moved it."""


class TrainingError(AirError):
    """A training run cannot begin, go on or be resumed. Its last checkpoint stays."""


class Reason(StrEnum):
    """Why a sample is in quarantine: the codes in the column `reason`. docs/tables.md has the table."""

    EMPTY = "empty"
    """The file has zero bytes."""
    NOT_AN_IMAGE = "not_an_image"
    """The file does not start with the signature of a known image format."""
    UNSUPPORTED = "unsupported"
    """The file's format or pixel type is not read here, or the output's format cannot hold the image."""
    TRUNCATED = "truncated"
    """The file ends before its own structure does: fetch it again."""
    CORRUPT = "corrupt"
    """The file is as long as it says, but its content contradicts itself or its checksums."""
    TOO_MANY_PIXELS = "too_many_pixels"
    """The header states more pixels than `max_pixels` allows; nothing was decoded or drawn."""
    TOO_SMALL = "too_small"
    """The image is smaller than one patch in height or width."""
    MISSING = "missing"
    """The file was deleted after the plan was made, or the field of a Parquet file is empty."""
    FORBIDDEN = "forbidden"
    """The file's permissions do not allow reading it."""
    NO_IMAGE = "no_image"
    """The sample of a shard has no image member."""
    NON_FINITE = "non_finite"
    """An optimisation or a prediction gave numbers that are not finite."""
    TARGET_MISSED = "target_missed"
    """No file meets the target of bits or decibels that `air encode` was given."""
    DAMAGED = "damaged"
    """The .air file cannot be decoded."""
    KILLED_WORKER = "killed_worker"
    """The image killed its worker process twice: a crash, or too little memory."""
    FAILED = "failed"
    """Processing the image raised an unexpected error; the message names it."""


class Rejected(AirError):
    """A sample that cannot be used. It goes to quarantine, and the job goes on.

    Attributes:
        reason: The code.
        message: What was found in this sample.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["Rejected"], tuple[Reason, str]]:
        """Pickling keeps both arguments, so that a rejection travels between processes."""
        return Rejected, (self.reason, self.message)
