"""Draws one .air file as a picture, at any size: `air decode` for a single file.

The ending of the picture's name says the format (.png, .webp, .jpg); a file of that name is replaced.

  air render photo.air photo.png --scale 2
"""

from collections.abc import Sequence

from jobs.command import configure, make_parser
from jobs.decode import check_output, draw_all
from pipeline.bulk.decode import DecodeConfig
from pipeline.inputs.sources import find_file


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("render", __doc__, DecodeConfig)
    parser.add_argument("file", metavar="FILE.air", help="an .air file; a local path or a URI")
    parser.add_argument("out", metavar="OUT.png", help="the picture (.png, .webp or .jpg), or a folder for it")
    given = parser.parse_args(arguments)
    (config,) = configure(given, decode=DecodeConfig)
    check_output(given.out, True, getattr(given, "format", None))
    source, name = find_file(given.file)
    return draw_all(source, [name], given.out, config)
