"""`air COMMAND ...`: finds the command's module and turns its errors into messages and exit statuses."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from air.errors import AirError
from air.version import __version__
from jobs.command import option_value
from pipeline import logs
from pipeline.config import suggestion
from pipeline.errors import ConfigError
from pipeline.logs import LogSettings

logger = logging.getLogger(__name__)

COMMANDS = {
    "demo": "every step, from photographs that packages ship to targets",
    "shard": "images in folders, globs, tars, Parquet -> WebDataset shards",
    "distill": "shards -> distillation targets in Parquet",
    "train": "targets or shards -> a predictor's checkpoint",
    "evaluate": "quality and time of a predictor beside grids or fits, or of the codec beside other codecs",
    "encode": "images or shards -> .air files in tars, and a Parquet row about each; or one image -> one file",
    "decode": ".air files -> pictures, at any size",
    "render": "one .air file -> a picture",
    "fit": "one image -> Gaussians, with progress and a picture",
    "import-checkpoint": "the authors' checkpoint -> weights and card of this project",
    "submit": "any of the jobs above on a Ray cluster, from a machine outside it",
    "stats": "summary of targets or of encoded images, or your own SQL over them",
    "retrain": "new shards -> a candidate, judged beside the champion of a registry, and promoted if it is better",
    "registry": "versions of weights, and aliases such as champion: list, show, add, promote, rollback, gc",
    "status": "how far a job is",
    "verify": "check counts and checksums of everything a job committed",
    "gc": "remove what killed attempts left behind",
}

GO_ON = "run the same command again to go on"
"""What an interrupted command says next, unless its KeyboardInterrupt has a message."""

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the entry point of `air`.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated; or what the command says.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_DONE if arguments else EXIT_USAGE
    command, *rest = arguments
    if command in ("-V", "--version"):
        print(f"air {__version__}")
        return EXIT_DONE
    if command not in COMMANDS:
        print(f"air: unknown command '{command}'{suggestion(command, COMMANDS)}\n\n{_overview()}", file=sys.stderr)
        return EXIT_USAGE
    level = os.environ.get("AIR_LOG_LEVEL", "").upper() or None
    if level not in (None, *logs.LEVELS):
        known = f"{', '.join(logs.LEVELS[:-1])} or {logs.LEVELS[-1]}"
        print(f"air: AIR_LOG_LEVEL={level} is not a log level: use {known}", file=sys.stderr)
        return EXIT_USAGE
    # The parser of the command checks the option. Until then, a wrong value is as good as none.
    as_json = option_value(rest, "--log-format") == "json"
    logs.configure(LogSettings("json" if as_json else "text", level, {"job": command}))
    try:
        with _termination_raises():
            return import_module(f"jobs.{command.replace('-', '_')}").main(rest)
    except SystemExit as stop:  # from argparse: --help, or a wrong option that argparse has explained
        return int(stop.code or EXIT_DONE)
    except ConfigError as error:
        logger.error("air %s: %s", command, error)
        return EXIT_USAGE
    except AirError as error:
        logger.error("air %s: %s", command, error)
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader of the output has left, as in `air stats ... | head`, which is not a failure. Python flushes the
        # output at exit; without a reader it would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except _Terminated as stop:
        logger.error("air %s: terminated; %s", command, str(stop) or GO_ON)
        return EXIT_TERMINATED
    except KeyboardInterrupt as stop:
        logger.error("air %s: interrupted; %s", command, str(stop) or GO_ON)
        return EXIT_INTERRUPTED


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: the signal that schedulers and `timeout` send."""


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Within the block, SIGTERM cleans up as ^C does, and then raises `_Terminated`.

    Only the first SIGTERM counts. Further ones do nothing, but while Ray shuts down they end the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    came = threading.Event()

    def terminate(signum: int, frame: FrameType | None) -> None:
        if not came.is_set():
            came.set()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:  # Ray replaces a subclass raised by the handler
        raise _Terminated(*interrupt.args) if came.is_set() else interrupt from None
    finally:
        if not came.is_set():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: air COMMAND ...\n\nImages as sums of 2D Gaussians, at scale.\n\ncommands:",
            *lines,
            "\n`air COMMAND --help` shows its options. AIR_LOG_LEVEL=DEBUG shows the causes of errors.",
            "`--log-format json` prints to stderr a line of JSON for each event.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
