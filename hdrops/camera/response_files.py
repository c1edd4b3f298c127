"""Response curves on disk: numpy archives, pfstools text and OpenCV arrays.

All hold the inverse response as linear relative exposure per code (OpenCV and pfstools store no logarithm):

* ``.npz``: ``response`` [C, L] or [N, C, L] and ``kind``; hdrops' own, lossless.
* ``.m``: the text of pfstools' ``--save-response``: one Octave matrix per channel (IR, IG, IB), with rows
  ``log10(response) code response``.
* ``.npy``: the array of OpenCV's CalibrateDebevec and CalibrateRobertson: float32 [L, 1, C], channels in BGR order.

A file is written beside its target under a temporary name and renamed, so a failure never damages an existing one.
"""

import os
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_KIND = "inverse response, linear relative exposure per code"
_CHANNEL_NAMES = ("IR", "IG", "IB")


def save_response(path: str | os.PathLike[str], curve: Tensor) -> None:
    """Writes an inverse response; the suffix of ``path`` chooses the format: .npz, .m (pfstools) or .npy (OpenCV).

    Args:
        path: target file; replaced only once the new one is complete.
        curve: [L], [C, L] or [1, C, L] relative exposure per code, finite, >= 0; .npz also keeps [N, C, L].

    Raises:
        ValueError: unknown suffix, or a curve the format cannot hold.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"save_response: {path}: the suffix must be one of {sorted(_WRITERS)}, got {path.suffix!r}")
    array = curve.detach().cpu().double().numpy()
    if array.ndim not in (1, 2, 3) or array.shape[-1] < 2:
        raise ValueError(f"save_response: curve must be [L], [C, L] or [N, C, L], got shape {list(array.shape)}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"save_response: {path}: the curve must be finite and not negative at every code")
    if path.suffix != ".npz":
        array = array.reshape(-1, array.shape[-1]) if array.ndim < 3 or array.shape[0] == 1 else array
        if array.ndim == 3:
            raise ValueError(
                f"save_response: {path}: {path.suffix} holds the curves of one camera, got shape {list(array.shape)}; "
                "use .npz for a batch"
            )
    _write_then_rename(path, lambda file: _WRITERS[path.suffix](file, array))


def load_response(path: str | os.PathLike[str]) -> Tensor:
    """Reads an inverse response written by :func:`save_response`, pfstools or OpenCV.

    Args:
        path: an .npz, .m or .npy file.

    Returns:
        float32 [C, L] (.npz: the shape that was saved) relative exposure per code, RGB order.

    Raises:
        FileNotFoundError: no such file. ValueError: not a response file; names the file and what was expected.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"load_response: {path}: the suffix must be one of {sorted(_READERS)}, got {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"load_response: no such file: {path}")
    try:
        array = _READERS[path.suffix](path)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"load_response: {path}: expected {_EXPECTED[path.suffix]} ({error})") from error
    if array.ndim not in (1, 2, 3) or array.shape[-1] < 2 or array.dtype.kind != "f" or array.size == 0:
        raise ValueError(
            f"load_response: {path}: expected {_EXPECTED[path.suffix]}, got {array.dtype} of shape {list(array.shape)}"
        )
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"load_response: {path}: the response must be finite and not negative at every code")
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C", copy=True))


def _write_then_rename(path: Path, write: Callable[[BinaryIO], None]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_npz(file: BinaryIO, array: np.ndarray) -> None:
    np.savez(file, response=array.astype(np.float32), kind=np.array(_KIND))


def _read_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive["response"])


def _write_opencv(file: BinaryIO, array: np.ndarray) -> None:
    np.save(file, np.ascontiguousarray(array[::-1].T[:, None, :], dtype=np.float32))


def _read_opencv(path: Path) -> np.ndarray:
    array = np.load(path, allow_pickle=False)
    if array.ndim != 3 or array.shape[1] != 1 or array.shape[2] not in (1, 3):
        raise ValueError(f"got shape {list(array.shape)}")
    return np.asarray(array[:, 0, ::-1].T)


def _write_pfstools(file: BinaryIO, array: np.ndarray) -> None:
    if array.shape[0] not in (1, 3):
        raise ValueError(f"save_response: pfstools responses have 1 or 3 channels, got {array.shape[0]}")
    for name, channel in zip(_CHANNEL_NAMES, array, strict=False):
        lines = [
            f"# Camera response curve, channel {name}",
            "# data layout: log10(response) | camera output | response",
            f"# name: {name}",
            "# type: matrix",
            f"# rows: {channel.size}",
            "# columns: 3",
        ]
        for code, value in enumerate(channel):
            logarithm = np.log10(value) if value > 0 else -6.0
            lines.append(f" {logarithm:.9e} {code:4d} {value:.9e}")
        file.write(("\n".join(lines) + "\n\n").encode())


def _read_pfstools(path: Path) -> np.ndarray:
    text = path.read_text(encoding="ascii")
    blocks = re.split(r"^# rows:", text, flags=re.MULTILINE)[1:]
    if len(blocks) not in (1, 3):
        raise ValueError(f"found {len(blocks)} matrices, not 1 or 3")
    channels = []
    for block in blocks:
        header, *lines = block.splitlines()
        rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
        if len(rows) != int(header) or any(len(row) != 3 for row in rows):
            raise ValueError(f"a matrix does not have its {header.strip()} rows of 3 numbers")
        if [int(row[1]) for row in rows] != list(range(len(rows))):
            raise ValueError("the camera outputs are not 0, 1, 2, ...")
        channels.append([float(row[2]) for row in rows])
    if len({len(channel) for channel in channels}) != 1:
        raise ValueError("the channels differ in length")
    return np.array(channels)


_WRITERS = {".npz": _write_npz, ".m": _write_pfstools, ".npy": _write_opencv}
_READERS = {".npz": _read_npz, ".m": _read_pfstools, ".npy": _read_opencv}
_EXPECTED = {
    ".npz": "a numpy archive with `response` [C, L]",
    ".m": "a pfstools response: 1 or 3 matrices `log10(response) code response`",
    ".npy": "an OpenCV response: float array [L, 1, 3] (or [L, 1, 1]), BGR",
}
