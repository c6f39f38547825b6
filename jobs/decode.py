"""Draws .air files as pictures, at any size.

From tars it makes tars: the output of `air encode`, a tar, or a folder of tars gives OUT/data/*.tar, planned, committed
and resumed as in every bulk job. From one .air file it makes one picture: OUT, if OUT ends in .png, .webp, .jpg or
.jpeg (a file of that name is replaced), or else a file in the folder OUT. From a folder of .air files it makes a folder
of pictures. It names damaged files and draws the others; the exit status is then 1.

  air decode encoded/ pictures/ --format webp --scale 0.5
  air decode photo.air photo.png
"""

import logging
import os
import posixpath
from collections.abc import Sequence
from functools import partial

from jobs.command import configure, make_parser
from jobs.display import show
from jobs.report import counted, print_outcome
from pipeline.bulk.decode import AIR_ENDING, DecodeConfig, DecodeJob, draw_file, plan_decode, prepare_decoder
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, Rejected
from pipeline.inputs.sources import check_outside, find_file
from pipeline.storage.base import Storage
from pipeline.storage.open import open_parent, open_storage
from pipeline.storage.uri import normalise
from pipeline.work.manifest import read_quarantine
from pipeline.work.plan import PLAN_PATH, settle_plan
from pipeline.work.runner import run
from pipeline.work.tally import Tally

logger = logging.getLogger(__name__)

_FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_MAX_NAMED = 20


def decode(given: str, output_uri: str, config: DecodeConfig, runner: RunnerConfig) -> Tally:
    """Plans and runs a job over tars; returns the totals."""
    given, output = normalise(given), open_storage(output_uri)
    check_outside(output, [given])
    plan, read = plan_decode(config, given)
    plan = settle_plan(output, plan)
    with show("decode") as display:
        return run(DecodeJob(config, read), plan, output, runner, display)


def decode_files(source: Storage, names: Sequence[str], output_uri: str, config: DecodeConfig) -> list[str]:
    """Draws .air files one after the other.

    Args:
        source: The storage that holds the files.
        names: Paths of the files in `source`, all ending in .air.
        output_uri: A folder; for a single file also the name of a picture, with the ending of its format.
        config: What to make; the name of a picture decides its format.

    Returns:
        A line for every file that cannot be used, with the reason.
    """
    named = _FORMATS.get(posixpath.splitext(output_uri)[1].lower())
    if named is not None:
        output, target = open_parent(output_uri)
        config = config.model_copy(update={"format": named})
    else:
        output, target = open_storage(output_uri), ""
    bad = []
    for name in names:
        try:
            picture, info = draw_file(source.read(name), config, os.cpu_count() or 1)
        except Rejected as rejection:
            bad.append(f"{source.uri(name)}: {rejection}")
            continue
        output.write(target or f"{name.removesuffix(AIR_ENDING)}.{info.extension}", picture)
    return bad


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("decode", __doc__, DecodeConfig, RunnerConfig)
    parser.add_argument("encoded", metavar="ENCODED", help="output of `air encode`, tars, or .air files")
    parser.add_argument("out", metavar="OUT", help="folder for the pictures, or one picture; local or a URI")
    given = parser.parse_args(arguments)
    config, runner = configure(given, decode=DecodeConfig, runner=RunnerConfig)
    files = find_files(given.encoded)
    check_output(given.out, files is not None and len(files[1]) == 1, getattr(given, "format", None))
    if files is not None:
        return draw_all(*files, given.out, config)
    tally = decode(given.encoded, given.out, config, runner)
    print_outcome(counted(int(tally.summary["images"]), "picture"), given.out, tally)
    if tally.rejected:
        print_refused(open_storage(given.out))
    return 1 if tally.rejected else 0


def check_output(output_uri: str, single: bool, asked: str | None) -> None:
    """Refuses an output whose name does not fit the pictures.

    Args:
        output_uri: The output as the user typed it.
        single: Whether a single .air file is drawn.
        asked: The value of --format, if given.

    Raises:
        ConfigError: The name has an ending that pictures do not have, and is not a folder; or the format contradicts
            the ending; or it is the name of one picture, but there are several.
    """
    name = posixpath.basename(output_uri)
    ending = posixpath.splitext(name)[1].lower()
    known = ", ".join(_FORMATS)
    if not single:
        if ending in _FORMATS:
            raise ConfigError(
                f"{output_uri} is the name of one picture, but several are drawn: name a folder, without {ending}"
            )
    elif ending in _FORMATS:
        if asked not in (None, _FORMATS[ending]):
            raise ConfigError(
                f"--format {asked} contradicts {output_uri}: leave out --format, or change the ending of the name"
            )
    elif ending and not os.path.isdir(normalise(output_uri)):
        raise ConfigError(
            f"{output_uri}: the name of a picture ends in {known}, not in {ending}; "
            "if it is a folder, put a slash at its end"
        )


def find_files(given: str) -> tuple[Storage, list[str]] | None:
    """The storage that holds .air files, and their paths in it; None for tars and for the output of a job.

    Raises:
        ConfigError: There is no such file.
    """
    if given.endswith(AIR_ENDING):
        source, name = find_file(given)
        return source, [name]
    if given.endswith(".tar"):
        return None
    source = open_storage(given)
    if source.exists(PLAN_PATH):
        return None
    names = [path for path, _ in source.list() if path.endswith(AIR_ENDING)]
    return (source, names) if names else None


def draw_all(source: Storage, names: Sequence[str], output: str, config: DecodeConfig) -> int:
    """Draws files, prints how many were drawn and what is wrong with the others; returns the exit status."""
    prepare_decoder(partial(print, flush=True))
    bad = decode_files(source, names, output, config)
    for line in bad:
        logger.error("%s", line)
    print(f"{counted(len(names) - len(bad), 'picture')}; {len(bad) or 'none'} damaged or too large. Output: {output}")
    return 1 if bad else 0


def print_refused(output: Storage) -> None:
    """Names the files that a job could not draw."""
    lines = [f"{row['message']} ({row['reason']})" for row in read_quarantine(output)]
    for line in lines[:_MAX_NAMED]:
        logger.error("%s", line)
    if len(lines) > _MAX_NAMED:
        logger.error("and %d more: see %s", len(lines) - _MAX_NAMED, output.uri("quarantine"))
