"""The ``hdrops`` command on brackets made here: what it writes, where exposures come from, and every refusal."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hdrops import _align, _crf_command, _exposures, _merge_command, _operator_cases, cli, demo
from hdrops.camera import load_response
from hdrops.io import read_image, write_image

cv2 = pytest.importorskip("cv2")
pytest.importorskip("OpenEXR")
tifffile = pytest.importorskip("tifffile")
Image = pytest.importorskip("PIL.Image")

TIMES = (1 / 64, 1 / 8, 1.0)


@pytest.fixture(scope="module")
def bracket(tmp_path_factory) -> Path:
    """A folder with frame_0.png ... of an invented scene, image_list.txt and truth.exr."""
    folder = tmp_path_factory.mktemp("bracket")
    demo.make_bracket(folder, 48, 72, TIMES)
    return folder


@pytest.fixture
def frames(bracket) -> list[str]:
    return [str(bracket / f"frame_{index}.png") for index in range(len(TIMES))]


@pytest.fixture
def output(tmp_path) -> Path:
    """An output that stands there already and must survive every failure."""
    path = tmp_path / "scene.exr"
    path.write_bytes(b"what stood here before")
    return path


def run(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refuses(capsys, output: Path, message: str, *words: object) -> None:
    """Asserts exit code 2, one line on stderr that matches, and nothing written."""
    before = sorted(output.parent.iterdir())
    code, out, err = run(capsys, "merge", *words, "-o", output)
    assert code == 2, err
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith("hdrops merge: ") and re.search(message, err), err
    assert output.read_bytes() == b"what stood here before"
    assert sorted(output.parent.iterdir()) == before


def log_correlation(radiance: np.ndarray, truth: np.ndarray) -> float:
    """Of the worst channel, over the pixels that do not clip in every frame."""
    worst = 1.0
    for a, b in zip(np.moveaxis(radiance, -1, 0), np.moveaxis(truth, -1, 0), strict=True):
        shown = b * min(TIMES) < 0.9
        worst = min(worst, float(np.corrcoef(np.log(a[shown]), np.log(b[shown]))[0, 1]))
    return worst


# What it writes.


@pytest.mark.parametrize("suffix", [".exr", ".hdr", ".tif", ".tiff"])
def test_merge_recovers_the_radiance(capsys, tmp_path, bracket, frames, suffix):
    output = tmp_path / f"scene{suffix}"
    code, out, err = run(capsys, "merge", *frames, "--times", "1/64,1/8,1", "-o", output)
    assert (code, err) == (0, "")
    radiance = read_image(output)
    assert np.isfinite(radiance).all() and (radiance > 0).all()
    assert log_correlation(radiance, read_image(bracket / "truth.exr")) > 0.999
    preview = read_image(tmp_path / "scene_preview.png")
    assert preview.shape == radiance.shape and preview.dtype == np.uint8 and 60 < preview.mean() < 200
    assert re.match(r"72 x 48, 3 frames over 6\.0 EV, debevec response, dynamic range 1\d\.\d stops", out)
    assert f"wrote {output}" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, "scene_preview.png"]


def test_an_existing_output_is_replaced(capsys, output, frames):
    assert run(capsys, "merge", *frames, "--times", "1/64,1/8,1", "-o", output, "--no-preview")[0] == 0
    assert read_image(output).shape == (48, 72, 3)


def test_everything_it_can_write(capsys, tmp_path, frames):
    extra = ["--plot", tmp_path / "curve.svg", "--save-response", tmp_path / "r.npz", "--preview", tmp_path / "p.jpg"]
    code, out, _ = run(capsys, "merge", *frames, "--times", "1/64,1/8,1", "-o", tmp_path / "a.exr", *extra)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.exr", "curve.svg", "p.jpg", "r.npz"]
    drawing = (tmp_path / "curve.svg").read_text()
    assert "exposure relative to the middle code" in drawing and drawing.count("#c0392b") >= 1
    assert all(str(tmp_path / name) in out for name in ("a.exr", "curve.svg", "p.jpg", "r.npz"))


@pytest.mark.parametrize("suffix", [".npz", ".m", ".npy"])
def test_a_stored_response_gives_the_same_image(capsys, tmp_path, frames, suffix):
    common = ["merge", *frames, "--times", "1/64,1/8,1", "--no-preview"]
    stored = tmp_path / f"camera{suffix}"
    assert run(capsys, *common, "-o", tmp_path / "a.exr", "--save-response", stored)[0] == 0
    assert run(capsys, *common, "-o", tmp_path / "b.exr", "--response", stored)[0] == 0
    assert np.allclose(read_image(tmp_path / "a.exr"), read_image(tmp_path / "b.exr"), rtol=1e-5)


def test_crf_recovers_the_response(capsys, tmp_path, frames):
    command = ["crf", *frames, "--times", "1/64,1/8,1", "-o", tmp_path / "camera.npz", "--plot", tmp_path / "curve.png"]
    code, out, err = run(capsys, *command)
    assert (code, err) == (0, "") and "debevec response of 3 frames" in out
    curve = load_response(tmp_path / "camera.npz").reshape(3, 256)
    exposure = np.linspace(0, 1, 100_001)
    true = np.interp(np.arange(256) / 255, demo.response(exposure), exposure)
    error = np.log(curve[:, 48:224].numpy()) - np.log(true[48:224] / true[128])
    assert np.sqrt((error**2).mean()) < 0.05
    assert Image.open(tmp_path / "curve.png").size == (1050, 750)


def test_the_order_of_the_frames_does_not_matter(capsys, tmp_path, frames):
    options = ["--response", "linear", "--no-preview"]
    run(capsys, "merge", *frames, "--times", "1/64,1/8,1", *options, "-o", tmp_path / "a.exr")
    run(capsys, "merge", frames[1], frames[0], frames[2], "--times", "1/8,1/64,1", *options, "-o", tmp_path / "b.exr")
    assert np.array_equal(read_image(tmp_path / "a.exr"), read_image(tmp_path / "b.exr"))


def test_radiance_is_per_second(capsys, tmp_path, frames):
    options = ["--response", "linear", "--no-preview"]
    run(capsys, "merge", *frames, "--times", "1/64,1/8,1", *options, "-o", tmp_path / "a.exr")
    run(capsys, "merge", *frames, "--times", "1/32,1/4,2", *options, "-o", tmp_path / "b.exr")
    assert np.allclose(read_image(tmp_path / "a.exr"), 2 * read_image(tmp_path / "b.exr"), rtol=1e-5)


def test_strips_do_not_show(capsys, tmp_path, frames, monkeypatch):
    command = ["merge", *frames, "--times", "1/64,1/8,1", "--no-preview", "-o"]
    run(capsys, *command, tmp_path / "whole.exr")
    monkeypatch.setattr(_merge_command, "_TILE", 5 * 72)
    run(capsys, *command, tmp_path / "strips.exr")
    assert np.array_equal(read_image(tmp_path / "whole.exr"), read_image(tmp_path / "strips.exr"))


def test_16_bit_and_float_frames(capsys, tmp_path, bracket):
    truth = read_image(bracket / "truth.exr")
    for index, seconds in enumerate(TIMES):
        exposure = np.minimum(truth * seconds, 1)
        deep = np.rint(65535 * demo.response(exposure)).astype(np.uint16)
        cv2.imwrite(str(tmp_path / f"deep_{index}.png"), deep[..., ::-1])
        tifffile.imwrite(tmp_path / f"float_{index}.tif", exposure.astype(np.float32), photometric="rgb")
        tifffile.imwrite(tmp_path / f"deep_{index}.tif", deep, photometric="rgb")
    for kind, method in (("deep_%d.png", "debevec"), ("deep_%d.tif", "debevec"), ("float_%d.tif", "linear")):
        names = [tmp_path / (kind % index) for index in range(3)]
        code, out, err = run(capsys, "merge", *names, "--times", "1/64,1/8,1", "-o", tmp_path / "a.exr")
        assert (code, err) == (0, "") and f"{method} response" in out
        assert log_correlation(read_image(tmp_path / "a.exr"), truth) > 0.9995
    shown = truth * min(TIMES) < 1
    assert np.allclose(read_image(tmp_path / "a.exr")[shown], truth[shown], rtol=1e-4)


def test_the_mask_colour_is_no_data(capsys, tmp_path, bracket, frames):
    for index in range(3):
        pixels = read_image(frames[index]).copy()
        pixels[10 * index : 10 * index + 8, 20:30] = (40, 90, 200)
        write_image(tmp_path / f"{index}.png", pixels)
    truth = read_image(bracket / "truth.exr")
    names = [tmp_path / f"{index}.png" for index in range(3)]
    common = ["merge", *names, "--times", "1/64,1/8,1", "--no-preview", "-o", tmp_path / "a.exr"]
    run(capsys, *common)
    assert log_correlation(read_image(tmp_path / "a.exr"), truth) < 0.99
    run(capsys, *common, "--mask-color", "40,90,200")
    assert log_correlation(read_image(tmp_path / "a.exr"), truth) > 0.995


def test_a_lower_saturation_code(capsys, tmp_path, bracket):
    truth = read_image(bracket / "truth.exr")
    for index, seconds in enumerate(TIMES):
        codes = np.rint(255 * np.minimum(demo.response(np.minimum(truth * seconds, 4)), 230 / 255)).astype(np.uint8)
        write_image(tmp_path / f"{index}.png", codes)
    names = [tmp_path / f"{index}.png" for index in range(3)]
    common = ["merge", *names, "--times", "1/64,1/8,1", "--no-preview", "-o"]
    run(capsys, *common, tmp_path / "ignored.exr")
    assert run(capsys, *common, tmp_path / "known.exr", "--saturation", "230")[0] == 0
    ignored, known = (log_correlation(read_image(tmp_path / f"{name}.exr"), truth) for name in ("ignored", "known"))
    assert known > 0.995 and known > ignored


def test_alignment_finds_planted_shifts(capsys, tmp_path):
    demo.make_bracket(tmp_path / "large", 160, 240, TIMES)
    shifts = [(5, -3), (0, 0), (-8, 6)]
    for index, (x, y) in enumerate(shifts):
        pixels = read_image(tmp_path / "large" / f"frame_{index}.png")
        write_image(tmp_path / f"{index}.png", np.ascontiguousarray(pixels[20 - y : 140 - y, 20 - x : 220 - x]))
    names = [tmp_path / f"{index}.png" for index in range(3)]
    command = ["merge", *names, "--times", "1/64,1/8,1", "--align", "-v", "-o", tmp_path / "a.exr"]
    code, _, err = run(capsys, *command)
    assert code == 0
    assert re.findall(r"shifted by (\S+), (\S+)", err) == [("-5", "+3"), ("+0", "+0"), ("+8", "-6")]
    truth = read_image(tmp_path / "large" / "truth.exr")[20 + 3 : 140 - 6, 20 + 8 : 220 - 5]
    radiance = read_image(tmp_path / "a.exr")
    assert radiance.shape == (120 - 9, 200 - 13, 3)
    assert log_correlation(radiance, truth) > 0.999


def test_shifts_crop_to_what_all_frames_show():
    images = np.arange(3 * 6 * 8 * 2).reshape(3, 6, 8, 2)
    shifts = [(1, 0), (0, 0), (-2, 1)]
    expected = [np.roll(image, (y, x), (0, 1))[1:, 1:-2] for image, (x, y) in zip(images, shifts, strict=True)]
    assert np.array_equal(_align.apply_shifts(images.copy(), shifts), np.stack(expected))


def test_tonemap(capsys, tmp_path, bracket):
    for operator in ("reinhard", "drago", "mu"):
        code, out, err = run(capsys, "tonemap", bracket / "truth.exr", "-o", tmp_path / "p.png", "--tonemap", operator)
        assert (code, err) == (0, "") and operator in out
        picture = read_image(tmp_path / "p.png")
        assert picture.shape == (48, 72, 3) and 40 < picture.mean() < 200 and picture.max() > 230


def test_tonemap_survives_nan_and_infinity(capsys, tmp_path):
    radiance = np.ones((8, 8, 3), np.float32)
    radiance[0], radiance[1], radiance[2] = np.nan, np.inf, -np.inf
    write_image(tmp_path / "bad.exr", radiance)
    code, _, err = run(capsys, "tonemap", tmp_path / "bad.exr", "-o", tmp_path / "p.png")
    assert code == 0 and "72 values are NaN or infinite" in err
    picture = read_image(tmp_path / "p.png")
    assert (picture[0] == 0).all() and (picture[2] == 0).all() and (picture[1] == picture[7]).all()


def test_tonemap_refuses_a_photograph(capsys, tmp_path, frames):
    code, _, err = run(capsys, "tonemap", frames[0], "-o", tmp_path / "p.png")
    assert code == 2 and "has uint8 pixels" in err and list(tmp_path.iterdir()) == []


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for name in ("hdrops", "torch", "_C ", "CUDA", "SIMD", "threads", "huge pages", "rawpy"):
        assert re.search(rf"^\s*{name}", out, re.MULTILINE), name


def test_bench(capsys):
    code, out, _ = run(capsys, "bench", "--rounds", "1", "--size", "32x48")
    assert code == 0
    for operator in ("deform_conv2d", "crf_lookup", "merge_exposures", "quantize_ste", "tent_histogram", "truncate"):
        assert re.search(rf"^{operator}\s+\d", out, re.MULTILINE), operator


def test_threads(capsys, frames, tmp_path, threads):
    run(capsys, "merge", *frames, "--times", "1/64,1/8,1", "-o", tmp_path / "a.exr", "--threads", "1")
    assert torch.get_num_threads() == 1


# Where exposures come from.


def write_jpegs(folder: Path, frames: list[str], settings: list[dict]) -> list[Path]:
    """The frames as JPEG files with EXIF."""
    paths = []
    for index, (frame, values) in enumerate(zip(frames, settings, strict=True)):
        exif = Image.Exif()
        exif[274] = 1
        exif.get_ifd(34665).update(values)
        paths.append(folder / f"IMG_{index}.jpg")
        Image.fromarray(read_image(frame)).save(paths[-1], quality=95, exif=exif)
    return paths


def test_exposures_from_exif(capsys, tmp_path, frames):
    paths = write_jpegs(tmp_path, frames, [{33434: time, 33437: 8.0, 34855: 100} for time in TIMES])
    code, out, err = run(capsys, "merge", *paths, "-o", tmp_path / "a.exr", "-v")
    assert code == 0 and "6.0 EV" in out
    assert re.findall(r"IMG_\d\.jpg: (.*)", err) == ["1/64 s", "1/8 s", "1 s"]


def test_aperture_and_sensitivity_count_whatever_the_order(tmp_path, frames):
    settings = [{33434: 1 / 64, 33437: 8.0, 34855: 100}, {33434: 1 / 64, 33437: 4.0, 34855: 200}]
    paths = write_jpegs(tmp_path, frames[:2], settings)
    assert _exposures.exif_exposures(paths) == pytest.approx([1 / 64 / 4, 1 / 64 * 2])
    assert _exposures.exif_exposures(paths[::-1]) == pytest.approx([1 / 64 * 2, 1 / 64 / 4])


def test_exposures_from_ev(capsys, tmp_path, frames):
    common = ["merge", *frames, "--no-preview", "-o"]
    assert run(capsys, *common, tmp_path / "a.exr", "--ev", "-6,-3,0")[0] == 0
    assert run(capsys, *common, tmp_path / "b.exr", "--times", "1/64,1/8,1")[0] == 0
    assert np.array_equal(read_image(tmp_path / "a.exr"), read_image(tmp_path / "b.exr"))


LISTS = {
    "header": "# Filename exposure 1/shutter_speed\n{0} 0.015625 64\n{1} 0.125 8\n{2} 1 1\n",
    "memorial": "# Filename  exposure 1/shutter_speed f/stop gain(db) ND_filters\n"
    "{0} 0.015625 64 8 0 0\n{1} 0.125 8 8 0 0\n{2} 1 1 8 0 0\n",
    "header without hash": "name time\n{0} 1/64\n{1} 1/8\n{2} 1\n",
    "header inverse": "# file 1/t\n{0} 64\n{1} 8\n{2} 1\n",
    "comma separated": "image,ev\n{0},-6\n{1},-3\n{2},0\n",
    "two columns": "{0} 0.015625 64\n{1} 0.125 8\n{2} 1 1\n\n",
    "pfstools": "{0} 64 8 100 0\n{1} 8 8 100 0\n{2} 1 8 100 0\n",
    "pfstools aperture": "{0} 64 8 100 0\n{1} 8 8 100 0\n{2} 4 8 400 0\n",
    "opencv": "{0} 64\n{1} 8\n{2} 1\n",
    "seconds": "{0} 0.015625\n{1} 0.125\n{2} 1\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_exposures_from_a_list(capsys, tmp_path, bracket, kind):
    listed = bracket / f"{kind.replace(' ', '_')}.txt"
    listed.write_text(LISTS[kind].format("frame_0.png", "frame_1.png", "frame_2.png"))
    code, out, err = run(capsys, "merge", "--list", listed, "-v", "-o", tmp_path / "a.exr")
    assert code == 0 and "3 frames over 6.0 EV" in out
    assert re.findall(r"frame_\d\.png: (.*)", err) == ["1/64 s", "1/8 s", "1 s"]
    guessed = {"opencv": "the inverse of the exposure time", "seconds": "the exposure time"}
    assert ("warning" in err) == (kind in guessed) and guessed.get(kind, "") in err


def test_the_list_column_is_obeyed(capsys, tmp_path, bracket):
    (bracket / "times.txt").write_text(LISTS["seconds"].format("frame_0.png", "frame_1.png", "frame_2.png"))
    command = ["merge", "--list", bracket / "times.txt", "--list-column", "inverse", "-v", "-o", tmp_path / "a.exr"]
    command += ["--response", "linear"]
    code, _, err = run(capsys, *command)
    assert code == 0 and re.findall(r"frame_\d\.png: (.*)", err) == ["64 s", "8 s", "1 s"]
    assert "the brighter images have the shorter exposures" in err


def test_images_choose_from_a_list(capsys, tmp_path, bracket, frames):
    command = ["merge", frames[2], frames[0], "--list", bracket / "image_list.txt", "-v", "-o", tmp_path / "a.exr"]
    code, out, err = run(capsys, *command)
    assert code == 0 and "2 frames" in out
    assert re.findall(r"(frame_\d)\.png: (.*)", err) == [("frame_2", "1 s"), ("frame_0", "1/64 s")]


def test_a_list_of_numbers_goes_with_images(capsys, tmp_path, frames):
    (tmp_path / "exposure.txt").write_text("-6\n-3\n0\n")
    command = ["merge", *frames, "--list", tmp_path / "exposure.txt", "--list-column", "ev", "-o", tmp_path / "a.exr"]
    code, out, _ = run(capsys, *command)
    assert code == 0 and "6.0 EV" in out


def test_names_with_spaces_in_a_list(tmp_path):
    (tmp_path / "list.txt").write_text('# name time\nmy holiday 1.jpg 0.5\n"my holiday 2.jpg" 1/4\n')
    listed = _exposures.read_list(tmp_path / "list.txt")
    assert listed.names == ["my holiday 1.jpg", "my holiday 2.jpg"] and listed.exposures("exposure") == [0.5, 0.25]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("a.png\nb.png\n", r"line 1 has no exposure|lists no images"),
        ("a.png 1\nb.png\n", "line 2 has no exposure"),
        ("a.png 1\nb.png 2 3\n", "line 2 has 2 numbers"),
        ("a.png nan\nb.png 1\n", "not finite"),
        ("# name time nd\na.png 1 0\nb.png 2 3\n", "column 3 varies"),
        ("# name time\na.png 0\nb.png 1\n", "entry 1 has the exposure 0"),
        ("# name ev iso\na.png 0 0\nb.png 1 100\n", "the iso 0"),
    ],
)
def test_bad_lists(capsys, output, tmp_path, frames, text, message):
    listed = tmp_path / "list.txt"
    listed.write_text(text.replace("a.png", frames[0]).replace("b.png", frames[1]))
    refuses(capsys, output, rf"list\.txt: .*({message})", "--list", listed)


# Refusals.


def test_no_images(capsys, output):
    refuses(capsys, output, "no images given")


def test_one_frame(capsys, output, frames):
    refuses(capsys, output, r"frame_0\.png: is the only frame", frames[0], "--times", "1")


def test_an_absent_image(capsys, output, frames):
    refuses(capsys, output, r"gone\.png: No such file", frames[0], "gone.png", "--times", "1,2")


def test_a_file_that_is_no_image(capsys, output, tmp_path, frames):
    (tmp_path / "notes.txt").write_text("hello, this is no image")
    refuses(capsys, output, r"notes\.txt: is not an image", frames[0], tmp_path / "notes.txt", "--times", "1,2")


def test_a_truncated_image(capsys, output, tmp_path, frames):
    (tmp_path / "cut.png").write_bytes(Path(frames[1]).read_bytes()[:3000])
    refuses(capsys, output, r"cut\.png: damaged", frames[0], tmp_path / "cut.png", "--times", "1/64,1/8")


def test_two_sizes(capsys, output, tmp_path, frames):
    write_image(tmp_path / "small.png", np.zeros((10, 20, 3), np.uint8))
    message = r"small\.png: is 20 x 10 pixels, .*frame_0\.png is 72 x 48"
    refuses(capsys, output, message, frames[0], tmp_path / "small.png", "--times", "1,2")


def test_two_depths(capsys, output, tmp_path, frames):
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((48, 72, 3), np.uint16))
    refuses(capsys, output, r"deep\.png: has uint16 pixels", frames[0], tmp_path / "deep.png", "--times", "1,2")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "has 1 values that are NaN"),
        (np.inf, "has 1 values that are NaN or infinite"),
        (1.5, r"has values from 0 to 1\.5"),
        (-1, r"has values from -1"),
    ],
)
def test_bad_float_frames(capsys, output, tmp_path, value, message):
    for index, bad in enumerate((0.5, value)):
        pixels = np.zeros((8, 8, 3), np.float32)
        pixels[0, 0, 0] = bad
        write_image(tmp_path / f"f{index}.exr", pixels)
    refuses(capsys, output, rf"f1\.exr: {message}", tmp_path / "f0.exr", tmp_path / "f1.exr", "--times", "1,2")


def test_a_frame_given_twice(capsys, output, frames):
    refuses(capsys, output, r"frame_0\.png: is given twice", *frames, frames[0], "--times", "1,2,3,4")


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ("1,2", "2 exposure times for 3 images"),
        ("1,2,3,4", "4 exposure times for 3 images"),
        ("0,1,2", r"frame_0\.png: has the exposure time 0; it must be positive"),
        ("1,-1,2", r"frame_1\.png: has the exposure time -1"),
        ("1,2,nan", r"frame_2\.png: has the exposure time nan"),
        ("1,2,inf", r"frame_2\.png: has the exposure time inf"),
        ("1,1,1", r"frame_0\.png .* all frames have the same exposure, 1 s"),
        ("1/8,1,1/8", r"frame_2\.png: has the same exposure as .*frame_0\.png, 1/8 s; --allow-equal"),
        ("1/0,1,2", "'1/0' is not a number of seconds"),
        ("fast,1,2", "'fast' is not a number of seconds"),
    ],
)
def test_bad_times(capsys, output, frames, times, message):
    refuses(capsys, output, message, *frames, "--times", times)


def test_equal_exposures_on_request(capsys, tmp_path, frames):
    again = tmp_path / "again.png"
    again.write_bytes(Path(frames[1]).read_bytes())
    command = ["merge", *frames, again, "--times", "1/64,1/8,1,1/8", "--allow-equal", "-o", tmp_path / "a.exr"]
    assert run(capsys, *command)[0] == 0


def test_bad_evs(capsys, output, frames):
    refuses(capsys, output, "'x' is not an exposure value", *frames, "--ev", "x,0,2")


def test_missing_and_bad_exif(capsys, output, tmp_path, frames):
    message = r"frame_0\.png: has no exposure time in its EXIF; give --times, --ev or --list"
    refuses(capsys, output, message, *frames)
    paths = write_jpegs(tmp_path, frames[:2], [{33434: 0.0}, {33434: 1.0}])
    refuses(capsys, output, r"IMG_0\.jpg: has the exposure time 0 in its EXIF", *paths)
    paths = write_jpegs(tmp_path, frames[:2], [{33434: 0.5, 34855: 100}, {33434: 1.0}])
    refuses(capsys, output, r"IMG_1\.jpg: has no ISO in its EXIF", *paths)


def test_a_list_image_that_is_not_given(capsys, output, bracket, tmp_path, frames):
    other = tmp_path / "other.png"
    other.write_bytes(Path(frames[0]).read_bytes())
    message = r"other\.png: is not in the list"
    refuses(capsys, output, message, frames[1], other, "--list", bracket / "image_list.txt")


def test_a_response_that_cannot_be_used(capsys, output, tmp_path, frames):
    common = [*frames, "--times", "1/64,1/8,1"]
    (tmp_path / "r.npz").write_bytes(b"nothing of the kind")
    refuses(capsys, output, r"r\.npz", *common, "--response", tmp_path / "r.npz")
    refuses(capsys, output, r"gone\.m", *common, "--response", "gone.m")
    refuses(capsys, output, "--response gamma: is neither", *common, "--response", "gamma")
    message = r"r2\.npz: no response to save"
    refuses(capsys, output, message, *common, "--response", "linear", "--save-response", tmp_path / "r2.npz")


def test_frames_that_show_nothing(capsys, output, tmp_path):
    for index in range(2):
        write_image(tmp_path / f"black_{index}.png", np.zeros((8, 8, 3), np.uint8))
    names = [tmp_path / "black_0.png", tmp_path / "black_1.png"]
    refuses(capsys, output, r"black_0\.png .* no response recovered", *names, "--times", "1,2")


def test_options_out_of_range(capsys, output, frames):
    common = [*frames, "--times", "1/64,1/8,1"]
    refuses(capsys, output, "--saturation 300", *common, "--saturation", "300")
    refuses(capsys, output, "--mask-color 0,0,300", *common, "--mask-color", "0,0,300")
    refuses(capsys, output, "--device cuda:77", *common, "--device", "cuda:77")
    refuses(capsys, output, "--device nowhere", *common, "--device", "nowhere")
    refuses(capsys, output, "--device meta", *common, "--device", "meta")
    refuses(capsys, output, "samples must be at least 2", *common, "--samples", "1")


def test_saturation_is_for_integer_images(capsys, output, tmp_path):
    names = [tmp_path / "short.exr", tmp_path / "long.exr"]
    for name, value in zip(names, (0.2, 0.4), strict=True):
        write_image(name, np.full((8, 8, 3), value, np.float32))
    for code in ("1", "200"):
        refuses(capsys, output, "integer images", *names, "--times", "1,2", "--deghost", "--saturation", code)


def test_outputs_that_cannot_be_written(capsys, tmp_path, frames):
    common = ["merge", *frames, "--times", "1/64,1/8,1", "-o"]
    refused = {
        tmp_path / "no" / "a.exr": "there is no folder",
        tmp_path / "a.jpeg2000": "has the extension '.jpeg2000'",
        tmp_path / "a.png": "has the extension '.png'",
        tmp_path / "a": "has no extension",
        tmp_path: "no extension|is a folder",
        f"{tmp_path}/a.exr/": "is a folder",
        ".": "no extension|is a folder",
    }
    for path, message in refused.items():
        code, _, err = run(capsys, *common, path)
        assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(capsys, tmp_path, frames):
    tmp_path.chmod(0o500)
    code, _, err = run(capsys, "merge", *frames, "--times", "1/64,1/8,1", "-o", tmp_path / "a.exr")
    tmp_path.chmod(0o700)
    assert code == 2 and "cannot be written" in err


def test_inputs_are_never_overwritten(capsys, tmp_path, bracket):
    demo.make_bracket(tmp_path, 16, 24, TIMES)
    tifffile.imwrite(tmp_path / "in.tif", np.zeros((16, 24, 3), np.uint8), photometric="rgb")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    frames = [tmp_path / f"frame_{index}.png" for index in range(2)]
    for words in (
        [frames[0], tmp_path / "in.tif", "-o", tmp_path / "in.tif"],
        [*frames, "-o", tmp_path / "a.exr", "--preview", frames[0]],
        [*frames, "-o", tmp_path / "a.exr", "--plot", frames[1]],
    ):
        code, _, err = run(capsys, "merge", *words, "--times", "1/64,1/8")
        assert code == 2 and "is one of the input images" in err
    code, _, err = run(
        capsys, "merge", "--list", tmp_path / "image_list.txt", "-o", tmp_path / "a.exr", "--preview", frames[0]
    )
    assert code == 2 and "is one of the input images" in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("option", "name"), [("--save-response", "camera.npz"), ("--plot", "camera.png")])
def test_a_full_disk_is_told_by_the_files_name(capsys, output, frames, monkeypatch, option, name):
    matplotlib = pytest.importorskip("matplotlib.figure")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_crf_command, "save_response", fail)
    monkeypatch.setattr(matplotlib.Figure, "savefig", fail)
    message = rf"{re.escape(str(output.with_name(name)))}: cannot be written \(No space left on device\)"
    refuses(capsys, output, message, *frames, "--times", "1/64,1/8,1", option, output.with_name(name))


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (SystemExit, None)])
def test_an_interrupted_merge_leaves_nothing(capsys, output, frames, monkeypatch, error, code):
    def interrupted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(_merge_command, "merge", interrupted)
    found, out, _ = run(capsys, "merge", *frames, "--times", "1/64,1/8,1", "-o", output)
    assert (found, out) == (code, "")
    assert [path.name for path in output.parent.iterdir()] == ["scene.exr"]
    assert output.read_bytes() == b"what stood here before"


def test_termination_leaves_nothing(capsys, output, frames, monkeypatch):
    monkeypatch.setattr(_merge_command, "merge", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, _ = run(capsys, "merge", *frames, "--times", "1/64,1/8,1", "-o", output)
    assert code == 143
    assert [path.name for path in output.parent.iterdir()] == ["scene.exr"]


def test_errors_of_hdrops_itself_are_not_hidden(output, frames, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(_merge_command, "merge", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["merge", *frames, "--times", "1/64,1/8,1", "-o", str(output)])
    assert output.read_bytes() == b"what stood here before"


def test_the_command_line_itself(frames, tmp_path):
    command = [sys.executable, "-m", "hdrops", "merge", *frames, "--times", "1/64,1/8,0", "-o", str(tmp_path / "a.exr")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "frame_2.png" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["merge"],
        ["merge", "a.png"],
        ["nonsense"],
        ["merge", "-o", "a.exr", "--weight", "heavy"],
        ["bench", "--size", "64"],
        ["bench", "--size", "0x64"],
        ["bench", "--rounds", "0"],
    ],
)
def test_usage_errors(capsys, words):
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and "usage: hdrops" in err


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses names that are not UTF-8")
@pytest.mark.parametrize("suffix", [".hdr", ".tif"])
def test_names_that_are_not_utf_8(frames, tmp_path, suffix):
    names = [tmp_path / f"caf\udce9_{index}.png" for index in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        name.write_bytes(Path(frame).read_bytes())
    output = tmp_path / f"sc\udce8ne{suffix}"
    command = [sys.executable, "-m", "hdrops", "merge", *names, "--times", "1/64,1/8,1", "-o", output]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stderr == b"" and b"sc\\udce8ne" in done.stdout
    assert read_image(output).shape == (48, 72, 3)


def test_the_demo(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_memorial_folder", lambda: None)
    monkeypatch.setattr(demo, "cases", lambda: _operator_cases.cases(32, 48))
    assert demo.main() == 0
    out = capsys.readouterr().out
    assert all(float(value) > 0.999 for value in re.findall(r"correlation of log radiance (\S+),", out))
    assert out.count("backward") >= 7
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert made == {"bracket", "response.npz", "response.png", "scene.exr", "scene_preview.png"}
