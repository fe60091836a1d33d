"""knockwood.toml: its schema, its loading, and errors with file and line."""

from knockwood.settings.load import choose_cluster, find_file, load, parse
from knockwood.settings.schema import ClusterSettings, InvariantSettings, Settings

__all__ = [
    "ClusterSettings",
    "InvariantSettings",
    "Settings",
    "choose_cluster",
    "find_file",
    "load",
    "parse",
]
