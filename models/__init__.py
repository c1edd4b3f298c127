"""HDR systems built on the operators, by name: ``hdrops.models.create("sthdr", **config)``."""

import importlib

from hdrops.models._system import System

# name -> module and class; a module is imported when its system is asked for.
_SYSTEMS = {
    "sthdr": ("hdrops.models.sthdr", "STHDR"),
    "eapnet": ("hdrops.models.eapnet", "EAPNet"),
    "duhdr": ("hdrops.models.duhdr", "DuHDR"),
    "apnt": ("hdrops.models.apnt", "APNTFusion"),
    "diffhdr": ("hdrops.models.diffhdr", "DiffHDR"),
}

__all__ = ["System", "create", "names", "system"]


def names() -> list[str]:
    """The names of the systems."""
    return list(_SYSTEMS)


def system(name: str) -> type[System]:
    """The class of the system ``name``.

    Raises:
        ValueError: no system has that name; the message lists those there are.
    """
    if not isinstance(name, str) or name not in _SYSTEMS:
        raise ValueError(f"models: unknown model {name!r}; known: {', '.join(_SYSTEMS)}")
    module, title = _SYSTEMS[name]
    found: type[System] = getattr(importlib.import_module(module), title)
    return found


def create(name: str, **config: object) -> System:
    """Builds the system ``name``, with ``config`` in place of its defaults.

    Example:
        >>> import hdrops.models
        >>> model = hdrops.models.create("sthdr", variant="hss")
        >>> model.config.variant
        'hss'

    Raises:
        ValueError: no system has that name, or it has no such option or value; the message lists those there are.
    """
    return system(name).build(**config)
