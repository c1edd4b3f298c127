"""hdrops.io: every format read and written, EXIF, orientation, damaged files, outputs that appear together."""

import os
import stat
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from hdrops import io
from hdrops.io import Exif, InputError, Outputs, read_exif, read_image, sniff, write_image

cv2 = pytest.importorskip("cv2")
tifffile = pytest.importorskip("tifffile")
OpenEXR = pytest.importorskip("OpenEXR")
Image = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 24, 40


@pytest.fixture
def codes() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def deep() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)


@pytest.fixture
def radiance() -> np.ndarray:
    return np.random.default_rng(2).lognormal(0, 2, (HEIGHT, WIDTH, 3)).astype(np.float32)


def exif(**tags) -> "Image.Exif":
    """EXIF with exposure_time, f_number, iso, shutter_speed in its folder, orientation beside it."""
    made = Image.Exif()
    made[274] = 1
    numbers = {"exposure_time": 33434, "f_number": 33437, "iso": 34855, "shutter_speed": 37377}
    for name, value in tags.items():
        if name == "orientation":
            made[274] = value
        else:
            made.get_ifd(34665)[numbers[name]] = value
    return made


def write_dng(path: Path, mosaic: np.ndarray, exposure: Fraction) -> None:
    """A minimal raw file: one Bayer mosaic, white at 16383."""
    identity = sum(((int(value), 1) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)), ())
    tags = [
        (50706, "B", 4, (1, 4, 0, 0), True),
        (50707, "B", 4, (1, 1, 0, 0), True),
        (50708, "s", 0, "Test Camera", True),
        (33421, "H", 2, (2, 2), True),
        (33422, "B", 4, (0, 1, 1, 2), True),
        (50714, "H", 1, 0, True),
        (50717, "H", 1, 16383, True),
        (50721, "2i", 9, identity, True),
        (50728, "2I", 3, (1, 1) * 3, True),
        (50778, "H", 1, 21, True),
        (33434, "2I", 1, (exposure.numerator, exposure.denominator), True),
    ]
    tifffile.imwrite(path, mosaic, photometric=32803, extratags=tags, metadata=None)


def test_8_bit_pixels_are_read_as_they_are(tmp_path, codes):
    Image.fromarray(codes).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", codes, photometric="rgb")
    cv2.imwrite(str(tmp_path / "lzw.tif"), codes[..., ::-1])
    for name in ("a.png", "a.tif", "lzw.tif"):
        assert np.array_equal(read_image(tmp_path / name), codes), name


def test_jpeg_is_read_in_rgb_order(tmp_path):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "a.jpg", quality=100)
    assert abs(read_image(tmp_path / "a.jpg").astype(int) - red).max() <= 2


def test_16_bit_pixels_are_read_as_they_are(tmp_path, deep):
    cv2.imwrite(str(tmp_path / "a.png"), deep[..., ::-1])
    tifffile.imwrite(tmp_path / "little.tif", deep, photometric="rgb")
    tifffile.imwrite(tmp_path / "big.tif", deep, photometric="rgb", byteorder=">")
    for name in ("a.png", "little.tif", "big.tif"):
        assert np.array_equal(read_image(tmp_path / name), deep), name


@pytest.mark.parametrize("name", ["a.exr", "a.tif", "a.tiff"])
def test_radiance_survives_writing_and_reading(tmp_path, radiance, name):
    write_image(tmp_path / name, radiance)
    assert read_image(tmp_path / name).dtype == np.float32
    assert np.array_equal(read_image(tmp_path / name), radiance)


def test_radiance_hdr_keeps_one_part_in_128_of_the_largest_channel(tmp_path, radiance):
    write_image(tmp_path / "a.hdr", radiance)
    error = abs(read_image(tmp_path / "a.hdr") - radiance)
    assert (error <= radiance.max(-1, keepdims=True) / 128).all()


def test_half_float_and_luminance_exr(tmp_path, radiance):
    header = {"compression": OpenEXR.PIZ_COMPRESSION, "type": OpenEXR.scanlineimage}
    half = radiance.astype(np.float16)
    OpenEXR.File(header, {"RGB": half}).write(str(tmp_path / "half.exr"))
    assert np.array_equal(read_image(tmp_path / "half.exr"), half.astype(np.float32))
    OpenEXR.File(header, {"Y": radiance[..., 0].copy()}).write(str(tmp_path / "y.exr"))
    assert np.array_equal(read_image(tmp_path / "y.exr"), np.repeat(radiance[..., :1], 3, -1))


