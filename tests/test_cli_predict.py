"""`hdrops predict`: files in, files out, weights, and words for whatever is wrong."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hdrops import models
from hdrops.io import read_image
from hdrops.models import System, cli


@dataclass(frozen=True)
class Options:
    gain: float = 1.0


class Mean(System):
    """Three frames: the mean of their linear codes, each over its exposure relative to the middle one."""

    name, frames, Config = "mean", 3, Options

    def __init__(self, config: Options) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.tensor(config.gain))

    def forward(self, images: Tensor, exposures: Tensor) -> Tensor:
        relative = (exposures - exposures[1]).exp().float().view(1, 3, 1, 1, 1)
        return self.gain * (images**2.2 / relative).mean(1)

    def example_inputs(self, height: int, width: int, part: str = "") -> tuple[Tensor, Tensor]:
        return torch.rand(1, 3, 3, height, width), torch.arange(3.0)

    def _predict(self, images: Tensor, log_exposures: Tensor) -> Tensor:
        return self(images, log_exposures)


class One(Mean):
    """One frame: its linear codes."""

    name, frames = "one", 1

    def _predict(self, images: Tensor, log_exposures: Tensor) -> Tensor:
        return self.gain * images[:, 0] ** 2.2


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two systems above stand for the real ones."""
    known = {"mean": (__name__, "Mean"), "one": (__name__, "One")}
    monkeypatch.setattr(models, "_SYSTEMS", known)
    monkeypatch.setattr(models, "system", lambda name: {"mean": Mean, "one": One}[name])


