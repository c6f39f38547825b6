"""SQL over the output of a job: DuckDB views of the files that manifests name, and of no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import duckdb
import pyarrow as pa

from pipeline.errors import StorageError
from pipeline.formats import tables
from pipeline.rules.rollouts import JOB as ROLL_OUT_JOB
from pipeline.storage.base import Storage
from pipeline.work.manifest import Manifest, read_manifests
from pipeline.work.plan import read_plan

_COMMITS = pa.schema(
    [
        ("unit", pa.string()),
        ("attempt", pa.string()),
        ("samples", pa.int64()),
        ("seconds", pa.float64()),
        ("rejected", pa.int64()),
        ("summary", pa.map_(pa.string(), pa.float64())),  # empty for a shard without usable images
    ]
)


@contextmanager
def connect(output: Storage) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection with views over the output of `air distill` or `air encode`.

    Both have the views `shards` and `quarantine`. Output of `air distill` also has `views` and `gaussians`, that of
    `air distill --rule` `roll_outs` and `samples`; output of `air encode` also has `images`.

    Local files are read in place. Remote files are copied to this machine first, because DuckDB's own readers for
    object stores are extensions that would have to be downloaded.

    Raises:
        StorageError: The folder is not the output of one of these jobs, or nothing is committed yet.
    """
    plan = read_plan(output)
    if plan.job not in ("distill", ROLL_OUT_JOB, "encode"):
        raise StorageError(f"{output.uri()} is the output of `air {plan.job}`, not of `air distill` or `air encode`")
    manifests = list(read_manifests(output))
    if not manifests:
        raise StorageError(f"{output.uri()} has no committed shard yet; see `air status`")
    with ExitStack() as stack, duckdb.connect() as connection:
        rows, refused = (
            [str(stack.enter_context(output.local_file(file.path))) for file in files]
            for files in (
                [file for manifest in manifests for file in manifest.files if file.path.endswith(".parquet")],
                [manifest.quarantine for manifest in manifests if manifest.quarantine],
            )
        )
        if plan.job == "encode":
            connection.execute(f"create view images as select * from {_parquet(rows)}")
        elif plan.job == ROLL_OUT_JOB:
            connection.execute(f"create view roll_outs as select * from {_parquet(rows)}")
            connection.execute(f"create view samples as select {_unnested_samples()} from roll_outs")
        else:
            connection.execute(f"create view views as select *, psnr_target[-1] as psnr from {_parquet(rows)}")
            connection.execute(f"create view gaussians as select {_unnested()} from views")
        if refused:
            connection.execute(f"create view quarantine as select * from {_parquet(refused)}")
        else:
            connection.register("quarantine", tables.QUARANTINE.empty_table())
        connection.register("shards", _commits(manifests))
        yield connection


def _unnested() -> str:
    return ", ".join(["key", "view", *_unnest(tables.TARGETS, "per Gaussian")])


def _unnested_samples() -> str:
    return ", ".join(["key", "fit", *_unnest(tables.ROLL_OUTS, "per sample")])


def _unnest(schema: pa.Schema, unit: str) -> list[str]:
    """Expressions that give a row to each entry of the lists whose unit begins so."""
    lists = [field.name for field in schema if field.metadata[b"unit"].decode().startswith(unit)]
    return [f"unnest({name}) as {name}" for name in lists]


def _parquet(paths: Sequence[str]) -> str:
    listed = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    return f"read_parquet([{listed}])"


def _commits(manifests: Sequence[Manifest]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "unit": manifest.unit,
                "attempt": manifest.attempt,
                "samples": manifest.samples,
                "seconds": manifest.seconds,
                "rejected": sum(manifest.rejected.values()),
                "summary": list(manifest.summary.items()),
            }
            for manifest in manifests
        ],
        schema=_COMMITS,
    )
