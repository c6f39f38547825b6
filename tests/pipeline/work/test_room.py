"""A cluster without room for the workers is named within seconds, and does not stay a secret for ever."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pipeline.errors import JobFailedError
from pipeline.work import room
from pipeline.work.room import RoomWatch, room_on

ray = pytest.importorskip("ray")


class Cluster:
    """Nodes of four CPUs by name, and a clock."""

    def __init__(self, *names: str) -> None:
        self.time = 0.0
        self.names = names

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": name, "NodeManagerHostname": name, "Resources": {"CPU": 4.0, "memory": 1e9}}
            for name in self.names
        ] + [{"Alive": False, "NodeID": "long gone", "NodeManagerHostname": "long gone", "Resources": {"CPU": 64.0}}]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster("one", "two")
    monkeypatch.setattr(ray, "nodes", cluster.nodes)
    monkeypatch.setattr(room.time, "monotonic", lambda: cluster.time)
    return cluster


def look(watch: RoomWatch, cluster: Cluster, seconds: float = 5) -> None:
    cluster.time += seconds
    watch.look()


def test_a_lost_node_is_named_once_and_its_successor_welcomed(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    watch = RoomWatch(2, {"CPU": 4.0}, None)
    look(watch, cluster)
    assert caplog.messages == []
    cluster.names = ("one",)
    look(watch, cluster)
    look(watch, cluster)
    (said,) = caplog.messages
    assert "2 workers with 4 CPU each, and the cluster has room for 1; gone: two" in said
    assert "lower --workers" in said
    cluster.names = ("one", "three")
    look(watch, cluster)
    assert caplog.messages[1:] == ["the cluster has room for all 2 workers again"]


def test_waiting_ends_where_it_is_bounded(cluster: Cluster) -> None:
    watch = RoomWatch(3, {"CPU": 4.0}, 60)
    look(watch, cluster)
    look(watch, cluster, 59)
    with pytest.raises(JobFailedError, match=r"waited 60 s .* any number of --workers"):
        look(watch, cluster, 3)


@pytest.mark.parametrize(
    ("node", "resources", "room"),
    [
        ({"CPU": 4.0}, {"CPU": 2.0}, 2),
        ({"CPU": 4.0}, {"CPU": 3.0}, 1),
        ({"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}, 0),
        ({"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.1}, 4),
        ({"CPU": 64.0, "GPU": 0.3}, {"CPU": 1.0, "GPU": 0.1}, 3),
        ({}, {"CPU": 1.0}, 0),
    ],
)
def test_room_on_a_node(node: dict[str, float], resources: dict[str, float], room: int) -> None:
    assert room_on(node, resources) == room
