"""configs/cluster/: each file against its published schema, and each command line in it against our own parser."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from air.version import __version__
from jobs.command import check_command
from tests.support.paths import ROOT

pytest.importorskip("kubernetes_validate", reason="the schemas of Kubernetes come with kubernetes-validate ('.[dev]')")
jsonschema = pytest.importorskip("jsonschema", reason="schemas are checked with jsonschema ('.[dev]')")

from packaging.requirements import Requirement  # noqa: E402
from packaging.version import Version  # noqa: E402

from tests.support.manifests import (  # noqa: E402
    FIELDS,
    SCHEMAS,
    keys_of,
    problems_of,
    published_problems,
    read_manifests,
    renamed,
)

FOLDER = ROOT / "configs" / "cluster"
AUTOSCALER = FOLDER / "ray-autoscaler.yaml"
MANIFESTS = sorted(set(FOLDER.glob("*.yaml")) - {AUTOSCALER})
RAY_JOBS = sorted(FOLDER.glob("rayjob-*.yaml"))
UNITS = sorted([*FOLDER.glob("*.service"), *FOLDER.glob("*.timer")])
DOCKERFILES = sorted(FOLDER.glob("Dockerfile*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FREE = frozenset({"rayStartParams", "requests", "limits", "labels"})
"""Fields whose keys anybody may choose."""

by_name = {"ids": lambda file: file.name}


def test_the_folder_has_what_the_documents_promise() -> None:
    assert {file.name for file in RAY_JOBS} == {
        f"rayjob-{job}.yaml" for job in ("distill", "encode", "retrain", "train")
    }
    assert len(MANIFESTS) == len(RAY_JOBS) + 2
    assert len(UNITS) == len(DOCKERFILES) == 2


# Kubernetes.


@pytest.mark.parametrize("file", MANIFESTS, **by_name)
def test_a_manifest_fits_the_published_schemas(file: Path) -> None:
    for manifest in read_manifests(file):
        assert list(problems_of(manifest)) == []


@pytest.mark.parametrize("name", ["rayjob-train.yaml", "cronjob-retrain.yaml"])
def test_a_misspelt_field_is_caught(name: str) -> None:
    """Every field of a manifest, one at a time."""
    for manifest in read_manifests(FOLDER / name):
        paths = list(keys_of(manifest, FREE))
        assert len(paths) >= 4
        assert [path for path in paths if next(problems_of(renamed(manifest, path)), None) is None] == []


def test_a_misspelt_field_is_caught_by_the_published_schemas_alone() -> None:
    if not SCHEMAS.is_dir():
        pytest.skip(f"KubeRay's published schemas are not at {SCHEMAS}")
    for name in ("rayjob-train.yaml", "raycluster.yaml"):
        (manifest,) = read_manifests(FOLDER / name)
        below = keys_of({"spec": manifest["spec"]}, FREE)
        assert [path for path in below if next(published_problems(renamed(manifest, path)), None) is None] == []


def test_kuberay_knows_the_fields_that_are_used() -> None:
    """So that the check holds something where the published schemas are not there."""
    if not SCHEMAS.is_dir():
        pytest.skip(f"KubeRay's published schemas are not at {SCHEMAS}")
    for kind, fields in FIELDS.items():
        schema = json.loads((SCHEMAS / f"ray.io_{kind.lower()}s.v1.schema.json").read_text())
        assert list(unknown_to(schema, fields, kind)) == []


def unknown_to(schema: Any, fields: Any, where: str) -> Iterator[str]:
    """The fields of `fields` that a schema does not have."""
    if isinstance(fields, list):
        yield from unknown_to(schema.get("items", {}), fields[0], where)
    elif isinstance(fields, dict):
        for key, inner in fields.items():
            if key not in schema.get("properties", {}):
                yield f"{where}.{key}"
            else:
                yield from unknown_to(schema["properties"][key], inner, f"{where}.{key}")


def test_all_clusters_are_built_alike() -> None:
    """What differs between the manifests is the image, and how many nodes of what size there are."""
    specs = [cluster_of(manifest) for file in FOLDER.glob("ray[cj]*.yaml") for manifest in read_manifests(file)]
    assert len(specs) == len(RAY_JOBS) + 1
    for spec in specs:
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert re.fullmatch(rf"registry\.example\.com/air(-cuda)?:{re.escape(__version__)}", container.pop("image"))
            assert ("nvidia.com/gpu" in container.pop("resources")["limits"]) == (group.get("groupName") == "gpu")
            for key in ("groupName", "replicas", "minReplicas", "maxReplicas"):
                group.pop(key, None)
    assert all(spec == specs[0] for spec in specs)


def cluster_of(manifest: Any) -> Any:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def test_nodes_with_gpus_run_the_image_for_them() -> None:
    for file in FOLDER.glob("ray[cj]*.yaml"):
        (manifest,) = read_manifests(file)
        for group in cluster_of(manifest)["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            assert ("/air-cuda:" in container["image"]) == ("nvidia.com/gpu" in container["resources"]["limits"])


# The commands.


def unit_of(text: str) -> configparser.ConfigParser:
    """The sections of a systemd unit."""
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(text)
    return parser


def commands() -> Iterator[tuple[str, str]]:
    """The command lines of our own in the folder, each with the name of its file."""
    for file in RAY_JOBS:
        (manifest,) = read_manifests(file)
        yield file.name, manifest["spec"]["entrypoint"]
    for file in FOLDER.glob("*.service"):
        yield file.name, unit_of(file.read_text())["Service"]["ExecStart"]


@pytest.mark.parametrize(("file", "line"), list(commands()))
def test_a_command_line_is_one_of_ours(file: str, line: str) -> None:
    """With the configuration that it names, which docs/cluster.md puts into /etc/air."""
    program, command, *rest = shlex.split(line)
    assert Path(program).name == "air"
    named = [word for word in rest if word.startswith("/etc/air/")]
    assert len(named) == 1, "a file of configs/ says how the command runs"
    checked = check_command(command, [word.replace("/etc/air/", f"{ROOT}/configs/") for word in rest])
    assert all(value.startswith("s3://bucket/") for value in checked.positionals)


@pytest.mark.parametrize("file", RAY_JOBS, **by_name)
def test_a_job_that_is_tried_again_goes_on_and_a_round_is_not(file: Path) -> None:
    """The second try of a refused candidate would find nothing to do, and end well."""
    (manifest,) = read_manifests(file)
    assert (manifest["spec"]["backoffLimit"] == 0) == (file.name == "rayjob-retrain.yaml")


# The CronJob.


def cron_parts() -> dict[str, Any]:
    return {manifest["kind"]: manifest for manifest in read_manifests(FOLDER / "cronjob-retrain.yaml")}


def test_the_cron_job_may_do_what_it_does_and_nothing_else() -> None:
    parts = cron_parts()
    pod = parts["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    account = parts["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    (subject,) = parts["RoleBinding"]["subjects"]
    assert (subject["kind"], subject["name"]) == ("ServiceAccount", account)
    assert parts["RoleBinding"]["roleRef"]["name"] == parts["Role"]["metadata"]["name"]
    (rule,) = parts["Role"]["rules"]
    script = pod["containers"][0]["args"][0]
    assert sorted(set(re.findall(r"kubectl (\w+)", script))) == sorted(rule["verbs"])
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])


def test_a_round_is_never_started_beside_another() -> None:
    spec = cron_parts()["CronJob"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    (round_,) = read_manifests(FOLDER / "rayjob-retrain.yaml")
    assert "name" not in round_["metadata"]  # each round has a name of its own
    assert len(round_["metadata"]["generateName"]) <= 42  # KubeRay takes 47 letters, five of which are made up
    assert round_["spec"]["activeDeadlineSeconds"] < spec["jobTemplate"]["spec"]["activeDeadlineSeconds"]


FAKE_KUBECTL = """#!/bin/sh
case $1 in
  create) test "$2" = --filename=/manifests/rayjob-retrain.yaml && echo rayjob.ray.io/air-retrain-x7k2p ;;
  get)
    test "$2" = rayjob.ray.io/air-retrain-x7k2p || exit 9
    line=$(head -n 1 "$ANSWERS"); sed -i 1d "$ANSWERS"
    test "$line" != none || exit 1
    printf %s "$line" ;;
