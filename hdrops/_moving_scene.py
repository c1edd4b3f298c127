"""Invented scenes with moving people, of known radiance, and the bracket a camera would take of them.

A hall with a textured wall, a tiled floor, a window much brighter than the rest and a dark corner; people walk through
it and pass the window. The tests of :func:`hdrops.camera.deghost` and ``benches/deghost.py`` use them.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from hdrops.demo import response
from hdrops.io import Pixels

TIMES = (1 / 16, 1 / 4, 1.0)


class MovingScene(NamedTuple):
    """Radiance float32 [P, H, W, 3] as each frame sees it, and bool [H, W], where any frame differs from another."""

    radiance: Pixels
    moving: NDArray[np.bool_]


def moving_scene(seed: int = 0, height: int = 300, width: int = 450, frames: int = 3, people: int = 5) -> MovingScene:
    """The scene at ``frames`` moments; without people, or with one frame, nothing moves."""
    random = np.random.default_rng(seed)
    background = _hall(random, height, width)
    radiance = np.repeat(background[None], frames, 0)
    ways = [_Walker(random, height, width, number / max(people, 1)) for number in range(people)]
    for moment in range(frames):
        for walker in sorted(ways, key=lambda walker: walker.size):  # the near ones, which are larger, last
            walker.paint(radiance[moment], moment - (frames - 1) / 2)
    moving = (np.abs(np.log(radiance) - np.log(radiance[:1])) > 0.02).any((0, 3))
    return MovingScene(radiance, moving)


def photograph(
    radiance: Pixels, times: tuple[float, ...] = TIMES, *, seed: int = 0, electrons: float = 8000, read: float = 5
) -> NDArray[np.uint8]:
    """Frames uint8 [P, H, W, 3]: shot and read noise in electrons, clipping, and the response of the demo's camera."""
    random = np.random.default_rng(seed)
    exposure = radiance * np.array(times)[:, None, None, None]
    noise = np.sqrt(exposure * electrons + read**2) / electrons
    noisy = (exposure + noise * random.standard_normal(exposure.shape)).clip(0, 1)
    return np.asarray(np.rint(255 * response(noisy)), dtype=np.uint8)


def inverse_response() -> torch.Tensor:
    """The inverse response [256] of the demo's camera, 1 at code 128."""
    exposure = np.linspace(0, 1, 100_001)
    curve = np.interp(np.arange(256) / 255, response(exposure), exposure)
    return torch.from_numpy(curve / curve[128]).float()


