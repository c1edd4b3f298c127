"""What the five systems have in common: a frozen configuration, one way to be called on photographs, complexity.

A system is a module with a dataclass ``Config`` whose defaults are its paper's values. Its ``forward`` takes what its
paper's network takes and is documented there; :meth:`System.predict` takes photographs in any order and of any size,
which is what ``hdrops predict`` and a user with files want.
"""

import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrops.models.operations import PaperRow, Report, measure


class System(nn.Module, ABC):
    """Base of the five systems.

    Attributes:
        name: what :func:`hdrops.models.create` calls it.
        frames: photographs that make one HDR image.
        config: the configuration, an instance of the class's ``Config``.
    """

    name: ClassVar[str]
    frames: ClassVar[int]
    Config: ClassVar[type]
    # The figures its paper prints, each with the rule that the paper counted by.
    paper_rows: ClassVar[Sequence[PaperRow]] = ()

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def build(cls, **config: object) -> "System":
        """The system with ``config`` in place of its defaults.

        Raises:
            ValueError: an option it does not have, or a value it does not take.
            TypeError: a value of another type than the option's default.
        """
        unknown = sorted(set(config) - set(cls.options()))
        if unknown:
            raise ValueError(f"{cls.name}: unknown option {', '.join(unknown)}; it has {', '.join(cls.options())}")
        for field in dataclasses.fields(cls.Config):
            if field.name in config:
                _check_type(cls.name, field, config[field.name])
        return cls(cls.Config(**config))

    @classmethod
    def options(cls) -> list[str]:
        """The names of the options that :meth:`build` takes."""
        return [field.name for field in dataclasses.fields(cls.Config)]

    @abstractmethod
    def example_inputs(self, height: int, width: int, part: str = "") -> tuple[Any, ...]:
        """Random arguments of ``forward`` for one image of that size, or of the submodule ``part``'s."""

    @abstractmethod
    def _predict(self, images: Tensor, log_exposures: Tensor) -> Tensor:
        """Radiance [N, 3, H, W] of ``images`` [N, frames, 3, H, W] sorted by ``log_exposures`` [frames]."""

    def predict(self, images: Tensor, log_exposures: Tensor | Sequence[float] | None = None) -> Tensor:
        """An HDR image from photographs.

        The model's mode stays as it is: call ``eval()`` first, for DuHDR has batch norms, and ``torch.no_grad()`` where
        no gradient is wanted.

        Args:
            images: float [N, P, 3, H, W] RGB codes in [0, 1], clamped to that, P = ``self.frames``, in any order and
                of any floating-point type.
            log_exposures: P natural logarithms of exposures in seconds, all different; of one frame none are needed.

        Returns:
            Radiance [N, 3, H, W], linear, relative to the middle exposure.

        Raises:
            ValueError: another number of frames, no pixels, exposures missing, equal, not finite or too far apart.
            TypeError: images that are not floating point, exposures that are no numbers.
        """
        check_images(self.name, images, self.frames)
        if self.frames == 1:
            logs = order = torch.zeros(1, dtype=torch.int64, device="cpu")
        else:
            # On the CPU, where float64 is, and where looking at them waits for no device.
            logs = check_exposures(self.name, log_exposures, self.frames)
            order = logs.argsort()
        if len(images) == 0:
            return images.new_zeros(0, 3, *images.shape[3:])
        return self._predict(images[:, order].clamp(0, 1), logs[order])

    def complexity(self, height: int = 256, width: int = 256, part: str = "") -> Report:
        """Parameters and multiply-adds of one image of that size, of all or of the submodule ``part``.

        See :mod:`hdrops.models.operations` for the rules of counting.

        Raises:
            ValueError: no such part, or one that is not told of alone.
        """
        try:
            module = self.get_submodule(part)
        except AttributeError as error:
            raise ValueError(f"{self.name}: has no part {part!r}") from error
        return measure(module, lambda: self.example_inputs(height, width, part))


def _check_type(op: str, option: "dataclasses.Field[Any]", value: object) -> None:
    """Raises if ``value`` is of another type than the option's default; integers pass for floats, lists for tuples.

    An option without a default value (None) is a file's name.
    """
    if option.default is None:
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{op}: {option.name} must be the name of a file or None, got {value!r}")
    elif not _is_like(value, option.default):
        kind = type(option.default).__name__
        kind = f"{kind} of {type(option.default[0]).__name__}" if isinstance(option.default, tuple) else kind
        raise TypeError(f"{op}: {option.name} must be of type {kind}, got {value!r}")


def _is_like(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(_is_like(one, default[0]) for one in value)
    if isinstance(value, bool) or isinstance(default, bool):  # no number, though Python has it as one
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (float, int) if isinstance(default, float) else type(default))


def check_options(op: str, config: object, *, least: Mapping[str, float], above: Mapping[str, float]) -> None:
    """Raises unless options of ``config`` are finite and at least, or above, the numbers given with their names."""
    for bounds, words in ((least, "at least"), (above, "above")):
        for name, bound in bounds.items():
            value = getattr(config, name)
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if not math.isfinite(number):
                    raise ValueError(f"{op}: {name} must be finite, got {value}")
                if number < bound or (number == bound and words == "above"):
                    raise ValueError(f"{op}: {name} must be {words} {bound}, got {value}")


