"""Summarises targets, roll-outs of a rule or encoded images through DuckDB, or runs your own query over them.

--sql has these views:
  views       of targets: one row per view of an image, with the columns of the table and psnr (dB after the last stage)
  gaussians   of targets: one row per Gaussian: key, view, stage, anchor, predicted_x, target_x, ... target_blue
  roll_outs   of roll-outs: one row per fit of an image, with the columns of the table
  samples     of roll-outs: one row per sample: key, fit, update, and the lists features, move, credit, curvature
  images      of encoded images: one row per image, with the columns of the table
  shards      one row per commit: unit, samples, seconds, rejected, and the map summary, as in summary['pixels']
  quarantine  one row per image that could not be used

  air stats targets/
  air stats targets/ --sql "select stage, count(*), avg(target_scale_1) from gaussians group by stage order by stage"
  air stats encoded/ --sql "select key, bpp, psnr from images order by psnr limit 10"
"""

import csv
import sys
from collections.abc import Sequence

import duckdb

from jobs.command import make_parser
from jobs.report import print_table
from pipeline.errors import ConfigError
from pipeline.reports.query import connect
from pipeline.rules.rollouts import JOB as ROLL_OUT_JOB
from pipeline.storage.open import open_storage
from pipeline.work.plan import read_plan

_OVERVIEW = """
    select count(distinct key), count(*), coalesce(sum(len(stage)), 0)::bigint, avg(height * width),
           avg(len(stage)), avg(psnr_predicted[1]), avg(psnr)
    from views
"""
_STAGES = """
    with per_stage as (
        select unnest(range(1, len(gaussians) + 1)) as number, gaussians, steps, psnr_predicted, psnr_target,
               loss_first, loss_last, height * width as pixels
        from views
    )
    select number - 1, count(*), sum(gaussians[number])::bigint, avg(gaussians[number]), any_value(steps[number]),
           avg(psnr_predicted[number]), avg(psnr_target[number]), avg(loss_first[number]), avg(loss_last[number])
    from per_stage group by number order by number
"""
_ENCODED = """
    select count(*), coalesce(sum(height::bigint * width), 0) / 1e6, coalesce(sum(list_sum(gaussians)), 0)::bigint,
           coalesce(sum(bytes), 0) / 1e6, 8 * sum(bytes) / sum(height::bigint * width), avg(bpp), avg(psnr),
           avg(ms_ssim)
    from images
"""
_ENCODED_COLUMNS = ("bpp", "psnr", "ms_ssim", "list_sum(gaussians)")
_ENCODING_TIMES = """
    select sum(summary['decode_seconds']), sum(summary['encode_seconds']), sum(summary['measure_seconds'])
    from shards
"""
_ROLL_OUTS = """
    select count(distinct key), count(*), coalesce(sum(samples), 0)::bigint, avg(samples), avg(steps),
           avg(num_gaussians), avg(height * width), avg(psnr[1]), avg(psnr[-1])
    from roll_outs
"""
_SIZES = "select sqrt(avg(move[N] ** 2)), sqrt(avg(credit[N] ** 2)), avg(curvature[N]) from samples"
_NUMBERS = ("offset x", "offset y", "scale 1", "scale 2", "angle", "red", "green", "blue")
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_SHAPES = f"""
    with shapes as (
        select unnest(target_scale_1) as scale_1, unnest(target_scale_2) as scale_2,
               unnest(target_red) as red, unnest(target_green) as green, unnest(target_blue) as blue
        from views
    ),
    quantiles as (
        select approx_quantile(greatest(scale_1, scale_2), {list(_QUANTILES)}) as larger,
               approx_quantile(least(scale_1, scale_2), {list(_QUANTILES)}) as smaller,
               approx_quantile(greatest(scale_1, scale_2) / least(scale_1, scale_2), {list(_QUANTILES)}) as anisotropy,
               approx_quantile(greatest(abs(red), abs(green), abs(blue)), {list(_QUANTILES)}) as amplitude
        from shapes
    )
    select larger, smaller, anisotropy, amplitude from quantiles
"""
_TIMES = """
    select count(*), sum(samples)::bigint, sum(seconds), sum(seconds) / nullif(sum(samples), 0),
           sum(summary['pixels']) / 1e6 / nullif(sum(seconds), 0)
    from shards
"""
_QUARANTINE = (
    "select reason, count(*), any_value(message) from quarantine group by reason order by count(*) desc, reason"
)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("stats", __doc__)
    parser.add_argument("targets", metavar="TARGETS", help="output of `air distill` or `air encode`; local or a URI")
    parser.add_argument("--sql", metavar="QUERY", help="run this query instead of the summary")
    parser.add_argument("--format", choices=("table", "csv"), default="table", help="output of --sql (default: table)")
    given = parser.parse_args(arguments)
    output = open_storage(given.targets)
    with connect(output) as connection:
        if given.sql is not None:
            _print_query(connection, given.sql, given.format)
        elif (job := read_plan(output).job) == "encode":
            print_encoded(connection, given.targets)
        elif job == ROLL_OUT_JOB:
            print_roll_outs(connection, given.targets)
        else:
            print_summary(connection, given.targets)
    return 0


