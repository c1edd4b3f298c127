"""How long each frame of a bracket was exposed: from the command line, a list file or EXIF.

An exposure here is a number of seconds. Where frames differ in aperture or sensitivity too, their times are converted
to the settings of the bracket's lowest ISO and smallest f-number: t * (ISO / ISO_min) * (N_min / N)^2, the light that
reached the sensor times its gain, so that the order of the frames changes nothing.

List files hold one frame a line: a name, relative to the list's folder, and numbers. What the numbers mean is told by

* a header (``# Filename exposure 1/shutter_speed f/stop ...``, the habit of HDR toolboxes and of Debevec's data);
* four numbers: time's inverse, aperture, ISO, ND filter, the ``.hdrgen`` files of pfstools;
* two numbers whose product is 1 in every line: time and its inverse;
* ``--list-column``, which overrules all of these.

A single number without a header is ambiguous: OpenCV's sample ``list.txt`` holds 1/time, many others hold the time. It
is then left open (``meaning`` None), and :func:`brighter_is_longer` decides by the frames themselves.
"""

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hdrops.io import InputError, read_exif

MEANINGS = ("exposure", "inverse", "ev")


def parse_times(text: str) -> list[float]:
    """Seconds from ``1/30,1/8,2``; :func:`check_exposures` judges the values."""
    times = []
    for word in _words(text):
        time = parse_number(word)
        if time is None:
            raise InputError(f"--times {text}: {word!r} is not a number of seconds")
        times.append(time)
    return times


def parse_evs(text: str) -> list[float]:
    """Relative exposures 2^EV from ``-2,0,2``: the frame of EV 0 counts as one second."""
    times = []
    for word in _words(text):
        ev = parse_number(word)
        if ev is None or abs(ev) > 100:
            raise InputError(f"--ev {text}: {word!r} is not an exposure value")
        times.append(2.0**ev)
    return times


def parse_number(word: str) -> float | None:
    """The value of ``0.5``, ``1/30`` or ``2e-3``; None if it is no number."""
    numerator, slash, denominator = word.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        return None


def in_words(seconds: float) -> str:
    """Seconds as cameras show them: ``1/30 s``, ``0.4 s``, ``2 s``."""
    if seconds < 0.3 and abs(1 / seconds - round(1 / seconds)) < 0.01 / seconds:
        return f"1/{round(1 / seconds)} s"
    return f"{seconds:.4g} s"


@dataclass(frozen=True)
class ExposureList:
    """A list file: names (empty if the lines hold numbers only), values, what they mean, and each frame's gain."""

    path: Path
    names: list[str]
    values: list[float]
    meaning: str | None
    gains: list[float]

    def exposures(self, meaning: str) -> list[float]:
        """The exposures in seconds, the values read as ``meaning``."""
        convert = {"exposure": lambda v: v, "inverse": lambda v: 1 / v, "ev": lambda v: 2.0**v}[meaning]
        if meaning != "ev" and min(self.values) <= 0:
            bad = self.values.index(min(self.values))
            raise InputError(f"{self.path}: entry {bad + 1} has the exposure {self.values[bad]:g}; it must be positive")
        return [convert(value) * gain for value, gain in zip(self.values, self.gains, strict=True)]

    def pick(self, images: Sequence[Path]) -> "ExposureList":
        """The entries of the given images, by file name, in their order; by position if the list has no names."""
        if not self.names:
            if len(images) != len(self.values):
                raise InputError(f"{self.path}: has {len(self.values)} entries for {len(images)} images")
            return self
        rows = {Path(name).name: row for row, name in enumerate(self.names)}
        for image in images:
            if image.name not in rows:
                raise InputError(f"{image}: is not in the list {self.path}")
        chosen = [rows[image.name] for image in images]
        return ExposureList(
            self.path,
            [self.names[row] for row in chosen],
            [self.values[row] for row in chosen],
            self.meaning,
            [self.gains[row] for row in chosen],
        )