def test_the_content_counts_not_the_name(tmp_path, codes):
    Image.fromarray(codes).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.tif")
    assert sniff(tmp_path / "a.tif") == "jpeg"
    assert read_image(tmp_path / "a.tif").shape == codes.shape


def test_grey_is_repeated_and_opaque_alpha_dropped(tmp_path, codes):
    Image.fromarray(codes[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(codes[..., :1], 3, -1))
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    Image.fromarray(np.concatenate((codes, alpha), -1)).save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "alpha.png"), codes)


def test_transparency_is_refused(tmp_path, codes):
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[3, 4] = 254
    Image.fromarray(np.concatenate((codes, alpha), -1)).save(tmp_path / "glass.png")
    with pytest.raises(InputError, match=r"glass\.png: has transparent pixels"):
        read_image(tmp_path / "glass.png")


def test_cmyk_is_refused(tmp_path, codes):
    Image.fromarray(codes).convert("CMYK").save(tmp_path / "print.jpg")
    with pytest.raises(InputError, match=r"print\.jpg: is a CMYK image"):
        read_image(tmp_path / "print.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_orientation_turns_as_pillow_does(tmp_path, codes, orientation, suffix):
    from PIL import ImageOps

    path = tmp_path / f"turned{suffix}"
    Image.fromarray(codes).save(path, exif=exif(orientation=orientation).tobytes())
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(path), expected)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_is_read(tmp_path, codes, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(codes).save(path, exif=exif(exposure_time=1 / 30, f_number=2.8, iso=400).tobytes())
    found = read_exif(path)
    assert found.exposure_time == pytest.approx(1 / 30, rel=1e-6)
    assert (found.f_number, found.iso, found.orientation) == (2.8, 400, 1)


def test_the_apex_shutter_speed_stands_in_for_the_time(tmp_path, codes):
    Image.fromarray(codes).save(tmp_path / "a.jpg", exif=exif(shutter_speed=6.0))
    assert read_exif(tmp_path / "a.jpg").exposure_time == 2**-6


def test_absent_exif_is_none(tmp_path, codes, radiance):
    Image.fromarray(codes).save(tmp_path / "a.jpg")
    write_image(tmp_path / "a.exr", radiance)
    assert read_exif(tmp_path / "a.jpg") == read_exif(tmp_path / "a.exr") == Exif()


def damaged(tmp_path: Path, codes: np.ndarray, radiance: np.ndarray, kind: str) -> Path:
    """A file of the kind, cut after 60 % of its bytes."""
    path = tmp_path / f"cut.{kind}"
    if kind in ("exr", "hdr"):
        write_image(path, radiance)
    elif kind == "tif":
        tifffile.imwrite(path, codes, photometric="rgb")
    else:
        Image.fromarray(codes).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    return path


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "exr", "hdr"])
def test_truncated_files_give_one_line_and_no_noise(tmp_path, codes, radiance, kind, capfd):
    path = damaged(tmp_path, codes, radiance, kind)
    with pytest.raises(InputError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"GIF89a....", "is not an image hdrops reads"), (b"II", "is not an image")],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "thing.jpg").write_bytes(content)
    with pytest.raises(InputError, match=rf"thing\.jpg: {message}"):
        read_image(tmp_path / "thing.jpg")


def test_names_that_are_not_utf_8(tmp_path, codes, radiance):
    picture = tmp_path / "caf\udce9.png"
    write_image(picture, codes)
    np.testing.assert_array_equal(read_image(picture), codes)
    with pytest.raises(InputError, match=r"cannot be written"):
        write_image(tmp_path / "caf\udce9.exr", radiance)


def test_absent_files_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jpg: No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)


def test_a_mangled_hdr_header_is_refused(tmp_path, radiance):
    write_image(tmp_path / "a.hdr", radiance)
    (tmp_path / "a.hdr").write_bytes(b"some text\r\n" + (tmp_path / "a.hdr").read_bytes())
    with pytest.raises(InputError, match=r"a\.hdr: is not an image"):
        read_image(tmp_path / "a.hdr")


def test_a_missing_package_is_named(tmp_path, codes, monkeypatch):
    Image.fromarray(codes).save(tmp_path / "a.png")
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(InputError, match=r"a\.png needs cv2 .*pip install 'hdrops\[photo\]'"):
        read_image(tmp_path / "a.png")


