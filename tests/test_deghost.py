"""Deghosting: moving people over a textured hall of known radiance, still brackets, limits, and the command.

Ghost energy is the mean square of the error of log radiance where anything moves. It is compared with that of the plain
merge, and with that of the merge of a bracket in which nothing moved, which noise and clipping leave.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import hdrops
from hdrops import _merge_command, _moving_scene, cli
from hdrops._moving_scene import TIMES, MovingScene
from hdrops._plot import replacement_map
from hdrops.camera import deghost
from hdrops.camera.deghost import EXCLUDED, FILLED, KEPT, MOVED
from hdrops.camera.disagreement import Bounds, black_exposure, bounds_at, find_motion, gap
from hdrops.camera.transfer import fill_smoothly, match, swap_pixels
from hdrops.io import read_image, write_image

pytestmark = pytest.mark.usefixtures("one_thread")
LOG_TIMES = torch.tensor([TIMES]).log()
CURVE = _moving_scene.inverse_response()
MIDDLE = 1


def stack_of(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes).permute(0, 3, 1, 2)[None]


@pytest.fixture(scope="module")
def scene() -> MovingScene:
    return _moving_scene.moving_scene(1, 200, 300, people=3)


@pytest.fixture(scope="module")
def moved(scene) -> torch.Tensor:
    return stack_of(_moving_scene.photograph(scene.radiance))


@pytest.fixture(scope="module")
def still(scene) -> torch.Tensor:
    return stack_of(_moving_scene.photograph(np.repeat(scene.radiance[MIDDLE : MIDDLE + 1], 3, 0)))


@pytest.fixture(scope="module")
def result(moved):
    return deghost(moved, LOG_TIMES, CURVE)


def merged(stack: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    return hdrops.merge_exposures(stack, LOG_TIMES, CURVE, mask=weight)


def ghost_energy(radiance: torch.Tensor, scene: MovingScene) -> float:
    """Over moving pixels whose radiance the bracket can hold; the truth is the middle frame's moment."""
    truth = torch.from_numpy(scene.radiance[MIDDLE]).permute(2, 0, 1)
    where = torch.from_numpy(scene.moving) & (truth * TIMES[0] < 0.9).all(0) & (truth * TIMES[2] > 0.02).all(0)
    assert where.float().mean() > 0.1
    error = (radiance[0] / truth).log()
    return float((error - error.flatten()[::7].median())[:, where].square().mean())


# What it does to moving things.


def test_ghosts_go(scene, moved, still, result):
    assert result.reference == (MIDDLE,)
    plain, after = ghost_energy(merged(moved), scene), ghost_energy(merged(result.stack, result.weight), scene)
    assert after < plain / 50
    assert after < ghost_energy(merged(still), scene) + 0.01


def test_the_reference_stays_and_still_parts_stay(scene, moved, result):
    assert torch.equal(result.stack[:, MIDDLE], moved[:, MIDDLE])
    assert (result.weight[:, MIDDLE] == 1).all() and (result.label[:, MIDDLE] == KEPT).all()
    near = torch.nn.functional.max_pool2d(torch.from_numpy(scene.moving).float()[None], 31, 1, 15)[0] > 0
    assert (~near).float().mean() > 0.2
    assert torch.equal(result.stack[..., ~near], moved[..., ~near])
    assert (result.weight[..., ~near] == 1).all()


def test_labels_weights_and_pixels_tell_the_same(moved, result):
    assert set(result.label.unique().tolist()) == {KEPT, MOVED, FILLED, EXCLUDED}
    assert (result.weight[:, :, 0][result.label == EXCLUDED] == 0).all()
    assert ((result.weight >= 0) & (result.weight <= 1)).all()
    changed = (result.stack != moved).any(2)
    assert changed[(result.label == MOVED) | (result.label == FILLED)].float().mean() > 0.5
    # Soft: weights between none and all lie around what is excluded.
    between = (result.weight[:, :, 0] > 0) & (result.weight[:, :, 0] < 1)
    around = torch.nn.functional.max_pool2d((result.label == EXCLUDED).float(), 9, 1, 4) > 0
    assert between.any() and not (between & ~around).any()


