"""Photographs in, HDR images out.

:func:`read_image` gives the pixels of a photograph as they stand in the file (RGB codes, not linearised), upright;
:func:`read_exif` the camera settings it was taken with. The format is told by the first bytes, never by the name: a
``.tif`` that is JPEG inside is read as JPEG. :func:`write_image` writes radiance or an 8-bit picture, the format told
by the suffix. :class:`Outputs` makes a set of files appear together or not at all.

The decoders come with ``pip install "hdrops[photo]"`` (OpenCV, OpenEXR, tifffile, Pillow), raw camera files with
``pip install "hdrops[raw]"``. Whatever is wrong with a file is raised as :class:`InputError`, one line that names it.
"""

import contextlib
import importlib
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]

RADIANCE_SUFFIXES = (".exr", ".hdr", ".tif", ".tiff")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")

# Raw files that are TIFF inside and tell themselves apart from a TIFF picture by their name only.
_RAW_TIFF_SUFFIXES = (".3fr", ".arw", ".cr2", ".dng", ".erf", ".iiq", ".mef", ".nef", ".nrw", ".pef", ".sr2", ".srw")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_RAW_MAGIC = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb")

_ORIENTATION, _EXPOSURE_TIME, _F_NUMBER, _ISO, _SHUTTER_SPEED, _DNG_VERSION = 274, 33434, 33437, 34855, 37377, 50706
_EXIF_FOLDER = 34665


class InputError(Exception):
    """Something the caller gave cannot be used. The message is one line and names the file or option."""


@dataclass(frozen=True)
class Exif:
    """Camera settings of a photograph; None where the file does not say.

    Attributes:
        exposure_time: in seconds.
        f_number: focal length over aperture diameter.
        iso: sensitivity.
        orientation: how the stored pixels are turned, 1 (upright) to 8, as EXIF counts.
    """

    exposure_time: float | None = None
    f_number: float | None = None
    iso: float | None = None
    orientation: int = 1


def need(module: str, purpose: str, extra: str = "photo") -> ModuleType:
    """The optional module, or an :class:`InputError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{purpose} needs {module} ({error}): pip install 'hdrops[{extra}]'") from error


def sniff(path: str | os.PathLike[str]) -> str:
    """The format of a file by its content: jpeg, png, tiff, exr, hdr or raw.

    Raises:
        InputError: there is no such file, it cannot be opened, or it is none of these.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, not an image") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\x76\x2f\x31\x01"):
        return "exr"
    if head.startswith((b"#?RADIANCE", b"#?RGBE")):
        return "hdr"
    if head.startswith(_RAW_MAGIC) or head[4:11] == b"ftypcrx":
        return "raw"
    if head.startswith(_TIFF_MAGIC):
        raw = head[8:10] == b"CR" or path.suffix.lower() in _RAW_TIFF_SUFFIXES or _DNG_VERSION in _tags(path, "tiff")
        return "raw" if raw else "tiff"
    if not head:
        raise InputError(f"{path}: is empty")
    raise InputError(f"{path}: is not an image hdrops reads (JPEG, PNG, TIFF, OpenEXR, Radiance HDR or camera raw)")


def read_exif(path: str | os.PathLike[str]) -> Exif:
    """The camera settings in a file's EXIF; where only the APEX shutter speed is there, the time is 2^-speed.

    Raises:
        InputError: the file is no image, or Pillow is not installed.
    """
    kind = sniff(path)
    if kind in ("exr", "hdr"):
        return Exif()
    tags = _tags(Path(path), kind)
    if kind == "raw" and _EXPOSURE_TIME not in tags:
        return _raw_settings(Path(path))
    time, speed = _number(tags.get(_EXPOSURE_TIME)), _number(tags.get(_SHUTTER_SPEED))
    if time is None and speed is not None:
        time = 2.0**-speed
    orientation = tags.get(_ORIENTATION, 1)
    return Exif(
        exposure_time=time,
        f_number=_number(tags.get(_F_NUMBER)) or None,
        iso=_number(tags.get(_ISO)) or None,
        orientation=orientation if orientation in range(1, 9) else 1,
    )


def read_image(path: str | os.PathLike[str]) -> Pixels:
    """A photograph's pixels: RGB [H, W, 3], uint8, uint16 or float32, turned upright by its EXIF orientation.

    Codes are not linearised; float files come as they are. A grey image is repeated into three channels, an opaque
    alpha channel is dropped. A raw camera file is developed to linear 16 bit, daylight white balance (so that all
    frames of a bracket get the same), full scale at the sensor's white level.

    Raises:
        InputError: the file is no image, is damaged or truncated, has transparent pixels, or needs a missing package.
    """
    path = Path(path)
    kind = sniff(path)
    try:
        with _quiet():
            pixels = _DECODERS[kind](path)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path}: does not fit into memory") from error
    except Exception as error:  # each decoder has its own kinds; the chain keeps them
        raise InputError(f"{path}: damaged or unsupported {kind} file ({_first_line(error)})") from error
    # LibRaw turns its pixels itself; the others give them as stored.
    return _turn(_three_channels(pixels, path), 1 if kind == "raw" else read_exif(path).orientation)


