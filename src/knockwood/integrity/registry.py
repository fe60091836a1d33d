"""Every check by name. A file in `checks/` that holds `CHECK` is a check; nothing else needs to know it."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Iterable

from knockwood.errors import UsageError
from knockwood.integrity import checks
from knockwood.integrity.check import Check, Weight


@functools.cache
def all_checks() -> tuple[Check, ...]:
    """Every check: light ones first, then by name, so that the same run has the same order."""
    found: list[Check] = []
    for module in pkgutil.iter_modules(checks.__path__, f"{checks.__name__}."):
        check: Check | None = getattr(importlib.import_module(module.name), "CHECK", None)
        if check is not None:
            found.append(check)
    names = [check.name for check in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"two checks have the same name: {', '.join(doubled)}")
    return tuple(sorted(found, key=lambda check: (check.weight is Weight.HEAVY, check.name)))


def select(names: Iterable[str] | None = None, weights: Iterable[Weight] | None = None) -> tuple[Check, ...]:
    """The checks of these names (all, if None) and weights (all, if None), in the registry's order.

    A name may be written with `-` for `_`. Raises UsageError for a name that is none, with the nearest.
    """
    checks_known = all_checks()
    if names is not None:
        wanted = {name.replace("-", "_") for name in names}
        known = [check.name for check in checks_known]
        for name in sorted(wanted.difference(known)):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise UsageError(f"no check is called {name}", hint=hint)
        checks_known = tuple(check for check in checks_known if check.name in wanted)
    if weights is not None:
        kept = set(weights)
        checks_known = tuple(check for check in checks_known if check.weight in kept)
    return checks_known
