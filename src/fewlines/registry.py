"""Whatever is found by itself: a file in a package of ours, or an entry point of another
package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TypeVar

from fewlines.errors import FewlinesError

Base = TypeVar("Base")


@lru_cache
def discover(base: type[Base], package: str) -> dict[str, type[Base]]:
    """Find the concrete classes below `base` that have a `name`, sorted by it.

    Args:
        base: the interface that they implement.
        package: whose modules are searched, such as `fewlines.cache.policies`; another installed
            package adds its own by an entry point of this group.

    Raises:
        FewlinesError: an entry point names something else than such a class.
    """
    parent = importlib.import_module(package)
    found: dict[str, type[Base]] = {}
    for module_info in pkgutil.iter_modules(parent.__path__, f"{package}."):
        for member in vars(importlib.import_module(module_info.name)).values():
            if _is_concrete(member, base):
                found[member.name] = member
    for point in entry_points(group=package):
        member = point.load()
        if not _is_concrete(member, base):
            raise FewlinesError(f"entry point {point.name} of {package}: not a {base.__name__}")
        found[member.name] = member
    return dict(sorted(found.items()))


def _is_concrete(member: object, base: type) -> bool:
    return (
        isinstance(member, type)
        and issubclass(member, base)
        and not inspect.isabstract(member)
        and hasattr(member, "name")
    )
