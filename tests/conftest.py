"""What every test shares: the same examples from hypothesis in each run of the gate."""

from __future__ import annotations

import os

from hypothesis import settings

from fix_cli import line
from fix_s3 import s3_proxy, s3_server
from fix_server import (
    every_version,
    installations,
    new_server,
    new_server_of_module,
    shared_folder,
    templates,
)
from fix_standby import standby_of

__all__ = [
    "every_version",
    "installations",
    "line",
    "new_server",
    "new_server_of_module",
    "s3_proxy",
    "s3_server",
    "shared_folder",
    "standby_of",
    "templates",
]

settings.register_profile("gate", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))