def test_raw_files_ask_for_the_raw_extra(tmp_path, monkeypatch):
    write_dng(tmp_path / "a.dng", np.full((32, 32), 4000, np.uint16), Fraction(1, 30))
    (tmp_path / "a.dng").rename(tmp_path / "a.tif")
    assert sniff(tmp_path / "a.tif") == "raw"
    assert read_exif(tmp_path / "a.tif").exposure_time == pytest.approx(1 / 30)
    monkeypatch.setitem(__import__("sys").modules, "rawpy", None)
    with pytest.raises(InputError, match=r"a\.tif is a raw camera file; reading it needs rawpy .*hdrops\[raw\]"):
        read_image(tmp_path / "a.tif")


def test_raw_files_are_developed_linearly(tmp_path):
    pytest.importorskip("rawpy")
    mosaic = np.full((64, 96), 8000, np.uint16)
    mosaic[:, 48:] = 2000
    write_dng(tmp_path / "a.dng", mosaic, Fraction(1, 30))
    pixels = read_image(tmp_path / "a.dng")
    assert pixels.shape == (64, 96, 3) and pixels.dtype == np.uint16
    assert np.allclose(pixels[32, 24] / pixels[32, 72], 4, rtol=0.01)
    assert pixels[32, 24, 1] == pytest.approx(8000 / 16383 * 65535, rel=0.1)


def test_pictures_are_8_bit(tmp_path, codes, radiance):
    write_image(tmp_path / "a.png", codes)
    assert np.array_equal(read_image(tmp_path / "a.png"), codes)
    with pytest.raises(TypeError, match="takes uint8"):
        write_image(tmp_path / "b.png", radiance)
    with pytest.raises(InputError, match="unknown output format"):
        write_image(tmp_path / "b.bmp", codes)


def test_outputs_appear_together(tmp_path):
    with Outputs() as outputs:
        first, second = outputs.add(tmp_path / "a.exr", (".exr",)), outputs.add(tmp_path / "b.png", (".png",))
        first.write_text("1")
        second.write_text("2")
        assert not (tmp_path / "a.exr").exists()
    assert (tmp_path / "a.exr").read_text() == "1" and (tmp_path / "b.png").read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 2


def test_outputs_have_the_rights_of_new_files(tmp_path):
    (tmp_path / "plain").write_text("")
    with Outputs() as outputs:
        outputs.add(tmp_path / "a.exr", (".exr",)).write_text("1")
    assert stat.S_IMODE(os.stat(tmp_path / "a.exr").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_touched_when_the_work_fails(tmp_path, error):
    (tmp_path / "a.exr").write_text("old")
    with pytest.raises(error), Outputs() as outputs:
        outputs.add(tmp_path / "a.exr", (".exr",)).write_text("half")
        outputs.add(tmp_path / "b.exr", (".exr",))
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.exr"]
    assert (tmp_path / "a.exr").read_text() == "old"


def test_outputs_follow_a_link(tmp_path):
    (tmp_path / "real.exr").write_text("old")
    (tmp_path / "link.exr").symlink_to(tmp_path / "real.exr")
    with Outputs() as outputs:
        outputs.add(tmp_path / "link.exr", (".exr",)).write_text("new")
    assert (tmp_path / "link.exr").is_symlink() and (tmp_path / "real.exr").read_text() == "new"


def test_outputs_refuse(tmp_path, codes):
    source = tmp_path / "in.png"
    Image.fromarray(codes).save(source)
    (tmp_path / "link.png").hardlink_to(source)
    (tmp_path / "folder.png").mkdir()
    refused = {
        "in.png": "is one of the input images",
        "link.png": "is one of the input images",
        "folder.png": "is a folder",
        "a.png/": "is a folder",
        "a.png/.": "is a folder",
        "a.bmp": "has the extension '.bmp'",
        "a": "has no extension",
        "no/a.png": "there is no folder",
        "in.png/a.png": "there is no folder",
    }
    for name, message in refused.items():
        with pytest.raises(InputError, match=message), Outputs([source]) as outputs:
            outputs.add(f"{tmp_path}/{name}", (".png",))
    with pytest.raises(InputError, match="two different outputs"), Outputs([source]) as outputs:
        outputs.add(tmp_path / "a.png", (".png",))
        outputs.add(tmp_path / "a.png", (".png",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "in.png", "link.png"]


def test_the_orientation_table_is_complete():
    stored = np.arange(6).reshape(2, 3)[..., None]
    turned = {k: io._turn(stored, k)[..., 0].tolist() for k in range(1, 9)}
    assert turned[6] == [[3, 0], [4, 1], [5, 2]] and turned[8] == [[2, 5], [1, 4], [0, 3]]
    assert len({str(value) for value in turned.values()}) == 8