def _fractal(random: np.random.Generator, height: int, width: int, coarsest: int, octaves: int) -> Pixels:
    """Smooth noise of unit variance on several scales, from ``coarsest`` pixels down."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        cell = max(1, coarsest >> octave)
        grid = torch.from_numpy(
            random.standard_normal((1, 1, height // cell + 3, width // cell + 3)).astype(np.float32)
        )
        fine = F.interpolate(grid, scale_factor=cell, mode="bicubic")[0, 0, cell : cell + height, cell : cell + width]
        total += fine.numpy() / 2 ** (octave / 2)
    return np.asarray(total / total.std(), dtype=np.float32)


def _hall(random: np.random.Generator, height: int, width: int) -> Pixels:
    """Radiance [H, W, 3] of the empty hall."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    floor = y > 0.62
    wall = np.exp(0.18 * _fractal(random, height, width, height // 6, 6))
    depth = 1 / np.maximum(y - 0.55, 0.05)
    tiles = ((np.floor(depth * 1.5) + np.floor((x - 0.5) * depth * 1.2)) % 2) * 0.35 + 0.8
    light = 1.4 * np.where(floor, tiles * (0.6 + 0.8 * (y - 0.62)), wall * (1.1 - 0.5 * y))
    light *= np.exp(0.05 * _fractal(random, height, width, 4, 3)) * (0.12 + 0.88 / (1 + np.exp((x - 0.83) * 40)))
    hue = np.stack([1.0 + 0.12 * np.sin(3 * x + 1), np.ones_like(x), 0.8 + 0.12 * np.cos(4 * y)], -1)
    radiance = light[..., None] * np.where(floor[..., None], [0.8, 0.9, 1.0], hue)
    window = (abs(x - 0.42) < 0.14) & (y > 0.1) & (y < 0.5)
    frame = window & ((abs((x - 0.42) * 7 % 1 - 0.5) > 0.44) | (abs(y - 0.3) < 0.012))
    outside = 8 * (1.2 - y) * np.exp(0.35 * _fractal(random, height, width, height // 10, 6))
    radiance[window] = (outside[..., None] * np.array([0.8, 0.95, 1.2]))[window]
    radiance[frame] = 0.35
    for left in (0.03, 0.68):  # pillars
        pillar = (x > left) & (x < left + 0.06) & (y < 0.7)
        shade = 0.5 + 1.5 * np.sin(np.clip((x - left) / 0.06, 0, 1) * np.pi) ** 2
        radiance[pillar] = (shade * wall)[pillar][:, None] * np.array([0.9, 0.8, 0.7])
    return np.asarray(radiance, dtype=np.float32)


class _Walker:
    """One person of a few limbs, in clothes of two colours, walking sideways and swinging arms and legs."""

    def __init__(self, random: np.random.Generator, height: int, width: int, place: float) -> None:
        self.size = height * random.uniform(0.4, 0.62)
        self.x = width * (0.12 + 0.7 * place + random.uniform(-0.04, 0.04))
        self.y = height * 0.5 + self.size * 0.62
        self.step = random.choice([-1, 1]) * width * random.uniform(0.025, 0.06)
        self.phase = random.uniform(0, 2 * np.pi)
        self.bright = random.uniform(0.08, 0.5)
        self.cloth = np.exp(0.2 * _fractal(random, height, width, 8, 3))
        self.shirt, self.trousers = random.uniform(0.1, 2.5, 3), random.uniform(0.05, 0.8, 3)

    def paint(self, image: Pixels, moment: float) -> None:
        """Draws the person into a radiance [H, W, 3]."""
        size, swing = self.size, np.sin(self.phase + 1.7 * moment)
        x, top = self.x + self.step * moment, self.y - size
        hip, neck = (x, top + 0.52 * size), (x, top + 0.2 * size)
        cloth = np.roll(self.cloth, round(self.step * moment), 1)[..., None]
        for side in (-1, 1):
            foot = (x + side * swing * 0.16 * size, self.y)
            self._limb(image, hip, foot, 0.055 * size, self.trousers * self.bright * cloth)
        self._limb(image, neck, hip, 0.1 * size, self.shirt * self.bright * cloth)
        for side in (-1, 1):
            hand = (x - side * swing * 0.17 * size, top + 0.55 * size)
            self._limb(image, (x, top + 0.22 * size), hand, 0.038 * size, 0.8 * self.shirt * self.bright * cloth)
        head = (x, top + 0.08 * size)
        self._limb(image, head, (x, head[1] + 0.02 * size), 0.065 * size, np.array([0.5, 0.36, 0.28]) * cloth)

    def _limb(
        self, image: Pixels, start: tuple[float, float], end: tuple[float, float], radius: float, colour: Pixels
    ) -> None:
        """A capsule with a soft edge and a lighter left side."""
        y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[1]]
        along = np.array(end) - np.array(start)
        share = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(float(along @ along), 1e-6)
        share = share.clip(0, 1)
        off_x, off_y = x - start[0] - share * along[0], y - start[1] - share * along[1]
        alpha = (radius - np.hypot(off_x, off_y) + 0.5).clip(0, 1)[..., None]
        shade = (1 - 0.4 * off_x / radius).clip(0.4, 1.6)[..., None]
        image[:] = image * (1 - alpha) + alpha * colour * shade
