"""HDR systems built on the operators, by name: ``hdrops.models.create("name", **config)``."""

from collections.abc import Callable

from torch import nn

_REGISTRY: dict[str, Callable[..., nn.Module]] = {}


def register(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator: makes a constructor known to :func:`create` under ``name``."""

    def add(constructor: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _REGISTRY:
            raise ValueError(f"models.register: the name {name!r} is taken")
        _REGISTRY[name] = constructor
        return constructor

    return add


def names() -> list[str]:
    """The systems this version has, sorted."""
    return sorted(_REGISTRY)


def create(name: str, **config: object) -> nn.Module:
    """Builds the system ``name`` with its defaults overridden by ``config``.

    Raises:
        ValueError: no system has that name; the message lists those there are.
    """
    if name not in _REGISTRY:
        known = ", ".join(names()) or "none in this version"
        raise ValueError(f"models.create: unknown model {name!r}; known: {known}")
    return _REGISTRY[name](**config)
