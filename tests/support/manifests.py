"""Checks manifests of Kubernetes and of KubeRay as strictly as a careful reader: an unknown field is a problem.

Kubernetes' own kinds are checked against the schemas that the package kubernetes-validate has. KubeRay's kinds are
checked against its published schemas where they are there, and everywhere against `FIELDS`, what this project uses of
them; their pod templates are checked as Kubernetes' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.support.paths import ROOT

SCHEMAS = ROOT.parent / "shared" / "data" / "schemas"
"""KubeRay's published schemas; not part of the project."""

KUBERNETES = "1.34"
"""The version of Kubernetes whose schemas hold."""

_CLUSTER_FIELDS: dict[str, Any] = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int},
    "headGroupSpec": {"rayStartParams": dict, "template": dict},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": dict,
            "template": dict,
        }
    ],
}

FIELDS: dict[str, dict[str, Any]] = {
    "RayCluster": {"apiVersion": str, "kind": str, "metadata": dict, "spec": _CLUSTER_FIELDS},
    "RayJob": {
        "apiVersion": str,
        "kind": str,
        "metadata": dict,
        "spec": {
            "entrypoint": str,
            "backoffLimit": int,
            "activeDeadlineSeconds": int,
            "shutdownAfterJobFinishes": bool,
            "ttlSecondsAfterFinished": int,
            "rayClusterSpec": _CLUSTER_FIELDS,
        },
    },
}
"""KubeRay's fields that this project uses, with their types; `dict` is a map that others know."""


def problems_of(manifest: Any) -> Iterator[str]:
    """What is wrong with a manifest: a sentence for each problem, none if all is well."""
    if not isinstance(manifest, dict) or not {"apiVersion", "kind"} <= manifest.keys():
        yield "no apiVersion or no kind"
    elif manifest["apiVersion"] != "ray.io/v1":
        yield from _problems_of_kubernetes(manifest)
    elif manifest["kind"] not in FIELDS:
        yield f"kind {manifest['kind']} is none of KubeRay's"
    else:
        yield from _differences(manifest, FIELDS[manifest["kind"]], "")
        yield from _problems_of_kubernetes({"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]})
        for template in _templates(manifest):
            yield from _problems_of_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "template": template})
        yield from published_problems(manifest)


def published_problems(manifest: Any) -> Iterator[str]:
    """What KubeRay's published schema finds in a manifest of KubeRay; nothing where the schemas are not there."""
    if SCHEMAS.is_dir():
        yield from (error.message for error in _published(manifest["kind"].lower()).iter_errors(manifest))


def _problems_of_kubernetes(manifest: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{manifest['apiVersion']} has no kind {manifest['kind']}"]
    return []


def _differences(value: Any, fields: Any, where: str) -> Iterator[str]:
    """Fields that are not in `fields`, and values of another type."""
    if isinstance(fields, dict):
        if not isinstance(value, dict):
            yield f"{where} is no mapping"
            return
        for key, inner in value.items():
            if key in fields:
                yield from _differences(inner, fields[key], f"{where}.{key}")
            else:
                yield f"{where}.{key} is unknown"
    elif isinstance(fields, list):
        for number, inner in enumerate(value):
            yield from _differences(inner, fields[0], f"{where}[{number}]")
    elif type(value) is not fields:
        yield f"{where} = {value!r} is no {fields.__name__}"


def _templates(value: Any) -> Iterator[Any]:
    """The pod templates in a manifest of KubeRay."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key == "template":
            yield inner
        elif isinstance(inner, dict | list):
            for part in inner if isinstance(inner, list) else [inner]:
                yield from _templates(part)


@cache
def _published(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"ray.io_{kind}s.v1.schema.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(_closed(schema))


def _closed(schema: Any) -> Any:
    """A schema in which every object with properties has no others."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def keys_of(value: Any, free: frozenset[str]) -> Iterator[tuple[Any, ...]]:
    """The path of every key in nested mappings and lists, but for the keys of maps that are named in `free`."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(value, dict):
            yield (key,)
        if key not in free:
            yield from ((key, *path) for path in keys_of(inner, free))


def renamed(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy in which the last letter of the key at the path is doubled."""
    first, *rest = path
    if isinstance(value, list):
        return [renamed(inner, tuple(rest)) if number == first else inner for number, inner in enumerate(value)]
    if rest:
        return {key: renamed(inner, tuple(rest)) if key == first else inner for key, inner in value.items()}
    return {key + key[-1] if key == first else key: inner for key, inner in value.items()}


def read_manifests(file: Path) -> list[Any]:
    """The documents of a YAML file. A key that is given twice is an error, as for the API server."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"{file.name}: line {node.start_mark.line + 1}: a key is there twice"
            return super().construct_mapping(node, deep)

    return list(yaml.load_all(file.read_text(encoding="utf-8"), Strict))
