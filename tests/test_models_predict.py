"""Each system on photographs in files: `hdrops predict`, and what the ground floor of all promises."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hdrops import models
from hdrops.io import read_image
from hdrops.models import cli

pytestmark = pytest.mark.usefixtures("one_thread")


# Options that make a system small; files on which a pass takes about a second.
SMALL: dict[str, list[str]] = {
    "sthdr": ["variant=scm_ms"],
    "eapnet": [],
    "duhdr": ["secondary=False"],
    "apnt": [],
    "diffhdr": ["tone_channels=4", "edge_channels=4", "refine_channels=4"],
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A bracket of 37 x 50 pixels, 1/4, 1 and 4 s, 8 bit."""
    folder = tmp_path_factory.mktemp("frames")
    scene = np.random.default_rng(0).uniform(0.02, 1.5, (10, 13, 3)).repeat(4, 0).repeat(4, 1)[:37, :50]
    paths = []
    for number, seconds in enumerate((1 / 4, 1, 4)):
        paths.append(folder / f"{number}.png")
        cv2.imwrite(str(paths[-1]), (255 * (scene * seconds).clip(0, 1) ** (1 / 2.2) + 0.5).astype(np.uint8))
    return paths


@pytest.mark.parametrize("name", models.names())
def test_predict_writes_an_image_of_the_frames_size(
    name: str, frames: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = models.system(name).frames == 1
    given = [str(frames[1])] if single else [*map(str, frames), "--ev", "-2,0,2"]
    config = ["--config", *SMALL[name]] if SMALL[name] else []
    assert cli.main(["predict", *given, "--model", name, "-o", str(tmp_path / "out.exr"), *config]) == 0
    radiance = read_image(tmp_path / "out.exr")
    assert radiance.shape == (37, 50, 3) and np.isfinite(radiance).all() and radiance.min() >= 0
    assert radiance.std() > 0 and (tmp_path / "out_preview.png").exists()
    assert "untrained" in capsys.readouterr().err


@pytest.mark.parametrize("name", models.names())
def test_every_system_refuses_what_is_no_photograph(name: str) -> None:
    with torch.device("meta"):  # without memory and its random start
        model = models.create(name)
    images = torch.rand(1, model.frames, 3, 32, 32)
    times = torch.arange(float(model.frames))
    with pytest.raises(ValueError, match=rf"{name}: takes {model.frames} frames, got {model.frames + 1}"):
        model.predict(torch.rand(1, model.frames + 1, 3, 32, 32), times)
    with pytest.raises(TypeError, match=rf"{name}: images must be floating point"):
        model.predict((images * 255).byte(), times)
    with pytest.raises(ValueError, match=rf"{name}: images must be \[N, {model.frames}, 3, H, W\]"):
        model.predict(images[0], times)
    if model.frames > 1:
        for wrong in (None, times[:-1], times * 0, times / 0):
            with pytest.raises(ValueError, match=f"{name}: .*exposures"):
                model.predict(images, wrong)
