"""The history's index is made while WAL is received, unless the settings say otherwise."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fix_receive import commit, new_repository
from fix_server import ServerFactory
from knockwood.history import store
from knockwood.host import clock
from knockwood.operations import protect
from knockwood.operations.cluster import Cluster
from knockwood.repository.receive_events import EventKind, ReceiverEvent
from knockwood.settings import ClusterSettings


@pytest.mark.parametrize("follow", [True, False])
def test_segments_are_indexed_as_they_are_archived(
    new_server: ServerFactory, tmp_path: Path, follow: bool
) -> None:
    server = new_server(18, segment_megabytes=1)
    repository = new_repository(server, tmp_path / "repository")
    settings = ClusterSettings.model_validate(
        {
            "dsn": server.dsn(),
            "repository": repository.storage.url,
            "programs": server.programs.folder,
            "history": {"follow": follow},
        }
    )
    cluster = Cluster("shop", settings, tmp_path / "state")
    stop = threading.Event()
    events: list[ReceiverEvent] = []
    thread = threading.Thread(target=protect.receive_forever, args=(cluster, events.append, stop))
    thread.start()
    try:
        _wait(lambda: any(event.kind is EventKind.STREAMING for event in events))
        commit(server, switch=True)
        _wait(lambda: any(event.segment is not None for event in events))
        (archived, *_) = [event.segment.name for event in events if event.segment is not None]
        if follow:
            _wait(lambda: archived in store.heads(repository))
    finally:
        stop.set()
        thread.join()
    assert bool(store.heads(repository)) is follow
    assert EventKind.INDEX_PROBLEM not in [event.kind for event in events]


def _wait(for_what: object, seconds: float = 600) -> None:
    assert callable(for_what)
    deadline = clock.monotonic() + seconds
    while not for_what():
        assert clock.monotonic() < deadline
        clock.sleep(0.05)
