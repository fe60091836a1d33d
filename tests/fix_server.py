"""Real servers for tests: one template per version, copied for each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from knockwood.host import privileges
from knockwood.postgres.binaries import Programs, installed
from knockwood.postgres.server import LocalServer, init_cluster

VERSIONS = (15, 17, 18)

ServerFactory = Callable[..., LocalServer]


@pytest.fixture(scope="session")
def installations() -> dict[int, Programs]:
    return {programs.major: programs for programs in installed()}


@pytest.fixture(scope="session")
def shared_folder() -> Iterator[Path]:
    """A folder that the servers' account can enter; pytest's own is closed to others at each start."""
    folder = Path(tempfile.mkdtemp(prefix="knockwood-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def templates(shared_folder: Path, installations: dict[int, Programs]) -> Callable[[int, int], Path]:
    """The data directory of a fresh cluster of a version and segment size, made once."""
    made: dict[tuple[int, int], Path] = {}

    def template(major: int, segment_megabytes: int = 16) -> Path:
        key = (major, segment_megabytes)
        if key not in made:
            folder = shared_folder / f"template-{major}-{segment_megabytes}"
            folder.mkdir()
            account = privileges.server_account()
            privileges.give(folder, account)
            init_cluster(
                installations[major], folder / "data", account=account, segment_megabytes=segment_megabytes
            )
            made[key] = folder / "data"
        return made[key]

    return template


@pytest.fixture
def new_server(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
    request: pytest.FixtureRequest,
) -> Iterator[ServerFactory]:
    """Make servers: `new_server(18, wal_level="logical")` returns a started LocalServer.

    `segment_megabytes=1` makes small WAL segments. Skips where that version is not installed
    (18 always is). Everything is stopped and removed afterwards.
    """
    yield from _factory(shared_folder, templates, installations, request)


@pytest.fixture(scope="module")
def new_server_of_module(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
    request: pytest.FixtureRequest,
) -> Iterator[ServerFactory]:
    """The same for servers that all tests of a module share."""
    yield from _factory(shared_folder, templates, installations, request)


def _factory(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
    request: pytest.FixtureRequest,
) -> Iterator[ServerFactory]:
    servers: list[LocalServer] = []

    def make(
        major: int = 18, *, segment_megabytes: int = 16, start: bool = True, **settings: str
    ) -> LocalServer:
        if major not in installations:
            if major == 18:
                pytest.fail("PostgreSQL 18 is part of the test installation and was not found")
            pytest.skip(f"PostgreSQL {major} is not installed")
        account = privileges.server_account()
        folder = shared_folder / f"{abs(hash((request.node.nodeid, request.scope))):x}-{len(servers)}"
        folder.mkdir()
        privileges.give(folder, account)
        shutil.copytree(templates(major, segment_megabytes), folder / "data", symlinks=True)
        privileges.give_tree(folder / "data", account)
        (folder / "data").chmod(0o700)
        options = {"fsync": "off", "autovacuum": "off", "max_wal_senders": "10"} | settings
        server = LocalServer(installations[major], folder / "data", account=account, settings=options)
        servers.append(server)
        if start:
            server.start()
        return server

    yield make
    for server in servers:
        server.stop("immediate")
        shutil.rmtree(server.data_directory.parent, ignore_errors=True)


@pytest.fixture(params=VERSIONS)
def every_version(request: pytest.FixtureRequest) -> int:
    """Runs the test once per PostgreSQL version of the matrix."""
    version: int = request.param
    return version
