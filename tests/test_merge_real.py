"""``hdrops merge`` on real brackets: against Debevec's own map, OpenCV's merges, and what the frames themselves show.

The figures are those a merge of these brackets should reach; correlations are of log radiance, in the worst channel.
"""

from pathlib import Path

import numpy as np
import pytest

from hdrops import _align, _exposures, cli
from hdrops.io import read_image

pytest.importorskip("cv2")
pytest.importorskip("OpenEXR")
pytest.importorskip("PIL.Image")


def merge(output: Path, *words: object) -> np.ndarray:
    """The radiance that ``hdrops merge`` writes; positive and finite everywhere."""
    assert cli.main(["merge", *map(str, words), "-o", str(output)]) == 0
    radiance = read_image(output)
    assert np.isfinite(radiance).all() and (radiance > 0).all()
    return radiance


def correlation(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    where = where & (a > 0).all(-1) & (b > 0).all(-1)
    assert where.mean() > 0.5
    return min(float(np.corrcoef(np.log(a[..., c][where]), np.log(b[..., c][where]))[0, 1]) for c in range(3))


def well_exposed(folder: Path, exposed: tuple[int, int] = (8, 247)) -> np.ndarray:
    """bool [H, W]: pixels with a frame in which no channel is clipped, pure blue (the memorial's no data) set aside."""
    names = _exposures.read_list(folder / "image_list.txt").names
    frames = np.stack([read_image(folder / name) for name in names])
    shown = ((frames >= exposed[0]) & (frames <= exposed[1])).all(-1)
    blue = (frames == (0, 0, 255)).all(-1)
    return shown.any(0) & ~blue.any(0)


@pytest.fixture(scope="module")
def memorial(data, tmp_path_factory) -> tuple[Path, Path, np.ndarray]:
    """The bracket's folder, the folder merged into, and the radiance."""
    source, target = data / "memorial", tmp_path_factory.mktemp("memorial")
    options = ["--mask-color", "0,0,255", "--plot", target / "curve.png", "--save-response", target / "camera.m"]
    return source, target, merge(target / "scene.exr", "--list", source / "image_list.txt", *options)


@pytest.fixture(scope="module")
def room(data, tmp_path_factory) -> tuple[Path, Path, np.ndarray]:
    source, target = data / "stack_room", tmp_path_factory.mktemp("room")
    return source, target, merge(target / "scene.exr", *sorted(source.glob("*.jpg")))


def test_memorial_agrees_with_debevecs_own_map(memorial):
    source, _, radiance = memorial
    assert correlation(radiance, read_image(source / "memorial.hdr"), well_exposed(source)) > 0.97


def test_memorial_agrees_with_opencv(data, memorial):
    source, _, radiance = memorial
    gold = np.load(data / "ref" / "memorial_opencv.npz")
    stride = int(gold["stride"])
    where = well_exposed(source)[::stride, ::stride]
    assert correlation(radiance[::stride, ::stride], gold["o5_merge_debevec_s300"], where) > 0.998


def test_room_agrees_with_opencv(data, room):
    source, _, radiance = room
    gold = np.load(data / "ref" / "room_opencv.npz")
    stride = int(gold["stride"])
    where = well_exposed(source)[::stride, ::stride]
    assert correlation(radiance[::stride, ::stride], gold["o5_merge_debevec_s300"], where) > 0.99


@pytest.mark.parametrize(("name", "stops"), [("memorial", (13.5, 15.5)), ("room", (13.5, 15.5))])
def test_the_dynamic_range(name, stops, request, capsys):
    radiance = request.getfixturevalue(name)[2]
    light = radiance @ np.array([0.2126, 0.7152, 0.0722], np.float32)
    low, high = np.percentile(light, (0.1, 99.9))
    assert stops[0] < np.log2(high / low) < stops[1]


def test_the_lamp_that_clips_in_most_frames_is_the_brightest(room):
    """No dark sun: where even the second shortest frame clips is light, and where the shortest does is more."""
    source, _, radiance = room
    shortest = read_image(source / "stack_room_exp_6.jpg")
    second = read_image(source / "stack_room_exp_5.jpg")
    lamp = (second >= 250).all(-1)
    core = (shortest >= 250).all(-1)
    assert lamp.sum() > 50 and core.sum() > 10
    light = radiance.mean(-1)
    assert light[lamp].min() > np.percentile(light, 99)
    assert light[core].min() > np.median(light[lamp])


@pytest.mark.parametrize("name", ["memorial", "room"])
def test_previews_show_the_whole_range(name, request):
    _, target, radiance = request.getfixturevalue(name)
    preview = read_image(target / "scene_preview.png")
    assert preview.shape == radiance.shape
    assert 50 < np.median(preview) < 180
    assert (preview == 255).all(-1).mean() < 0.001 and (preview == 0).all(-1).mean() < 0.001
    # Bright stays bright: the preview rises with the radiance.
    lights = [image @ np.array([0.2126, 0.7152, 0.0722]) for image in (preview, radiance)]
    ranks = [np.argsort(np.argsort(light.ravel()[::37])) for light in lights]
    assert np.corrcoef(*ranks)[0, 1] > 0.98


def test_a_stored_response_serves_again(memorial, tmp_path):
    source, target, radiance = memorial
    options = ["--mask-color", "0,0,255", "--no-preview", "--response", target / "camera.m"]
    again = merge(tmp_path / "a.exr", "--list", source / "image_list.txt", *options)
    assert np.allclose(again, radiance, rtol=1e-5)


def test_frames_in_any_order(data, tmp_path):
    """The hall's files are listed mid, short, long."""
    frames = sorted((data / "stack_ghost").glob("*.JPG"))
    times = _exposures.exif_exposures(frames)
    assert times[1] < times[0] < times[2]
    a = merge(tmp_path / "a.exr", *frames, "--no-preview")
    by_time = [frame for _, frame in sorted(zip(times, frames, strict=True))]
    b = merge(tmp_path / "b.exr", *by_time, "--no-preview", "--response", "debevec")
    assert np.array_equal(a, b)


def test_robertson_and_debevec_agree(data, room, tmp_path):
    source, _, radiance = room
    other = merge(tmp_path / "a.exr", *sorted(source.glob("*.jpg")), "--no-preview", "--response", "robertson")
    assert correlation(radiance, other, well_exposed(source)) > 0.99


def test_alignment_leaves_a_tripod_alone_and_undoes_shifts(data):
    frames = sorted((data / "stack_ghost").glob("*.JPG"))
    images, times = np.stack([read_image(frame) for frame in frames]), _exposures.exif_exposures(frames)
    assert _align.find_shifts(images, times) == [(0, 0)] * 3
    planted = [(0, 0), (17, -9), (-4, 23)]
    moved = np.stack([np.roll(image, (-y, -x), (0, 1)) for image, (x, y) in zip(images, planted, strict=True)])
    assert _align.find_shifts(moved, times) == planted
    kept = _align.apply_shifts(moved, planted)
    assert np.array_equal(kept, images[:, 23:-9, 17:-4])
