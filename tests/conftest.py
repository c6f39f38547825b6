"""Fixtures for every room: small pictures, folders of them, an S3 server, and one local Ray for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.paths import ROOT

# Ray workers and spawned processes must find the project and the toy job.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder `pictures` with six PNG files, two of them in a folder below."""
    from tests.support.toys import encode_picture

    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for number in range(6):
        place = folder / "below" if number % 3 == 2 else folder
        (place / f"{number}.png").write_bytes(encode_picture(number))
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four photographs that scikit-image and scikit-learn ship, at 96 pixels, as PNG and JPEG."""
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    datasets = pytest.importorskip("sklearn.datasets", reason="two photographs come with scikit-learn")
    folder = tmp_path_factory.mktemp("photographs")
    scenes = {
        "astronaut.png": data.astronaut(),
        "chelsea.jpg": data.chelsea(),
        "china.jpg": datasets.load_sample_image("china.jpg"),
        "flower.png": datasets.load_sample_image("flower.jpg"),
    }
    for name, pixels in scenes.items():
        picture = Image.fromarray(pixels)
        picture.thumbnail((96, 96))
        picture.save(folder / name)
    return folder


@pytest.fixture(scope="session")
def shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs in two shards, to be read only."""
    from jobs.shard import shard
    from pipeline.bulk.shard import ShardConfig
    from pipeline.config import RunnerConfig

    folder = tmp_path_factory.mktemp("photographs") / "shards"
    shard([str(photographs)], str(folder), ShardConfig(max_count=2), RunnerConfig(executor="inline"))
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this machine, shared by all tests: jobs find it initialised.

    It has more slots than cores, and two GPUs that exist in its books alone.
    """
    import ray

    slots = max(4, (os.cpu_count() or 1) + 1)
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init("local", num_cpus=slots, num_gpus=2, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """A bucket on an S3 server of this machine, found through the usual environment variables."""
    boto3 = pytest.importorskip("boto3", reason="the S3 tests need boto3 (pip install -e '.[dev]')")
    server_module = pytest.importorskip("moto.server", reason="the S3 tests need moto[server] (pip install '.[dev]')")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()