def _print_query(connection: duckdb.DuckDBPyConnection, sql: str, layout: str) -> None:
    try:
        result = connection.execute(sql)
        names = [column[0] for column in (result.description if result else None) or []]
        rows = result.fetchall() if names else []
    except duckdb.Error as error:
        raise ConfigError(f"the query failed: {error}") from None
    if layout == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(names)
        writer.writerows(rows)
    else:
        print_table("", names, rows)


def print_summary(connection: duckdb.DuckDBPyConnection, title: str) -> None:
    """Prints the summary: images and views, stages, shapes, time, quarantine."""
    images, views, gaussians, pixels, per_view, predicted, target = _one(connection, _OVERVIEW)
    rows = [
        ("images", images),
        ("views", views),
        ("Gaussians", gaussians),
        ("Gaussians per view", per_view),
        ("pixels per view", pixels),
        ("PSNR predicted by stage 0, dB", predicted),
        ("PSNR after the last stage, dB", target),
    ]
    rows += _times(connection)
    print_table(f"targets in {title}", ("", "value"), rows)
    if gaussians:
        _print_stages_and_shapes(connection)
    _print_quarantine(connection)


def _print_stages_and_shapes(connection: duckdb.DuckDBPyConnection) -> None:
    columns = ("stage", "views", "Gaussians", "per view", "steps", "dB before", "dB after", "loss before", "loss after")
    print_table(
        "stages (PSNR and loss are means over views, of all Gaussians so far)", columns, _all(connection, _STAGES)
    )
    names = ("larger scale, px", "smaller scale, px", "anisotropy", "amplitude")
    shapes = [(name, *values) for name, values in zip(names, _one(connection, _SHAPES), strict=True)]
    print_table("optimised Gaussians, approximate quantiles", ("", *(f"{q:.0%}" for q in _QUANTILES)), shapes)


def print_roll_outs(connection: duckdb.DuckDBPyConnection, title: str) -> None:
    """Prints the summary of roll-outs: fits, samples, sizes of moves and credits, time, quarantine."""
    names = (
        "images",
        "roll-outs",
        "samples",
        "samples per roll-out",
        "updates per roll-out",
        "most Gaussians, mean",
        "pixels per roll-out",
        "PSNR before the first update, dB",
        "PSNR after the last update, dB",
    )
    values = _one(connection, _ROLL_OUTS)
    print_table(f"roll-outs in {title}", ("", "value"), [*zip(names, values, strict=True), *_times(connection)])
    if values[2]:
        sizes = [
            (name, *_one(connection, _SIZES.replace("N", str(number)))) for number, name in enumerate(_NUMBERS, start=1)
        ]
        columns = ("raw number", "move, learning rates", "credit", "curvature")
        print_table("root mean square of moves and credits, mean curvature", columns, sizes)
    _print_quarantine(connection)


def print_encoded(connection: duckdb.DuckDBPyConnection, title: str) -> None:
    """Prints the summary of encoded images: sizes, quality, time, quarantine."""
    images, megapixels, gaussians, megabytes, bits_of_all, bits, psnr, similarity = _one(connection, _ENCODED)
    decoding, encoding, measuring = _one(connection, _ENCODING_TIMES)
    rows = [
        ("images", images),
        ("megapixels", megapixels),
        ("Gaussians", gaussians),
        ("MB of .air files", megabytes),
        ("bits per pixel, over all images together", bits_of_all),
        ("bits per pixel, mean over images", bits),
        ("PSNR, dB", psnr),
        ("MS-SSIM", None if similarity is None else f"{similarity:.4f}"),
        *_times(connection),
        ("worker seconds decoding images", decoding),
        ("worker seconds encoding", encoding),
        ("worker seconds measuring", measuring),
    ]
    print_table(f"encoded images in {title}", ("", "value"), rows)
    if images:
        _print_spread(connection)
    _print_quarantine(connection)


def _print_spread(connection: duckdb.DuckDBPyConnection) -> None:
    names = ("bits per pixel", "PSNR, dB", "MS-SSIM", "Gaussians")
    spread = [
        (name, *_one(connection, f"select quantile_cont({column}, {list(_QUANTILES)}) from images")[0])
        for name, column in zip(names, _ENCODED_COLUMNS, strict=True)
    ]
    print_table("quantiles over images", ("", *(f"{q:.0%}" for q in _QUANTILES)), spread)


def _times(connection: duckdb.DuckDBPyConnection) -> list[tuple[str, object]]:
    """Rows about the commits and the time that they took."""
    commits, samples, seconds, per_image, megapixels = _one(connection, _TIMES)
    return [
        ("shards", commits),
        ("images seen", samples),
        ("worker seconds", seconds),
        ("worker seconds per image", per_image),
        ("megapixels per worker second", megapixels),
    ]


def _print_quarantine(connection: duckdb.DuckDBPyConnection) -> None:
    refused = _all(connection, _QUARANTINE)
    if refused:
        print_table("quarantine", ("reason", "images", "for example"), refused)


def _one(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple:
    return _all(connection, sql)[0]


def _all(connection: duckdb.DuckDBPyConnection, sql: str) -> list[tuple]:
    return connection.execute(sql).fetchall()