@pytest.fixture
def frames(tmp_path: Path) -> list[str]:
    """A bracket of one scene, exposed 1/4, 1 and 4 s; longest first."""
    scene = np.random.default_rng(0).uniform(0.02, 0.2, (12, 16, 3))
    paths = []
    for number, seconds in enumerate((4, 1, 1 / 4)):
        path = tmp_path / f"{number}.png"
        codes = (65535 * (scene * seconds).clip(0, 1) ** (1 / 2.2) + 0.5).astype(np.uint16)
        cv2.imwrite(str(path), codes[..., ::-1])
        paths.append(str(path))
    return paths


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = cli.main(["predict", *map(str, words)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_frames_in_any_order_become_radiance(capsys, tmp_path: Path, frames: list[str]) -> None:
    output = tmp_path / "a.exr"
    code, out, err = run(capsys, *frames, "--ev", "2,0,-2", "--model", "mean", "-o", output)
    assert code == 0 and "16 x 12, mean from 3 frames" in out and (tmp_path / "a_preview.png").exists()
    assert "warning: mean is untrained" in err
    radiance = read_image(output)
    scene = np.random.default_rng(0).uniform(0.02, 0.2, (12, 16, 3))
    np.testing.assert_allclose(radiance, scene, rtol=2e-2)
    run(capsys, *frames[::-1], "--ev", "-2,0,2", "--model", "mean", "-o", tmp_path / "b.exr")
    np.testing.assert_array_equal(read_image(tmp_path / "b.exr"), radiance)


def test_weights_and_options(capsys, tmp_path: Path, frames: list[str]) -> None:
    torch.save({"model": {"gain": torch.tensor(3.0)}, "epoch": 7}, tmp_path / "w.pt")
    common = [frames[0], "--model", "one", "--no-preview"]
    for name, extra in (("a", []), ("b", ["--config", "gain=2.0"]), ("c", ["--weights", tmp_path / "w.pt"])):
        code, _, err = run(capsys, *common, "-o", tmp_path / f"{name}.exr", *extra)
        assert code == 0 and ("untrained" in err) == (name != "c")
    a, b, c = (read_image(tmp_path / f"{name}.exr") for name in "abc")
    np.testing.assert_allclose(b, 2 * a, rtol=1e-6)
    np.testing.assert_allclose(c, 3 * a, rtol=1e-6)
    assert not (tmp_path / "a_preview.png").exists()


def test_linear_images_are_encoded_as_cameras_do(capsys, tmp_path: Path) -> None:
    linear = np.random.default_rng(1).uniform(0, 1, (8, 8, 3)).astype(np.float32)
    cv2.imwrite(str(tmp_path / "x.hdr"), linear[..., ::-1].copy())
    assert run(capsys, tmp_path / "x.hdr", "--model", "one", "-o", tmp_path / "y.exr")[0] == 0
    np.testing.assert_allclose(read_image(tmp_path / "y.exr"), read_image(tmp_path / "x.hdr"), rtol=1e-4, atol=1e-6)


def test_what_is_wrong_is_said_in_one_line(capsys, tmp_path: Path, frames: list[str]) -> None:
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pt")
    torch.save({"gain": torch.zeros(2)}, tmp_path / "shape.pt")
    torch.save(Mean(Options()), tmp_path / "model.pt")
    (tmp_path / "empty.pt").touch()
    output = ["-o", tmp_path / "a.exr"]
    small = tmp_path / "small.png"
    cv2.imwrite(str(small), np.zeros((4, 4, 3), np.uint16))
    three = ["--model", "mean", *output]
    cases = [
        ([*frames[:2], "--ev", "2,0", *three], "--model mean: takes 3 frames, got 2"),
        ([*frames, "--ev", "2,2,0", *three], "mean: exposures must differ from each other"),
        ([*frames, *three], "no exposure time"),
        ([*frames[:2], small, "--ev", "4,2,0", *three], "the frames of a bracket have one size"),
        ([*frames, "--model", "one", *output], "--model one: takes one image, got 3"),
        ([frames[0], "--ev", "0", *three], "--model mean: takes 3 frames, got 1"),
        ([*frames, frames[0], "--ev", "2,1,0,3", *three], "--model mean: takes 3 frames, got 4"),
        ([frames[0], "--model", "one", "-o", frames[0]], "names no output format"),
    ]
    one = [frames[0], "--model", "one", *output]
    cases += [([*one, f"--{option}", "1"], f"--{option}: is for brackets") for option in ("ev", "times", "list")]
    for words, message in (
        (("depth=3",), "unknown option depth; it has gain"),
        (("depth",), "--config depth: is not of the form NAME=VALUE"),
        (("=3",), "--config =3: is not of the form NAME=VALUE"),
        (("gain=float('nan')",), "--config: one: gain must be of type float"),
        (("gain={[]:1}",), "--config: one: gain must be of type float, got '{[]:1}'"),
        (("gain=True",), "--config: one: gain must be of type float, got True"),
        (("depth=3", "--config", "gain=2.0"), "unknown option depth"),  # the first is not forgotten
        (("gain=1.0", "gain=2.0"), "--config gain=2.0: gain is given twice"),
    ):
        cases.append(([*one, "--config", *words], message))
    for name, message in (
        ("bad", "bad.pt must hold a state dict of tensors alone"),
        ("empty", "empty.pt is no file of weights"),
        ("none", "none.pt cannot be read: No such file"),
        ("other", "other.pt does not fit the model: it lacks 1 of 1 weights, gain first; it has 1 others, other first"),
        ("shape", "shape.pt does not fit the model: 1 are of another form: gain must be [], got [2]"),
        ("list", "list.pt must hold a state dict, names with tensors, got one list"),
        ("numbers", "numbers.pt must hold a state dict, names with tensors, got 0 with Tensor"),
        ("model", "model.pt must hold a state dict of tensors alone"),
    ):
        cases.append(([*one, "--weights", tmp_path / f"{name}.pt"], f"--weights: {tmp_path}/{message}"))
    for words, message in cases:
        code, out, err = run(capsys, *words)
        assert code == 2 and out == "" and message in err, (words, err)
        assert len(err.strip().splitlines()) == 1 + err.count("warning"), err
    assert not (tmp_path / "a.exr").exists()


def test_an_image_that_was_there_stays_when_something_fails(capsys, tmp_path: Path, frames: list[str]) -> None:
    for name in ("a.exr", "a_preview.png"):
        (tmp_path / name).write_text("as it was")
    torch.save({"gain": torch.tensor(torch.nan)}, tmp_path / "nan.pt")
    for words in (["--config", "depth=3"], ["--weights", tmp_path / "nan.pt"]):
        assert run(capsys, frames[0], "--model", "one", "-o", tmp_path / "a.exr", *words)[0] == 2
    assert {(tmp_path / name).read_text() for name in ("a.exr", "a_preview.png")} == {"as it was"}
    assert not list(tmp_path.glob(".*"))


def test_too_little_memory_is_no_error_of_hdrops(capsys, monkeypatch, tmp_path: Path, frames: list[str]) -> None:
    def starve(self: Mean, images: Tensor, log_exposures: Tensor) -> Tensor:
        return torch.empty(1 << 60)

    monkeypatch.setattr(One, "_predict", starve)
    code, _, err = run(capsys, frames[0], "--model", "one", "-o", tmp_path / "a.exr")
    assert code == 2 and "one: cpu has too little memory for images of 16 x 12" in err


def test_the_commands_of_hdrops_are_there_too(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in ("merge", "crf", "tonemap", "info", "bench", "predict"))