esac
"""


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        (["air-retrain-x7k2p  ", "air-retrain-x7k2p Running RUNNING", "air-retrain-x7k2p Complete SUCCEEDED"], 0),
        (["air-retrain-x7k2p Running RUNNING", "none", "air-retrain-x7k2p Complete SUCCEEDED"], 0),
        (["air-retrain-x7k2p Running RUNNING", "air-retrain-x7k2p Failed FAILED"], 1),
        (["air-retrain-x7k2p Failed "], 1),  # its deadline
        (["air-retrain-x7k2p Complete STOPPED"], 1),
        (["air-retrain-x7k2p Running RUNNING", ""], 1),
    ],
)
def test_the_cron_job_waits_for_its_round_and_ends_as_it_does(tmp_path: Path, answers: list[str], status: int) -> None:
    """The pod's script, with a kubectl that answers from a list; `none` is an API server that does not answer."""
    container = cron_parts()["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    for name, text in (("kubectl", FAKE_KUBECTL), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "answers").write_text("\n".join(answers) + "\n")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ANSWERS": str(tmp_path / "answers")}
    command = [*container["command"], *container["args"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith("created rayjob.ray.io/air-retrain-x7k2p\n")
    assert (tmp_path / "answers").read_text() == ""


# Ray's own autoscaler.


def autoscaler_problems(document: Any) -> list[str]:
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def test_the_autoscaler_fits_rays_own_schema_and_a_misspelt_field_does_not() -> None:
    (document,) = read_manifests(AUTOSCALER)
    assert autoscaler_problems(document) == []
    free = frozenset({"provider", "node_config", "resources", "file_mounts", "available_node_types"})
    types = [
        ("available_node_types", *path) for path in keys_of(document["available_node_types"], free) if len(path) > 1
    ]
    paths = [*keys_of(document, free), *types]
    assert len(paths) >= 15
    assert [path for path in paths if not autoscaler_problems(renamed(document, path))] == []


def test_the_autoscaler_starts_the_image_of_the_nodes() -> None:
    (document,) = read_manifests(AUTOSCALER)
    assert document["docker"]["image"] == f"registry.example.com/air:{__version__}"
    assert document["head_node_type"] in document["available_node_types"]


# systemd.


def verified(folder: Path, change: tuple[str, str] = ("", "")) -> subprocess.CompletedProcess[str]:
    """What systemd says of the units, with a program that exists here, and after a change of their text."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    for file in UNITS:
        text = file.read_text().replace(*change) if change[0] else file.read_text()
        (folder / file.name).write_text(text.replace("/opt/air/bin/air ", f"{sys.executable} "))
    units = [str(folder / file.name) for file in UNITS]
    return subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)


def test_the_units_are_what_systemd_takes(tmp_path: Path) -> None:
    done = verified(tmp_path)
    ours = [line for line in done.stderr.splitlines() if "air-retrain" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("Type=oneshot", "Tipe=oneshot"), ("OnCalendar=*-*-* 02:00:00", "OnCalendar=two"), ("KillMode=", "KilMode=")],
)
def test_a_misspelt_unit_is_caught(tmp_path: Path, right: str, wrong: str) -> None:
    assert "air-retrain" in verified(tmp_path, (right, wrong)).stderr


def test_the_timer_starts_the_service_and_the_service_is_no_root() -> None:
    assert {file.suffix for file in UNITS} == {".service", ".timer"}
    assert len({file.stem for file in UNITS}) == 1
    service = unit_of((FOLDER / "air-retrain.service").read_text())["Service"]
    assert service["User"] not in ("", "root")
    assert service["Type"] == "oneshot"
    assert unit_of((FOLDER / "air-retrain.timer").read_text())["Install"]["WantedBy"] == "timers.target"


# Images.


def instructions_of(file: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, such as ("USER", "1000")."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize("file", DOCKERFILES, **by_name)
def test_an_image_has_the_versions_of_the_project(file: Path) -> None:
    instructions = instructions_of(file)
    assert {name for name, _ in instructions} - {"ARG"} == {"FROM", "WORKDIR", "COPY", "RUN", "USER"}
    found = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)-(cpu|gpu)", instructions[0][1])
    assert found, "a base image of Ray with its versions"
    assert found[4] == ("gpu" if file.suffix == ".cuda" else "cpu")
    required = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
    assert Version(found[1]) in required["ray"]
    assert f"{found[2]}.{found[3]}" in Requirement(f"python{PROJECT['requires-python']}").specifier
    for cluster in (cluster_of(manifest) for path in FOLDER.glob("ray[cj]*.yaml") for manifest in read_manifests(path)):
        assert cluster["rayVersion"] == found[1]
    installed = " ".join(rest for name, rest in instructions if name == "RUN")
    for torch in re.findall(r'"(torch[^"]+)"', installed):
        assert Requirement(torch).specifier == required["torch"]
    extras = re.search(r'"\.\[([\w,]+)\]"', installed)
    assert extras
    assert {"cluster", "train"} <= set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("file", DOCKERFILES, **by_name)
def test_an_image_runs_as_a_user_without_root(file: Path) -> None:
    users = [rest for name, rest in instructions_of(file) if name == "USER"]
    assert users == ["1000"]
    for path in FOLDER.glob("ray[cj]*.yaml"):
        (manifest,) = read_manifests(path)
        for group in (cluster_of(manifest)["headGroupSpec"], *cluster_of(manifest)["workerGroupSpecs"]):
            assert group["template"]["spec"]["securityContext"] == {"runAsNonRoot": True, "runAsUser": int(users[0])}


@pytest.mark.parametrize("file", DOCKERFILES, **by_name)
def test_an_image_copies_what_there_is_and_all_that_the_package_needs(file: Path) -> None:
    copied = [word for name, rest in instructions_of(file) if name == "COPY" for word in rest.split()[1:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "air", "pipeline", "jobs"} == set(copied)
    assert f":{__version__} ." in file.read_text()