def test_the_order_of_the_frames_does_not_matter(moved, result):
    order = [2, 0, 1]
    other = deghost(moved[:, order], LOG_TIMES[:, order], CURVE)
    assert order[other.reference[0]] == MIDDLE
    for a, b in ((other.stack, result.stack), (other.weight, result.weight), (other.label, result.label)):
        assert torch.equal(a, b[:, order])


def test_another_reference_shows_its_own_moment(scene, moved):
    short = deghost(moved, LOG_TIMES, CURVE, reference=0)
    assert short.reference == (0,) and torch.equal(short.stack[:, 0], moved[:, 0])
    truth = torch.from_numpy(scene.radiance[0]).permute(2, 0, 1)
    where = torch.from_numpy(scene.moving) & (truth * TIMES[0] < 0.9).all(0) & (truth * TIMES[0] > 0.02).all(0)
    error = (merged(short.stack, short.weight)[0] / truth).log()
    plain = (merged(moved)[0] / truth).log()
    assert (error - error.median())[:, where].square().mean() < (plain - plain.median())[:, where].square().mean() / 8


def test_where_the_reference_clips_the_short_frame_decides(scene, moved, result):
    """The window keeps what only the short frame shows; a person in front of it in that frame alone is filled over."""
    truth = torch.from_numpy(scene.radiance[MIDDLE]).permute(2, 0, 1)
    clipped = (truth * TIMES[MIDDLE] > 1.05).all(0) & (truth * TIMES[0] < 0.8).all(0)
    still = clipped & ~torch.from_numpy(scene.moving)
    after, plain = (merged(*pair)[0] for pair in ((result.stack, result.weight), (moved,)))
    assert still.sum() > 500
    assert torch.corrcoef(torch.stack((after[1][still], truth[1][still])))[0, 1] > 0.9
    hidden = clipped & (torch.from_numpy(scene.radiance[0]).permute(2, 0, 1) * TIMES[MIDDLE] < 0.3).all(0)
    assert hidden.sum() > 30
    scale = float((after / truth)[:, still].median())
    assert (after / truth / scale).log()[:, hidden].abs().median() < 0.35
    assert (plain / truth / scale).log()[:, hidden].abs().median() > 1


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_a_window_hidden_in_the_short_frame_takes_the_light_of_another(dtype):
    """One window is covered in the short frame alone, and the other too far away to be found by matching."""
    generator = torch.Generator().manual_seed(3)
    scene = 0.1 + 0.4 * torch.rand(1, 1, 3, 64, 160, generator=generator)
    scene[..., 8:40, 10:32] = scene[..., 8:40, 120:150] = 8.0
    times = torch.tensor([1 / 16, 1.0])
    frames = scene * times.view(1, 2, 1, 1, 1)
    frames[:, 0, :, 6:42, 8:34] = 0.02
    frames = frames.clamp(0, 1)
    if dtype == torch.uint16:
        frames = (frames * 65535).round().to(dtype)
    result = deghost(frames, times.log(), reference=1)
    hidden = (..., slice(14, 34), slice(14, 28))
    assert (result.label[0, 0][hidden] == FILLED).all() and (result.weight[0, 0, 0][hidden] == 1).all()
    radiance = hdrops.merge_exposures(result.stack, times.log()[None], mask=result.weight)
    assert radiance[hidden].min() > 7 and radiance[hidden].max() < 9
    plain = hdrops.merge_exposures(frames, times.log()[None])
    assert plain[hidden].max() < 2
    # Pixels that are no data are no source of light.
    no_data = torch.zeros(1, 2, 1, 64, 160, dtype=torch.bool)
    no_data[:, 0, :, 6:42, 118:152] = True
    alone = deghost(frames, times.log(), reference=1, mask=no_data)
    assert (alone.label[0, 0][hidden] == EXCLUDED).all() and (alone.weight[0, 0, 0][hidden] == 0).all()


# Brackets in which nothing moves.


