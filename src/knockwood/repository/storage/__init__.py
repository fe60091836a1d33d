"""Where objects lie: a local folder with its own fsync discipline, or an object store."""

from knockwood.repository.storage.base import ObjectInfo, Storage
from knockwood.repository.storage.open import open_storage

__all__ = ["ObjectInfo", "Storage", "open_storage"]
