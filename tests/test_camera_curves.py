"""Curves: monotone repair, inversion, EMoR, and responses on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hdrops.camera import (
    EMoR,
    invert_curve,
    load_response,
    monotone_from_middle,
    monotone_repair,
    resample_curve,
    save_response,
)


def _lookup(values: Tensor, curve: Tensor) -> Tensor:
    """OP-6: curves [N, S] read linearly at values [N, M] in [0, 1]."""
    position = values * (curve.shape[-1] - 1)
    lower = position.detach().floor().long().clamp(0, curve.shape[-1] - 2)
    return torch.lerp(curve.gather(1, lower), curve.gather(1, lower + 1), position - lower)


def test_monotone_repair_by_hand() -> None:
    """Steps 1, -1, 2 lifted by 1 are 2, 0, 3."""
    curve = torch.tensor([5.0, 6.0, 5.0, 7.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.4, 0.4, 1.0], dtype=torch.float64)
    torch.testing.assert_close(monotone_repair(curve), expected)


def test_monotone_repair_keeps_a_monotone_curve() -> None:
    curve = torch.linspace(0, 1, 1024, dtype=torch.float64) ** 2.2
    torch.testing.assert_close(monotone_repair(curve), curve, rtol=0, atol=1e-12)
    torch.testing.assert_close(monotone_repair(torch.full((4,), 3.0)), torch.tensor([0, 1 / 3, 2 / 3, 1]))


def test_monotone_repair_gradient_goes_to_the_first_smallest_step() -> None:
    """Two steps tie as the smallest; perturbing the first alone must explain the sub-gradient."""
    curve = torch.tensor([0.0, -1.0, 1.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    result = monotone_repair(curve)
    (got,) = torch.autograd.grad(result[3], curve)
    nudged = curve.detach().clone().requires_grad_()
    steps = nudged.diff()
    lifted = steps - steps[0]
    (want,) = torch.autograd.grad((lifted / lifted.sum()).cumsum(0)[2], nudged)
    torch.testing.assert_close(got, want)


def test_monotone_repair_through_a_lookup_has_right_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    mean = torch.linspace(0, 2, 16, dtype=torch.float64)
    coefficients = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    values = torch.rand(2, 9, generator=generator, dtype=torch.float64).requires_grad_()

    def through(coefficients: Tensor, values: Tensor) -> Tensor:
        return _lookup(values, monotone_repair(mean + coefficients @ basis))

    assert torch.autograd.gradcheck(through, (coefficients, values))


def test_monotone_from_middle() -> None:
    curve = torch.tensor([3.0, 1.0, 2.0, 4.0, 5.0, 4.5, 6.0, 5.0])
    assert monotone_from_middle(curve).tolist() == [1.0, 1.0, 2.0, 4.0, 5.0, 5.0, 6.0, 6.0]
    assert torch.equal(monotone_from_middle(monotone_from_middle(curve)), monotone_from_middle(curve))


def test_inverse_of_a_power() -> None:
    x = torch.linspace(0, 1, 1024, dtype=torch.float64)
    torch.testing.assert_close(invert_curve(x**2), x.sqrt(), rtol=0, atol=1e-4 + 1 / 1024**0.5 / 64)
    back = invert_curve(invert_curve(x**1.5, levels=4096), levels=1024)
    torch.testing.assert_close(back, x**1.5, rtol=0, atol=1e-4)


def test_inverse_reads_flat_parts_at_their_left_end() -> None:
    curve = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0], dtype=torch.float64)
    got = invert_curve(curve, levels=5)
    torch.testing.assert_close(got, torch.tensor([0.0, 1.5, 2.0, 3.5, 4.0], dtype=torch.float64) / 5)
    assert invert_curve(torch.ones(4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_is_monotone_from_0_to_1(dtype: torch.dtype) -> None:
    curves = torch.rand(20, 37, dtype=dtype).cumsum(-1) * 7 - 3
    inverse = invert_curve(curves, levels=500)
    assert inverse.dtype == dtype and inverse.shape == (20, 500)
    assert (inverse.diff() >= 0).all()
    assert (inverse[:, 0] == 0).all() and (inverse[:, -1] == 1).all()
    wanted = curves[:, :1] + (curves[:, -1:] - curves[:, :1]) * torch.linspace(0, 1, 500, dtype=dtype)
    torch.testing.assert_close(_lookup(inverse, curves), wanted, rtol=1e-4, atol=1e-4)


def test_inverse_has_right_gradients() -> None:
    curve = torch.tensor([[0.0, 0.13, 0.39, 0.4, 0.77, 1.1], [-1.0, 0.3, 0.5, 0.6, 0.9, 1.3]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: invert_curve(c, levels=8)[:, 1:-1], (curve.requires_grad_(),))


def test_curve_errors() -> None:
    with pytest.raises(ValueError, match=r"invert_curve: curve must be \[\.\.\., L\]"):
        invert_curve(torch.zeros(1))
    with pytest.raises(TypeError, match="monotone_repair: curve must be floating point"):
        monotone_repair(torch.arange(4))
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        invert_curve(torch.rand(4), levels=1)


def test_parametric_model_is_orthonormal_and_fits_cameras() -> None:
    for inverse in (False, True):
        model = EMoR.parametric(inverse=inverse)
        torch.testing.assert_close(model.basis @ model.basis.mT, torch.eye(11, dtype=torch.float64))
        assert (model.basis[:, [0, -1]] == 0).all()
    x = torch.linspace(0, 1, 1024, dtype=torch.float64)
    srgb = torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)
    model = EMoR.parametric()
    for curve in (srgb, x**0.4, x**0.6, (1 - torch.exp(-3 * x)) / (1 - torch.exp(torch.tensor(-3.0)))):
        assert (model.curve(model.fit(curve)) - curve).square().mean().sqrt() < 0.005


def test_coefficients_survive_curve_and_fit() -> None:
    model = EMoR.parametric(components=5)
    coefficients = torch.tensor([[0.4, 0.1, -0.2, 0.05, 0.0], [0.0] * 5], dtype=torch.float64)
    torch.testing.assert_close(model.fit(model.curve(coefficients)), coefficients, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.curve(coefficients[1]), monotone_repair(model.mean))
    short = resample_curve(model.curve(coefficients), 256)
    assert (model.fit(short, components=3) - coefficients[:, :3]).abs().max() < 0.1
    assert model.curve(coefficients.float()).dtype == torch.float32


def test_curve_gradient_reaches_the_coefficients() -> None:
    model = EMoR.parametric(components=4)
    coefficients = torch.tensor([[3.0, -5.0, 7.0, 2.0]], dtype=torch.float64, requires_grad=True)
    assert (model.mean + coefficients @ model.basis).diff().min() < 0  # the repair is at work
    assert torch.autograd.gradcheck(lambda c: model.curve(c)[:, ::64], (coefficients,))


def test_public_model_loads(data: Path) -> None:
    forward, inverse = EMoR.load(data / "crf" / "emor.txt"), EMoR.load(data / "crf" / "invemor.txt")
    for model in (forward, inverse):
        assert model.mean.shape == (1024,) and model.basis.shape == (25, 1024)
        torch.testing.assert_close(model.basis @ model.basis.mT, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-6)
        curve = model.curve(torch.zeros(1, 11, dtype=torch.float64))
        torch.testing.assert_close(curve[0], model.mean, rtol=0, atol=1e-5)
        coefficients = torch.zeros(1, 11, dtype=torch.float64)
        coefficients[0, :3] = torch.tensor([0.5, -0.3, 0.1])
        torch.testing.assert_close(model.fit(model.curve(coefficients), 11), coefficients, rtol=0, atol=1e-3)
    # The mean inverse response is close to the inverse of the mean response.
    assert (invert_curve(forward.mean.cummax(0).values) - inverse.mean).abs().max() < 0.08
    # The built-in basis spans the measured space: one standard deviation along each of its first directions.
    parametric = EMoR.parametric()
    for k, deviation in enumerate((3.4, 1.3, 0.47)):
        curve = monotone_repair(forward.mean + deviation * forward.basis[k])
        fitted = parametric.mean + parametric.fit(curve) @ parametric.basis
        assert (fitted - curve).square().mean().sqrt() < 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", "text before the first block"),
        ("f0 =\n0 1\nh(1)=\n0 0\n", r"got blocks of \[2\] numbers"),
        ("E =\n0 1\n", r"found \['E'\]"),
        ("f0 =\n0 x\n", "could not convert"),
    ],
)
def test_bad_model_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "emor.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"emor\.txt: expected blocks .*{message}"):
        EMoR.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        EMoR.load(tmp_path / "absent.txt")


def test_coefficient_counts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"EMoR.curve: the number of coefficients must lie in 1\.\.11, got 12"):
        EMoR.parametric().curve(torch.zeros(1, 12))


def _response(channels: int = 3) -> Tensor:
    exponents = torch.tensor([1.8, 2.2, 2.6])[:channels, None]
    return (torch.arange(256) / 128) ** exponents


@pytest.mark.parametrize("suffix", [".npz", ".m", ".npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_responses_survive_a_file(tmp_path: Path, suffix: str, channels: int) -> None:
    path = tmp_path / f"camera{suffix}"
    path.write_text("older content")
    save_response(path, _response(channels))
    got = load_response(path)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, _response(channels), rtol=1e-6, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    save_response(path, _response(channels)[None])
    torch.testing.assert_close(load_response(path).reshape(channels, 256), _response(channels), rtol=1e-6, atol=0)


def test_npz_keeps_a_batch_and_others_refuse_it(tmp_path: Path) -> None:
    batch = torch.stack((_response(), _response() * 2))
    save_response(tmp_path / "a.npz", batch)
    assert torch.equal(load_response(tmp_path / "a.npz"), batch)
    for suffix in (".m", ".npy"):
        with pytest.raises(ValueError, match="holds the curves of one camera"):
            save_response(tmp_path / f"a{suffix}", batch)


def test_opencv_reads_and_writes_the_same_array(tmp_path: Path) -> None:
    """The saved array serves OpenCV's merge as it is, and the one OpenCV recovers loads."""
    cv2 = pytest.importorskip("cv2")
    times = np.array([0.25, 1, 4], np.float32)
    rng = np.random.default_rng(0)
    scene = rng.random((32, 32, 3)) ** 3
    frames = [(255 * np.clip(scene * t, 0, 1) ** (1 / 2.2)).round().astype(np.uint8) for t in times]
    recovered = cv2.createCalibrateDebevec().process(frames, times)
    np.save(tmp_path / "opencv.npy", recovered)
    loaded = load_response(tmp_path / "opencv.npy")
    assert loaded.shape == (3, 256)
    np.testing.assert_array_equal(loaded.numpy()[::-1].T[:, None], recovered)
    save_response(tmp_path / "ours.npy", loaded)
    np.testing.assert_array_equal(np.load(tmp_path / "ours.npy"), recovered)
    merged = cv2.createMergeDebevec().process(frames, times, np.load(tmp_path / "ours.npy"))
    assert np.isfinite(merged).all()