def check_images(op: str, images: Tensor, frames: int) -> None:
    """Raises unless ``images`` is a float [N, frames, 3, H, W]."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{op}: images must be one tensor [N, {frames}, 3, H, W], got {type(images).__name__}")
    if images.dim() != 5 or images.shape[2] != 3:
        raise ValueError(f"{op}: images must be [N, {frames}, 3, H, W], got shape {list(images.shape)}")
    if images.shape[1] != frames:
        raise ValueError(f"{op}: takes {frames} frames, got {images.shape[1]} (images shape {list(images.shape)})")
    if not images.is_floating_point():
        raise TypeError(f"{op}: images must be floating point codes in [0, 1], got {images.dtype}")
    if 0 in images.shape[3:]:
        raise ValueError(f"{op}: images must have pixels, H and W at least 1, got shape {list(images.shape)}")


def check_exposures(op: str, log_exposures: Tensor | Sequence[float] | None, frames: int) -> Tensor:
    """The exposures as a float64 tensor [frames] on the CPU; raises unless they are finite and all different."""
    if log_exposures is None:
        raise ValueError(f"{op}: needs the logarithms of {frames} exposures, got none")
    try:
        exposures = torch.as_tensor(log_exposures, dtype=torch.float64, device="cpu").detach().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{op}: exposures must be {frames} numbers, got {log_exposures!r}") from error
    if len(exposures) != frames:
        raise ValueError(f"{op}: needs {frames} exposures, got {len(exposures)}")
    if not bool(exposures.isfinite().all()):
        raise ValueError(f"{op}: exposures must be finite logarithms of seconds, got {exposures.tolist()}")
    if len(exposures.unique()) != frames:
        raise ValueError(f"{op}: exposures must differ from each other, got {exposures.tolist()}")
    return exposures


def check_frames(op: str, frames: Sequence[Tensor], channels: int) -> None:
    """Raises unless all frames are floating point [N, channels, H, W] of one size."""
    shapes = ", ".join(str(list(frame.shape)) for frame in frames)
    if any(frame.dim() != 4 or frame.shape[1] != channels for frame in frames):
        raise ValueError(f"{op}: each frame must be [N, {channels}, H, W], got shapes {shapes}")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError(f"{op}: the frames must have one shape, got {shapes}")
    if not all(frame.is_floating_point() for frame in frames):
        raise TypeError(f"{op}: the frames must be floating point, got {', '.join(str(f.dtype) for f in frames)}")
    if 0 in frames[0].shape[2:]:
        raise ValueError(f"{op}: the frames must have pixels, H and W at least 1, got shapes {shapes}")


def at_least_float32(images: Tensor) -> Tensor:
    """Images for arithmetic on radiance, which half precision has too few digits for."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def middle_over_shortest(op: str, image: Tensor, log_exposures: Tensor) -> Tensor:
    """t_2 / t_1 of three exposures, [1 or N, 1, 1, 1]: the shortest one's white, relative to the middle one's.

    Multiplies radiance [N, 3, H, W] in units of the shortest exposure's white to give it in those of the middle one's.
    """
    stack = image[:, None].expand(-1, 3, -1, -1, -1)
    return exposure_ratios(op, log_exposures, stack, reference=0)[:, 1]


def exposure_ratios(op: str, log_exposures: Tensor, images: Tensor, reference: int) -> Tensor:
    """Exposures relative to that of the frame ``reference``, to multiply or divide ``images`` by.

    Args:
        op: name for messages.
        log_exposures: natural logarithms [P] of seconds, or [N, P] for each image its own, ascending.
        images: [N, P, C, H, W].
        reference: index of a frame.

    Returns:
        [1 or N, P, 1, 1, 1] in the dtype and on the device of ``images``.

    Raises:
        ValueError: another shape, exposures that do not ascend, or ratios beyond the dtype of ``images``.
    """
    n, frames = images.shape[:2]
    if log_exposures.shape not in ((frames,), (n, frames)):
        raise ValueError(
            f"{op}: log_exposures must be [{frames}] or [{n}, {frames}], got shape {list(log_exposures.shape)}"
        )
    logs = log_exposures.detach().reshape(-1, frames)
    if not bool((logs.diff(dim=1) > 0).all()):
        raise ValueError(f"{op}: exposures must ascend from frame to frame, got logarithms {logs.tolist()}")
    ratios = (logs - logs[:, reference : reference + 1]).exp().to(images.dtype)
    # Of a photograph divided by it the ratio's inverse must be a number too.
    if not bool((ratios.isfinite() & ratios.reciprocal().isfinite()).all()):
        largest = f"{images.dtype} can hold, {torch.finfo(images.dtype).max:.2g}"
        raise ValueError(f"{op}: exposures must lie within a factor that {largest}, got logarithms {logs.tolist()}")
    return ratios.to(images.device)[:, :, None, None, None]


def pad_to_multiple(image: Tensor, multiple: int, mode: str = "reflect") -> tuple[Tensor, tuple[int, int]]:
    """Pads [N, C, H, W] at bottom and right to multiples; returns it with the height and width to crop back to.

    Reflection repeats the border where the image is smaller than what it is to be padded by.
    """
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if mode == "reflect" and (bottom >= height or right >= width):
        mode = "replicate"
    padded = F.pad(image, (0, right, 0, bottom), mode=mode) if bottom or right else image
    return padded, (height, width)


def crop_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The upper left [..., height, width] of an image, undoing :func:`pad_to_multiple`."""
    return image[..., : size[0], : size[1]]