def test_still_brackets_stay_as_they_are(still):
    same = deghost(still, LOG_TIMES, CURVE)
    assert torch.equal(same.stack, still) and (same.weight == 1).all() and (same.label == KEPT).all()


@pytest.mark.parametrize("electrons", [400, 2000])
def test_noise_is_no_motion(scene, electrons):
    radiance = np.repeat(scene.radiance[MIDDLE : MIDDLE + 1], 3, 0)
    noisy = stack_of(_moving_scene.photograph(radiance, electrons=electrons, read=10))
    assert (deghost(noisy, LOG_TIMES, CURVE).label != KEPT).float().mean() < 0.002


def test_ghosts_go_in_noise(scene):
    noisy = stack_of(_moving_scene.photograph(scene.radiance, electrons=3000, read=5))
    after = deghost(noisy, LOG_TIMES, CURVE)
    assert ghost_energy(merged(after.stack, after.weight), scene) < ghost_energy(merged(noisy), scene) / 8


def test_wrong_times_and_a_wrong_response_are_no_motion(still):
    """Frames of a still scene agree among each other, whatever radiance they are said to stand for."""
    times = LOG_TIMES + torch.tensor([[0.15, 0.0, -0.1]])
    assert (deghost(still, times, CURVE).label != KEPT).float().mean() < 0.01
    gamma = torch.linspace(0, 1, 256) ** 2.4
    assert (deghost(still, LOG_TIMES, gamma).label != KEPT).float().mean() < 0.01


# Kinds of input.


def test_deep_and_float_frames(scene):
    exposure = (scene.radiance * np.array(TIMES, np.float32)[:, None, None, None]).clip(0, 1)
    floats = stack_of(exposure.astype(np.float32))
    deep = stack_of((exposure * 65535).round().astype(np.uint16))
    found = deghost(floats, LOG_TIMES)
    assert found.stack.dtype == torch.float32 and (found.label != KEPT).float().mean() > 0.05
    other = deghost(deep, LOG_TIMES)
    assert other.stack.dtype == torch.uint16
    assert (other.label != found.label).float().mean() < 0.01
    for stack, after in ((floats, found), (deep, other)):
        plain = hdrops.merge_exposures(stack, LOG_TIMES)
        done = hdrops.merge_exposures(after.stack, LOG_TIMES, mask=after.weight)
        assert ghost_energy(done, scene) < ghost_energy(plain, scene) / 10


def test_a_mask_stays_and_is_no_source(moved):
    mask = torch.zeros(1, 3, 1, *moved.shape[-2:], dtype=torch.bool)
    mask[:, 0, :, :, :60] = True
    mask[:, 1, :, :30] = True
    blue = moved.clone()
    blue.permute(0, 1, 3, 4, 2)[mask[:, :, 0]] = torch.tensor([0, 0, 255], dtype=torch.uint8)
    after = deghost(blue, LOG_TIMES, CURVE, mask=mask)
    assert (after.weight[mask] == 0).all()
    pure = (after.stack == torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None]).all(2)
    assert not (pure & ~mask[:, :, 0]).any()


def test_batches_and_in_place(moved, still):
    both = torch.cat((moved, still))
    after = deghost(both, LOG_TIMES, CURVE)
    assert len(after.reference) == 2 and (after.label[1] == KEPT).all() and (after.label[0] != KEPT).any()
    held = moved.clone()
    inplace = deghost(held, LOG_TIMES[0], CURVE.reshape(1, 1, -1), inplace=True)
    assert inplace.stack.data_ptr() == held.data_ptr() and torch.equal(held, after.stack[:1])
    assert not torch.equal(held, moved)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (37, 26)])
def test_any_size(size):
    stack = torch.randint(0, 256, (1, 3, 3, *size), dtype=torch.uint8)
    after = deghost(stack, LOG_TIMES, CURVE)
    assert after.stack.shape == stack.shape and after.weight.shape == (1, 3, 1, *size)
    assert merged(after.stack, after.weight).isfinite().all()


