"""One cluster of the settings, with the doors to its server, its repository and its programs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from knockwood.errors import SettingsError
from knockwood.host.state import state_folder
from knockwood.integrity.check import Budget, Invariant, Role, Schedule, Subject
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import ServerFacts, connect, server_facts, with_words
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage
from knockwood.settings import ClusterSettings, Settings


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster as the settings name it. Nothing is opened until asked for."""

    name: str
    settings: ClusterSettings
    state: Path

    @classmethod
    def of(cls, settings: Settings, name: str) -> Cluster:
        return cls(name, settings.cluster[name], state_folder(settings.state))

    def as_role(self, role: str | None) -> Cluster:
        """The same cluster, connected to as another role: repairs need a superuser, and nothing else does."""
        if role is None:
            return self
        dsn = with_words(self.settings.dsn, user=role)
        return replace(self, settings=self.settings.model_copy(update={"dsn": dsn}))

    @property
    def dsn(self) -> str:
        return self.settings.dsn

    @property
    def spools(self) -> Path:
        """The folder of the receiver's spools: one for each cluster that has had this name."""
        return self.settings.wal.spool or self.state / self.name / "spool"

    def spool(self, system_identifier: int) -> Path:
        """Where the receiver keeps WAL that is not in the repository yet."""
        return self.spools / str(system_identifier)

    @property
    def clones(self) -> Path:
        """Where throw-away clones are made."""
        return self.settings.proof.clones or self.state / "clones"

    def identities(self) -> tuple[str, ...]:
        """The age identities of the identity file; none where none is set."""
        path = self.settings.backup.identity_file
        if path is None:
            return ()
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise SettingsError(
                "the identity file cannot be read", where=str(path), hint=str(error.strerror)
            ) from error
        return tuple(line.strip() for line in lines if line.startswith("AGE-SECRET-KEY-"))

    def repository(self, *, expected_system: int | None = None) -> Repository:
        """Open the repository; raises RepositoryError or WrongSystemError."""
        return Repository.open(
            open_storage(self.settings.repository),
            expected_system=expected_system,
            recipients=tuple(self.settings.backup.encrypt_to),
            identities=self.identities(),
        )

    def create_repository(self) -> Repository:
        """Make the repository for the running server, or open the one that is there already."""
        facts = self.facts()
        return Repository.create(
            open_storage(self.settings.repository),
            cluster=self.name,
            system_identifier=facts.system_identifier,
            segment_bytes=facts.segment_bytes,
            recipients=tuple(self.settings.backup.encrypt_to),
            identities=self.identities(),
        )

    def facts(self, expected_system: int | None = None) -> ServerFacts:
        """Ask the server what it is."""
        with connect(self.dsn) as connection:
            return server_facts(connection, expected_system)

    def programs(self, major: int) -> Programs:
        return find_programs(major, self.settings.programs)

    def invariants(self) -> tuple[Invariant, ...]:
        return tuple(
            Invariant(entry.name, entry.sql, entry.database, entry.severity)
            for entry in self.settings.invariant
        )

    def subject(self, budget: Budget, *, repository: Repository | None = None) -> Subject:
        """The running server as the checks see it."""
        system = repository.header.system_identifier if repository else None
        facts = self.facts(system)
        folder = self.settings.data_directory
        return Subject(
            cluster=self.name,
            dsn=self.dsn,
            facts=facts,
            role=Role.STANDBY if facts.in_recovery else Role.PRIMARY,
            data_directory=folder,
            repository=repository,
            programs=self.programs(facts.major),
            invariants=self.invariants(),
            budget=budget,
            state=self.state,
            schedule=self.schedule(),
        )

    def schedule(self) -> Schedule:
        """How fresh backups and proofs are to be."""
        backup = self.settings.backup
        return Schedule(backup.full, backup.incremental, self.settings.proof.valid)
