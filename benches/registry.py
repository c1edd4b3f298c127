"""The benchmark cases: what is timed, against whom, and which ratio is the goal.

A case makes its inputs once and returns contenders, callables without arguments that do the same work on the same
data. The contender named "hdrops" is ours; "hdrops ..." is ours in another setting. A peer that is not installed is
left out. `goals` maps a peer to the ratio peer time / hdrops time to reach (for "dense conv2d", where the
goal is to be hardly slower than an easier problem, the ratio is below one).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

Contenders = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Attributes:
        name: family, direction and shape, as printed.
        build: makes the inputs and returns the contenders.
        goals: peer -> ratio of design to reach on one core.
        flops: floating-point operations of the mathematics (2 per multiply-add), 0 where memory is the limit.
        bytes: bytes that must be read and written at least.
        threads: thread counts to run at.
        partners: peer -> which of our contenders does the same work in the same layout, where that is not "hdrops".
    """

    name: str
    build: Callable[[], Contenders]
    goals: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    threads: tuple[int, ...] = (1,)
    partners: dict[str, str] = field(default_factory=dict)


def optional(name: str) -> ModuleType | None:
    """A peer's module, or None where it is not installed or does not import with this torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


def cases() -> list[Case]:
    """Every case of every family, in the order they are reported."""
    from benches import bench_camera, bench_crf, bench_deform_conv2d, bench_global_context, bench_patch_match

    families = (bench_deform_conv2d, bench_patch_match, bench_global_context, bench_crf, bench_camera)
    return [case for family in families for case in family.CASES]