def test_one_frame_and_equal_exposures(moved):
    one = deghost(moved[:, :1], LOG_TIMES[:, :1], CURVE)
    assert torch.equal(one.stack, moved[:, :1]) and (one.weight == 1).all()
    burst = moved[:, [MIDDLE, MIDDLE, MIDDLE]]
    assert (deghost(burst, torch.zeros(3), CURVE).label == KEPT).all()


def test_autocast_and_the_default_dtype_change_nothing(scene):
    exposure = (scene.radiance[:, :60, :80] * np.array(TIMES, np.float32)[:, None, None, None]).clip(0, 1)
    deep = stack_of((exposure * 65535).round().astype(np.uint16))
    wanted = deghost(deep, LOG_TIMES)
    assert (wanted.label == MOVED).any()
    with torch.autocast("cpu", torch.bfloat16):
        ambient = deghost(deep, LOG_TIMES)
    torch.set_default_dtype(torch.float64)
    try:
        double = deghost(deep, LOG_TIMES)
    finally:
        torch.set_default_dtype(torch.float32)
    for got in (ambient, double):
        assert all(torch.equal(a, b) for a, b in zip(got[:3], wanted[:3], strict=True))
        assert got.weight.dtype == torch.float32


def test_nan_readings_are_no_data(scene):
    exposure = (scene.radiance * np.array(TIMES, np.float32)[:, None, None, None]).clip(0, 1)
    floats = stack_of(exposure.astype(np.float32)).clone()
    floats[0, 0, :, 40:60, 40:60] = torch.nan
    after = deghost(floats, LOG_TIMES)
    radiance = hdrops.merge_exposures(after.stack, LOG_TIMES, mask=after.weight)
    assert radiance.isfinite().all()


@pytest.mark.parametrize("scale", [2, 4])
def test_large_images_are_searched_at_less_resolution(monkeypatch, scene, moved, scale):
    """The same scene where the grid of sites is coarser than the pixels; its sides are no multiples of the scale."""
    import sys

    height, width = 197, 295
    monkeypatch.setattr(sys.modules["hdrops.camera.deghost"], "_SITES", height * width // scale**2)
    cut = MovingScene(scene.radiance[:, :height, :width], scene.moving[:height, :width])
    stack = moved[..., :height, :width]
    after = deghost(stack, LOG_TIMES, CURVE)
    assert after.label.shape == (1, 3, height, width)
    assert ghost_energy(merged(after.stack, after.weight), cut) < ghost_energy(merged(stack), cut) / 6


STACK = torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8)
MASK = torch.zeros(1, 3, 1, 8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "stack", "times", "options"),
    [
        (ValueError, r"stack must be \[N, P, C, H, W\], got shape \[3, 3, 8, 8\]", STACK[0], LOG_TIMES, {}),
        (TypeError, "stack must be uint8, uint16 or floating", STACK.int(), LOG_TIMES, {}),
        (ValueError, "frames are empty", STACK[..., :0], LOG_TIMES, {}),
        (TypeError, "log_exposures must be floating", STACK, LOG_TIMES.long(), {}),
        (ValueError, r"with N = 1, P = 3, got shape \[1, 2\]", STACK, LOG_TIMES[:, :2], {}),
        (ValueError, "log_exposures must be finite", STACK, LOG_TIMES * torch.inf, {}),
        (TypeError, "curve must be floating", STACK, LOG_TIMES, {"curve": torch.arange(256)}),
        (ValueError, r"curve must be .* got shape \[2, 256\]", STACK, LOG_TIMES, {"curve": torch.ones(2, 256)}),
        (ValueError, r"reference must lie in 0\.\.2, got 3", STACK, LOG_TIMES, {"reference": 3}),
        (ValueError, r"saturation must lie in \(0, 1\], got 0", STACK, LOG_TIMES, {"saturation": 0}),
        (ValueError, "inplace needs .*clone it", STACK[:, :1].expand_as(STACK), LOG_TIMES, {"inplace": True}),
        (TypeError, "mask must be bool", STACK, LOG_TIMES, {"mask": torch.ones(1, 3, 1, 8, 8)}),
        (TypeError, "stack must be a tensor, got ndarray", STACK.numpy(), LOG_TIMES, {}),
        (TypeError, "log_exposures must be a tensor, got list", STACK, [0.0, 1.0, 2.0], {}),
        (TypeError, "mask must be a tensor, got list", STACK, LOG_TIMES, {"mask": [True]}),
        (ValueError, "curve must be finite", STACK, LOG_TIMES, {"curve": torch.full((256,), torch.nan)}),
        (TypeError, "reference must be an integer or None, got 1.0", STACK, LOG_TIMES, {"reference": 1.0}),
        (TypeError, "reference must be an integer or None, got True", STACK, LOG_TIMES, {"reference": True}),
        (TypeError, "saturation must be a number, got '1'", STACK, LOG_TIMES, {"saturation": "1"}),
        (ValueError, "mask must be on stack's device", STACK, LOG_TIMES, {"mask": MASK.to("meta")}),
        (ValueError, "mask must be .* got shape", STACK, LOG_TIMES, {"mask": torch.ones(1, 2, 1, 8, 8).bool()}),
    ],
)
def test_refusals(error, message, stack, times, options):
    with pytest.raises(error, match=f"^deghost: .*{message}"):
        deghost(stack, times, **options)