def read_list(path: str | os.PathLike[str], column: str | None = None) -> ExposureList:
    """Reads a list file; see the top of this module for what it may look like.

    Args:
        path: the file.
        column: "exposure", "inverse" or "ev" overrules what header and layout say.

    Raises:
        InputError: the file cannot be read, a line has no number, or lines differ in their number of columns.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    header: list[str] = []
    names: list[str] = []
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        words = [word for word in re.split(r"[\s,;]+", line.strip()) if word]
        if not words:
            continue
        if words[0].startswith("#") or (not rows and not header and len(words) > 1 and parse_number(words[-1]) is None):
            header = header if rows else [word for word in words if word.strip("#")]
            continue
        first = len(words)
        while first > 0 and parse_number(words[first - 1]) is not None:
            first -= 1
        if first == len(words):
            raise InputError(f"{path}: line {number} has no exposure: {line.strip()!r}")
        name = line.strip() if first else ""
        for word in reversed(words[first:]):
            name = name[: name.rfind(word)].rstrip(" \t,;")
        row = [value for word in words[first:] if (value := parse_number(word)) is not None]
        if not all(map(math.isfinite, row)):
            raise InputError(f"{path}: line {number} has an exposure that is not finite: {line.strip()!r}")
        if rows and len(row) != len(rows[0]):
            raise InputError(f"{path}: line {number} has {len(row)} numbers, the lines before have {len(rows[0])}")
        rows.append(row)
        names.append(name.strip("\"'"))
    if not rows:
        raise InputError(f"{path}: lists no images")
    if any(names) and not all(names):
        raise InputError(f"{path}: entry {names.index('') + 1} has no file name")
    columns = [list(values) for values in zip(*rows, strict=True)]
    kinds = _kinds(header, columns)
    wanted = next((kinds.index(kind) for kind in (column, *MEANINGS) if kind is not None and kind in kinds), 0)
    return ExposureList(
        path,
        names if all(names) else [],
        columns[wanted],
        column or kinds[wanted],
        _gains(path, kinds, columns, wanted),
    )


def exif_exposures(paths: Sequence[Path]) -> list[float]:
    """The exposures of photographs by their EXIF, apertures and sensitivities accounted for.

    Raises:
        InputError: a file without an exposure time, or with aperture or ISO where others have none.
    """
    settings = [read_exif(path) for path in paths]
    times = []
    for path, exif in zip(paths, settings, strict=True):
        if exif.exposure_time is None:
            raise InputError(f"{path}: has no exposure time in its EXIF; give --times, --ev or --list")
        if exif.exposure_time <= 0:
            raise InputError(
                f"{path}: has the exposure time {exif.exposure_time:g} in its EXIF; give --times or --list"
            )
        times.append(exif.exposure_time)
    for name, values in (("f-number", [e.f_number for e in settings]), ("ISO", [e.iso for e in settings])):
        if None in values and any(values):
            raise InputError(f"{paths[values.index(None)]}: has no {name} in its EXIF, other frames have; give --times")
    gains = _relative_gains([e.f_number or 1.0 for e in settings], [e.iso or 1.0 for e in settings])
    return [time * gain for time, gain in zip(times, gains, strict=True)]


def check_exposures(paths: Sequence[Path], exposures: Sequence[float], *, allow_equal: bool = False) -> None:
    """Refuses exposures that are not positive and finite, too few or too many for the images, or equal.

    Args:
        allow_equal: accept frames of equal exposure, as long as there are two different ones.

    Raises:
        InputError: names the frame.
    """
    if len(exposures) != len(paths):
        raise InputError(f"{len(exposures)} exposure times for {len(paths)} images ({paths[0]} ... {paths[-1]})")
    for path, exposure in zip(paths, exposures, strict=True):
        if not (math.isfinite(exposure) and exposure > 0):
            raise InputError(f"{path}: has the exposure time {exposure:g}; it must be positive and finite")
    order = sorted(range(len(paths)), key=lambda frame: exposures[frame])
    equal = [(a, b) for a, b in itertools.pairwise(order) if exposures[b] <= exposures[a] * (1 + 1e-6)]
    if len(equal) == len(paths) - 1:
        raise InputError(
            f"{paths[0]} ... {paths[-1]}: all frames have the same exposure, {in_words(exposures[0])}; a bracket needs "
            "two different ones, also with --allow-equal"
        )
    if equal and not allow_equal:
        a, b = equal[0]
        raise InputError(
            f"{paths[b]}: has the same exposure as {paths[a]}, {in_words(exposures[a])}; --allow-equal merges them"
        )


def brighter_is_longer(exposures: Sequence[float], brightness: Sequence[float]) -> int:
    """Sign of the agreement of exposures and brightness over all pairs of frames: 1, -1, or 0 if undecided."""
    pairs = [(a, b) for a in range(len(exposures)) for b in range(a)]
    agreement = sum(
        math.copysign(1, (exposures[a] - exposures[b]) * (brightness[a] - brightness[b]))
        for a, b in pairs
        if exposures[a] != exposures[b] and brightness[a] != brightness[b]
    )
    return (agreement > 0) - (agreement < 0)


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s,;]+", text.strip()) if word]


def _kinds(header: list[str], columns: list[list[float]]) -> list[str | None]:
    """What each column of numbers means, by the header or by the layout; None where nothing tells."""
    count = len(columns)
    if len(header) > count:
        return [_kind(word) for word in header[-count:]]
    if count == 4:
        return ["inverse", "aperture", "iso", "nd"]
    if count >= 2 and all(abs(a * b - 1) < 0.02 for a, b in zip(columns[0], columns[1], strict=True)):
        return ["exposure", "inverse", *[None] * (count - 2)]
    return [None] * count


def _kind(word: str) -> str | None:
    word = word.lower().strip("#()[]")
    if word.startswith(("1/", "inv", "reciprocal")):
        return "inverse"
    if word in ("ev", "stops"):
        return "ev"
    if word.startswith(("exposure", "time", "sec", "shutter")) or word in ("t", "s"):
        return "exposure"
    if word.startswith(("f/", "f_", "fn", "f-n", "aperture")) or word == "f":
        return "aperture"
    return "iso" if word.startswith("iso") else None


def _gains(path: Path, kinds: list[str | None], columns: list[list[float]], used: int) -> list[float]:
    """Each frame's gain by aperture and ISO; a column that is neither these nor an exposure must not vary."""
    rows = len(columns[0])
    apertures, isos = [1.0] * rows, [1.0] * rows
    for position, (kind, values) in enumerate(zip(kinds, columns, strict=True)):
        if kind in ("aperture", "iso"):
            if min(values) <= 0:
                raise InputError(f"{path}: has the {kind} {min(values):g}; it must be positive")
            apertures, isos = (values, isos) if kind == "aperture" else (apertures, values)
        elif kind not in MEANINGS and position != used and len(set(values)) > 1:
            raise InputError(f"{path}: column {position + 2} varies and its meaning is unknown; give --times instead")
    return _relative_gains(apertures, isos)


def _relative_gains(f_numbers: Sequence[float], isos: Sequence[float]) -> list[float]:
    return [iso / min(isos) * (min(f_numbers) / f) ** 2 for f, iso in zip(f_numbers, isos, strict=True)]