def test_pfstools_text(tmp_path: Path) -> None:
    """The layout that pfshdrcalibrate writes, zero response included."""
    lines = []
    for name in ("IR", "IG", "IB"):
        lines += [
            f"# Camera response curve, channel {name}",
            "# data layout: log10(response) | camera output | response",
            f"# name: {name}",
            "# type: matrix",
            "# rows: 3",
            "# columns: 3",
            "    -6.000000000    0     0.000000000",
            "     0.000000000    1     1.000000000",
            "     0.301030010    2     2.000000000",
            "",
        ]
    path = tmp_path / "camera.m"
    path.write_text("\n".join(lines))
    assert load_response(path).tolist() == [[0.0, 1.0, 2.0]] * 3
    save_response(tmp_path / "again.m", load_response(path))
    assert (tmp_path / "again.m").read_text().splitlines()[:7] == [*lines[:6], " -6.000000000e+00    0 0.000000000e+00"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"not a zip", "expected a numpy archive"),
        ("a.npy", b"\x93NUMPY garbage", "expected an OpenCV response"),
        ("a.m", b"# rows: 2\n 0 0 1\n", "does not have its 2 rows"),
        ("a.m", b"# rows: 1\n 0 5 1\n", "camera outputs are not 0, 1, 2"),
        ("a.m", b"\xff\xfe", "expected a pfstools response"),
        ("a.m", b"", "found 0 matrices"),
        ("a.txt", b"", r"the suffix must be one of \['\.m', '\.npy', '\.npz'\]"),
    ],
)
def test_bad_response_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        load_response(path)


def test_bad_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((256, 3), np.float32))
    with pytest.raises(ValueError, match=r"got shape \[256, 3\]"):
        load_response(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", response=np.full((3, 256), np.nan))
    with pytest.raises(ValueError, match="finite and not negative"):
        load_response(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="response"):
        load_response(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError):
        load_response(tmp_path / "absent.npz")


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "camera.m"
    save_response(path, _response())
    before = path.read_bytes()
    for bad in (_response().repeat(2, 1)[:2], torch.full((3, 256), torch.inf), -_response()):
        with pytest.raises(ValueError):
            save_response(path, bad)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="suffix"):
        save_response(tmp_path / "camera.csv", _response())