# Its parts.


def test_bounds_meet_or_not():
    least, most = torch.full((1, 1, 1), -3.0), torch.full((1, 1, 1), 1.0)
    a = bounds_at(torch.tensor([[[-5.0, 0.0, 0.0, 2.0, 2.0, -5.0]]]), least, most)
    b = bounds_at(torch.tensor([[[-1.0, 0.5, 2.0, 3.0, 0.25, -4.0]]]), least, most)
    assert gap(a, b)[0, 0].tolist() == [-2.0, -0.5, -1.0, 0.0, 0.75, 0.0]
    assert torch.equal(gap(b, a), -gap(a, b))
    narrowed = a.narrowed(b, torch.ones(1, 1, 6, dtype=torch.bool))
    assert narrowed.value[0, 0].tolist() == [-1.0, 0.0, 0.0, 1.0, 0.25, -3.0]
    assert isinstance(narrowed, Bounds) and narrowed.exact[0, 0].tolist() == [True, True, True, False, True, False]


def test_black_is_where_frames_stop_to_agree():
    """A camera that says nothing of exposures below 0.01."""
    generator = torch.Generator().manual_seed(0)
    log_radiance = torch.rand(1, 1, 20_000, generator=generator) * 8 - 8
    log_times = [0.0, 1.2, 2.4]
    exposure = (log_radiance + torch.tensor(log_times)[:, None, None]).clamp(max=0.5)
    least, most = torch.tensor([0.001]).log(), torch.tensor([0.0])
    assert black_exposure(exposure, log_times, least, most).tolist() == least.tolist()
    pedestal = torch.where(exposure < np.log(0.01), torch.full_like(exposure, -7.0), exposure)
    assert 0.0085 < float(black_exposure(pedestal, log_times, least, most).exp()) < 0.0125
    assert float(black_exposure(exposure.fill_(torch.nan), log_times, least, most)) < np.log(0.021)


def test_motion_needs_support_and_spreads():
    excess = torch.zeros(40, 40)
    excess[3, 3] = 20  # a speck
    excess[10:20, 10:20] = 3  # possible, with a certain start
    excess[12, 12] = 9
    excess[30:38, 30:38] = 3  # possible alone
    moving = find_motion(excess)
    assert moving[10:20, 10:20].all() and moving.sum() == 100


