"""Options that every command takes, and the way from them to a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from knockwood.operations.cluster import Cluster
from knockwood.settings import choose_cluster, load


@Parameter(name="*", group="Common")
@dataclass(frozen=True, slots=True)
class Common:
    """Every command takes these."""

    config: Annotated[Path | None, Parameter(help="The settings file; otherwise looked for.")] = None
    cluster: Annotated[str | None, Parameter(help="The cluster meant; not needed with one.")] = None
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False

    def open_cluster(self) -> Cluster:
        """Load the settings and pick the cluster; raises SettingsError."""
        settings = load(self.config)
        name, _ = choose_cluster(settings, self.cluster)
        return Cluster.of(settings, name)


DEFAULT = Common()
