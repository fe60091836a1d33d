"""Base backups: taken, listed, fetched, expired."""

from knockwood.repository.backups.expire import ExpiryPlan, expire, plan_expiry
from knockwood.repository.backups.fetch import fetch_chain
from knockwood.repository.backups.listing import (
    list_backups,
    read_index,
    read_object,
    relation_map,
    scan_backups,
)
from knockwood.repository.backups.model import (
    Backup,
    BackupHealth,
    BadPage,
    Pack,
    Progress,
    Tablespace,
    chain,
)
from knockwood.repository.backups.partial import fetch_members, fetch_relations, read_block
from knockwood.repository.backups.take import Effort, take_backup

__all__ = [
    "Backup",
    "BackupHealth",
    "BadPage",
    "Effort",
    "ExpiryPlan",
    "Pack",
    "Progress",
    "Tablespace",
    "chain",
    "expire",
    "fetch_chain",
    "fetch_members",
    "fetch_relations",
    "list_backups",
    "plan_expiry",
    "read_block",
    "read_index",
    "read_object",
    "relation_map",
    "scan_backups",
    "take_backup",
]