def test_smooth_fill_keeps_what_is_known():
    image = torch.arange(32.0).expand(1, 24, 32).clone()
    hole = torch.zeros(1, 24, 32, dtype=torch.bool)
    hole[:, 8:15, 10:20] = True
    filled = fill_smoothly(image.masked_fill(hole, torch.nan).nan_to_num(nan=1e6), hole)
    assert torch.equal(filled[~hole], image[~hole])
    assert (filled - image)[hole].abs().max() < 6
    wide = torch.full((1, 4, 64), 3.0)
    assert torch.equal(
        fill_smoothly(wide.masked_fill(torch.arange(64) < 40, 0), torch.arange(64).expand(1, 4, 64) < 40), wide
    )
    nothing = torch.ones(1, 5, 5, dtype=torch.bool)
    assert fill_smoothly(torch.zeros(1, 5, 5), nothing).isfinite().all()


def test_matches_find_a_shifted_thing():
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 99, 131), 4, 1)[0]
    index = match(image.roll((5, -7), (1, 2)), image)[0]
    y, x = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
    right = (index // 128 == y - 5) & (index % 128 == x + 7)
    assert right[16:-16, 16:-16].float().mean() > 0.98


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_swapped_pixels_are_those_of_a_whole_swap(scale):
    height, width = 20, 27
    frame = torch.randint(0, 256, (3, height * scale - scale // 2, width * scale), dtype=torch.uint8)
    index = torch.randint(0, height * width, (1, height, width))
    whole = torch.nn.functional.pad(frame.float(), (0, 0, 0, scale // 2), mode="replicate")[None]
    expected = hdrops.patch_swap(whole, index, scale=scale)[0, :, : frame.shape[1]].round().byte()
    swapped = frame.clone()
    swap_pixels(swapped, index, torch.ones(height, width), scale, tile=8)
    assert (swapped.int() - expected.int()).abs().max() <= 1
    untouched = frame.clone()
    swap_pixels(untouched, index, torch.zeros(height, width), scale)
    assert torch.equal(untouched, frame)


# The command.

pytest.importorskip("OpenEXR")


@pytest.fixture(scope="module")
def files(tmp_path_factory, scene) -> list[Path]:
    folder = tmp_path_factory.mktemp("moving")
    codes = _moving_scene.photograph(scene.radiance)
    paths = [folder / f"frame_{index}.png" for index in range(3)]
    for path, frame in zip(paths, codes, strict=True):
        write_image(path, frame)
    return paths


def merge(capsys, output: Path, files: list[Path], *words: object) -> str:
    times = ",".join(map(str, TIMES))
    command = ["merge", *files, "--times", times, "-o", output, "--no-preview", *words]
    assert cli.main([str(word) for word in command]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_command_removes_ghosts_and_draws_the_map(capsys, tmp_path, scene, files):
    assert "deghost" not in merge(capsys, tmp_path / "plain.exr", files)
    out = merge(capsys, tmp_path / "scene.exr", files, "--deghost", "--plot", tmp_path / "map.svg")
    first = out.splitlines()[0]
    share = r"\d+\.\d % replaced, \d+\.\d % excluded"
    assert re.fullmatch(rf"deghosted to frame_1\.png: frame_0\.png {share}; frame_2\.png {share}", first), first
    plain, after = (
        torch.from_numpy(read_image(tmp_path / name).transpose(2, 0, 1))[None] for name in ("plain.exr", "scene.exr")
    )
    assert ghost_energy(after, scene) < ghost_energy(plain, scene) / 8
    # The response is recovered from what did not move: the still parts are the better for it.
    truth = torch.from_numpy(scene.radiance[MIDDLE]).permute(2, 0, 1)
    still = ~torch.from_numpy(scene.moving) & (truth * TIMES[MIDDLE] < 0.9).all(0)
    errors = [(radiance[0] / truth).log()[:, still].std() for radiance in (plain, after)]
    assert errors[1] < errors[0] / 1.5
    drawing = (tmp_path / "map.svg").read_text()
    assert "exposure relative to the middle code" in drawing and drawing.count("<image") == 2
    assert "frame_2.png against frame_1.png" in drawing and "excluded from the merge" in drawing


def test_the_map_draws_names_of_any_kind(capsys, tmp_path, files):
    names = [tmp_path / "a$\\frac$b.png", tmp_path / "\udcff.png", tmp_path / "c.png"]
    for name, file in zip(names, files, strict=True):
        name.symlink_to(file)
    merge(capsys, tmp_path / "scene.exr", names, "--deghost", "--response", "linear", "--plot", tmp_path / "map.svg")
    assert "a$\\frac$b.png against \\udcff.png" in (tmp_path / "map.svg").read_text()


def test_the_command_takes_a_reference(capsys, tmp_path, files):
    out = merge(capsys, tmp_path / "a.exr", files, "--deghost", "--reference", 3, "--response", "debevec")
    assert out.startswith("deghosted to frame_2.png: frame_0.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "2"], "--reference 2: is for --deghost"),
        (["--deghost", "--reference", "0"], r"--reference 0: must be the number of a frame, 1\.\.3"),
        (["--deghost", "--reference", "4"], r"--reference 4: must be the number of a frame, 1\.\.3"),
    ],
)
def test_the_command_refuses(capsys, tmp_path, files, words, message):
    command = ["merge", *map(str, files), "--times", "1/16,1/4,1", "-o", str(tmp_path / "a.exr"), *words]
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert re.search(message, captured.err) and not (tmp_path / "a.exr").exists()


def test_the_map_shows_small_things_in_large_images():
    label = np.zeros((2500, 3100), np.uint8)
    label[1201, 1503] = EXCLUDED
    shown = replacement_map(np.full((2500, 3100, 3), 128, np.uint8), label)
    assert shown.shape == (625, 775, 3) and max(shown.shape) <= 1024
    assert (shown[300, 375] != shown[0, 0]).any() and (shown != shown[0, 0]).any(-1).sum() == 1


# Photographs.


def test_the_hall_of_walking_people(data):
    """The people stand where the middle frame shows them: the merge follows that frame, and leaves the walls alone."""
    from hdrops._bracket import read_bracket

    bracket = read_bracket(sorted((data / "stack_ghost").glob("*.JPG")))
    top, left = 300, 440
    stack = bracket.stack[..., top:540, left:780]
    curve = hdrops.camera.estimate_crf(bracket.stack, bracket.log_exposures).float()
    after = deghost(stack, bracket.log_exposures, curve)
    reference = int(np.argsort(bracket.exposures)[1])
    assert after.reference == (reference,)
    touched = (after.label != KEPT).any(1)[0]
    people = torch.zeros_like(touched)
    people[20:140, :180] = people[80:220, 200:320] = True
    assert touched[people].float().mean() > 0.3 and touched[~people].float().mean() < 0.1
    ends = curve[0, :, 255].log()[:, None, None] - bracket.log_exposures[0, reference]
    seen = hdrops.crf_lookup(stack[:, reference], curve)[0].log() - bracket.log_exposures[0, reference]
    exposed = (stack[0, reference] > 20).all(0) & (seen < ends - 0.3).all(0) & people & touched
    errors = []
    for frames, weight in ((stack, None), (after.stack, after.weight)):
        radiance = hdrops.merge_exposures(frames, bracket.log_exposures.float(), curve, mask=weight)[0]
        errors.append(float((radiance.log() - seen)[:, exposed].square().mean()))
    assert exposed.sum() > 2000 and errors[1] < errors[0] / 20


def test_merge_takes_the_mask_it_is_given():
    """The strips of the command get their part of the weights."""
    from hdrops._bracket import Bracket

    frames = np.random.default_rng(0).random((2, 40, 30, 3), np.float32)
    bracket = Bracket([Path("a"), Path("b")], frames, [1.0, 4.0], None, True)
    weight = torch.ones(1, 2, 1, 40, 30)
    weight[:, 1, :, 7:20] = 0
    done = _merge_command.merge(bracket, None, weight="hat", mask=weight, device=torch.device("cpu"))
    assert np.allclose(done[7:20], frames[0, 7:20], rtol=1e-5)
    assert not np.allclose(done[20:], frames[0, 20:], rtol=1e-2)


def test_the_docstrings_example():
    import doctest
    import sys

    assert doctest.testmod(sys.modules["hdrops.camera.deghost"]) == (0, 9)