def write_image(path: str | os.PathLike[str], pixels: Pixels) -> None:
    """Writes RGB pixels [H, W, 3]: float32 to .exr, .hdr, .tif or .tiff, uint8 to .png, .jpg or .jpeg.

    OpenEXR files hold 32-bit floats with lossless ZIP compression, Radiance files RGBE (relative precision 1/256,
    no negative values), TIFF files uncompressed 32-bit floats.

    Raises:
        InputError: the suffix is none of these, or the file cannot be written.
    """
    path = Path(path)
    encode = _ENCODERS.get(path.suffix.lower())
    if encode is None:
        raise InputError(f"{path}: unknown output format; use {', '.join(_ENCODERS)}")
    try:
        with _quiet():
            encode(path, pixels)
    except (OSError, RuntimeError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be written ({_first_line(error)})") from error


class Outputs:
    """Files that appear together, when the ``with`` block ends well, or not at all.

    :meth:`add` gives a temporary name in the target's folder, created at once so that an unwritable folder is found
    before the work and not after it. At the end of the block all are renamed; if it raises (Ctrl-C included) they are
    removed, and files that stood there before are untouched. An InputError that names a temporary file is raised anew
    with the target's name.

    Args:
        inputs: files that must not be written onto.
    """

    def __init__(self, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
        self._inputs = [Path(path) for path in inputs]
        self._temporary: dict[Path, Path] = {}

    def add(self, path: str | os.PathLike[str], suffixes: Sequence[str]) -> Path:
        """The temporary name to write the file ``path`` under.

        Raises:
            InputError: a suffix that is not in ``suffixes``, an input file, a second output of that name, no folder,
                or no right to write there.
        """
        given = Path(path)
        if given.suffix.lower() not in suffixes:
            kind = f"the extension {given.suffix!r}" if given.suffix else "no extension"
            raise InputError(f"{given}: has {kind}, which names no output format here; use {', '.join(suffixes)}")
        target = given.resolve()  # through a link to the file it stands for
        if target.is_dir() or os.path.basename(path) in ("", "."):
            raise InputError(f"{path}: is a folder")
        for source in self._inputs:
            if target == source.resolve() or (target.exists() and source.exists() and target.samefile(source)):
                raise InputError(f"{given}: is one of the input images; it will not be overwritten")
        if target in self._temporary:
            raise InputError(f"{given}: named for two different outputs")
        if not target.parent.is_dir():
            raise InputError(f"{given}: there is no folder {given.parent}")
        if target.exists() and not os.access(target, os.W_OK):
            raise InputError(f"{given}: may not be overwritten (permission denied)")
        temporary = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
        try:
            temporary.touch()
        except OSError as error:
            raise InputError(f"{given}: cannot be written ({error.strerror})") from error
        self._temporary[target] = temporary
        return temporary

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for target, temporary in self._temporary.items():
            if kind is None:
                temporary.replace(target)
            else:
                temporary.unlink(missing_ok=True)
        if isinstance(error, InputError):
            told = str(error)
            for target, temporary in self._temporary.items():
                told = told.replace(str(temporary), str(target))
            if told != str(error):
                raise InputError(told) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the libraries print about a file; what matters is raised."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, AttributeError):  # a process without stderr
        yield
        return
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(silent)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tags(path: Path, kind: str) -> dict[int, Any]:
    """The EXIF tags of the file's main image by number, the EXIF folder's over those beside it; empty if unreadable."""
    need("PIL.Image", "reading EXIF")
    from PIL import Image

    exif = Image.Exif()
    try:
        with _quiet(), path.open("rb") as file:
            if kind in ("jpeg", "png"):
                exif = Image.open(file).getexif()
            elif file.read(4) in _TIFF_MAGIC:
                file.seek(0)
                exif.load_from_fp(file)
            return {**dict(exif), **exif.get_ifd(_EXIF_FOLDER)}
    except Exception:  # damaged EXIF; whether the pixels can be read is the decoder's business
        return {}


def _raw_settings(path: Path) -> Exif:
    """The settings of a raw file whose metadata is not EXIF in TIFF (Canon CR3, Fujifilm RAF), by LibRaw."""
    rawpy = need("rawpy", f"{path.name} is a raw camera file; reading it", extra="raw")
    try:
        with _quiet(), rawpy.imread(str(path)) as raw:
            told = raw.other
    except Exception as error:
        raise InputError(f"{path}: damaged or unsupported raw file ({_first_line(error)})") from error
    return Exif(told.shutter_speed or None, told.aperture or None, told.iso_speed or None)


def _number(value: Any) -> float | None:
    """An EXIF number; None for 0/0 and other values that are no finite number."""
    try:
        number = float(value[0] if isinstance(value, tuple) else value)
    except (TypeError, ValueError, ZeroDivisionError, IndexError):
        return None
    return number if math.isfinite(number) else None


def _decode_jpeg(path: Path) -> Pixels:
    need("PIL.Image", "reading JPEG")
    from PIL import Image

    with Image.open(path) as image:
        if image.mode not in ("RGB", "L"):
            raise InputError(f"{path}: is a {image.mode} image; convert it to RGB first")
        return np.asarray(image)


def _decode_png(path: Path) -> Pixels:
    need("PIL.Image", "reading PNG")
    from PIL import Image

    with Image.open(path) as image:
        image.verify()  # checksums and completeness; OpenCV's decoder forgives some
    return _decode_opencv(path)


def _decode_tiff(path: Path) -> Pixels:
    """OpenCV's decoder mirrors some orientations and fails at others: it is given the file with that tag set to 1."""
    tifffile = need("tifffile", "reading TIFF")
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags.get(_ORIENTATION)
        if tag is None or tag.value == 1:
            return _decode_opencv(path)
        data = bytearray(path.read_bytes())
        data[tag.valueoffset : tag.valueoffset + 2] = (1).to_bytes(2, "little" if tiff.byteorder == "<" else "big")
    return _decode_opencv(path, data)


def _decode_opencv(path: Path, data: bytearray | None = None) -> Pixels:
    cv2 = need("cv2", f"reading {path.name}")
    # From memory: OpenCV crashes at a name that is not UTF-8.
    encoded = np.fromfile(path, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    pixels = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise InputError(f"{path}: damaged, truncated or of an unsupported kind")
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB, dst=pixels)
    return np.asarray(pixels)


def _decode_exr(path: Path) -> Pixels:
    openexr = need("OpenEXR", "reading OpenEXR")
    with openexr.File(str(path)) as file:
        channels = {name: channel.pixels for name, channel in file.channels().items()}
    for name in ("RGBA", "RGB", "Y"):
        if name in channels:
            return np.asarray(channels[name], dtype=np.float32)
    raise InputError(f"{path}: has the channels {', '.join(channels)}, not RGB or Y")


def _decode_raw(path: Path) -> Pixels:
    rawpy = need("rawpy", f"{path.name} is a raw camera file; reading it", extra="raw")
    with rawpy.imread(str(path)) as raw:
        return np.asarray(raw.postprocess(output_bps=16, gamma=(1, 1), no_auto_bright=True))


_DECODERS: dict[str, Callable[[Path], Pixels]] = {
    "jpeg": _decode_jpeg,
    "png": _decode_png,
    "tiff": _decode_tiff,
    "hdr": _decode_opencv,
    "exr": _decode_exr,
    "raw": _decode_raw,
}


def _three_channels(pixels: Pixels, path: Path) -> Pixels:
    """RGB of a supported dtype from grey, RGB or opaque RGBA."""
    if pixels.dtype == np.float64:
        pixels = pixels.astype(np.float32)
    if pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise InputError(f"{path}: has {pixels.dtype} pixels; uint8, uint16 and float32 are supported")
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        opaque = 1 if pixels.dtype == np.float32 else np.iinfo(pixels.dtype).max
        if not (pixels[..., -1] >= opaque).all():
            raise InputError(f"{path}: has transparent pixels; flatten it first")
        pixels = pixels[..., :-1]
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise InputError(f"{path}: has the shape {list(pixels.shape)}; an RGB or grey image was expected")
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """The stored pixels as a view turned and mirrored to the upright picture."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _encode_exr(path: Path, pixels: Pixels) -> None:
    openexr = need("OpenEXR", "writing OpenEXR")
    str(path).encode()  # OpenEXR takes no other names; they raise UnicodeEncodeError here
    header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage, "software": "hdrops"}
    with openexr.File(header, {"RGB": np.ascontiguousarray(pixels, dtype=np.float32)}) as file:
        file.write(str(path))


def _encode_hdr(path: Path, pixels: Pixels) -> None:
    cv2 = need("cv2", "writing Radiance HDR")
    swapped = cv2.cvtColor(np.ascontiguousarray(pixels, dtype=np.float32), cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(".hdr", swapped)
    if not done:
        raise OSError("the encoder failed")
    encoded.tofile(path)


def _encode_tiff(path: Path, pixels: Pixels) -> None:
    tifffile = need("tifffile", "writing TIFF")
    tifffile.imwrite(path, pixels.astype(np.float32, copy=False), photometric="rgb", metadata=None, software="hdrops")


def _encode_picture(path: Path, pixels: Pixels) -> None:
    need("PIL.Image", "writing PNG and JPEG")
    from PIL import Image

    if pixels.dtype != np.uint8:
        raise TypeError(f"write_image: {path.suffix} takes uint8 pixels, got {pixels.dtype}")
    Image.fromarray(pixels).save(path, quality=95)


_ENCODERS: dict[str, Callable[[Path, Pixels], None]] = {
    ".exr": _encode_exr,
    ".hdr": _encode_hdr,
    ".tif": _encode_tiff,
    ".tiff": _encode_tiff,
    ".png": _encode_picture,
    ".jpg": _encode_picture,
    ".jpeg": _encode_picture,
}
