"""Empirical model of response (Grossberg and Nayar, CVPR 2003): a curve as a mean plus a few basis curves.

    curve(c) = monotone_repair(mean + sum_k c_k basis_k),     1024 samples over [0, 1]

The public ``emor.txt`` (responses, exposure to brightness) and ``invemor.txt`` (their inverses) load from a path.
Without them, :meth:`EMoR.parametric` builds a basis of the same form from closed formulas.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from hdrops.camera.curves import monotone_repair, resample_curve

_SAMPLES = 1024
# Names of the mean and of the basis curves in the two public files.
_NAMES = (("f0", "h"), ("g0", "hinv"))


class EMoR(nn.Module):
    """A linear space of response curves.

    Attributes:
        mean: buffer [S], the curve of zero coefficients.
        basis: buffer [K, S], one basis curve per row, orthonormal.

    Example:
        >>> import torch
        >>> from hdrops.camera import EMoR
        >>> model = EMoR.parametric()
        >>> curve = model.curve(torch.tensor([[0.5, -0.2, 0.1]], dtype=torch.float64))
        >>> list(curve.shape), bool((curve.diff() >= 0).all())
        ([1, 1024], True)
        >>> [round(float(c), 3) for c in model.fit(curve, components=3)[0]]
        [0.5, -0.2, 0.1]
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, mean: Tensor, basis: Tensor) -> None:
        super().__init__()
        if mean.dim() != 1 or basis.dim() != 2 or basis.shape[1] != mean.shape[0]:
            raise ValueError(
                f"EMoR: mean must be [S] and basis [K, S], got shapes {list(mean.shape)} and {list(basis.shape)}"
            )
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EMoR":
        """Reads the public ``emor.txt`` or ``invemor.txt`` in float64, all 25 basis curves.

        Raises:
            FileNotFoundError: no such file. ValueError: not such a file; names it and what was expected.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"EMoR.load: no such file: {path}")
        expected = f"blocks `f0 =`, `h(1)=`, ... or `g0 =`, `hinv(1)=`, ... of {_SAMPLES} numbers each"
        try:
            blocks = _read_blocks(path)
        except ValueError as error:
            raise ValueError(f"EMoR.load: {path}: expected {expected} ({error})") from error
        for mean, basis in _NAMES:
            count = 0
            while f"{basis}({count + 1})" in blocks:
                count += 1
            if mean in blocks and count:
                curves = [blocks[mean]] + [blocks[f"{basis}({k + 1})"] for k in range(count)]
                if any(curve.numel() != _SAMPLES or not bool(curve.isfinite().all()) for curve in curves):
                    lengths = sorted({curve.numel() for curve in curves})
                    raise ValueError(f"EMoR.load: {path}: expected {expected}, got blocks of {lengths} numbers")
                return cls(curves[0], torch.stack(curves[1:]))
        raise ValueError(f"EMoR.load: {path}: expected {expected}, found {sorted(blocks)[:5]}")

    @classmethod
    def parametric(cls, components: int = 11, *, inverse: bool = False, gamma: float = 2.2) -> "EMoR":
        """A basis from formulas: the power curve, its change with gamma, then sines.

        The mean is p(x) = x^(1/gamma), or x^gamma for inverse responses. The basis is the orthonormalised sequence
        p ln p, p ln^2 p (first and second derivative by the logarithm of the exponent), sin(pi x), sin(2 pi x), ...:
        all are 0 at both ends, as deviations of responses are.

        Args:
            components: number of basis curves, 1 .. 100.
            inverse: for inverse responses (brightness to exposure).
            gamma: of the mean.
        """
        if not 1 <= components <= 100:
            raise ValueError(f"EMoR.parametric: components must lie in 1..100, got {components}")
        if not gamma > 0:
            raise ValueError(f"EMoR.parametric: gamma must be positive, got {gamma}")
        x = torch.linspace(0, 1, _SAMPLES, dtype=torch.float64)
        power = x.pow(gamma if inverse else 1 / gamma)
        logarithm = power.clamp_min(1e-300).log()
        curves = [power * logarithm, power * logarithm.square()]
        curves += [torch.sin(torch.pi * k * x) for k in range(1, components)]
        stacked = torch.stack(curves[:components], dim=1)
        orthonormal, triangle = torch.linalg.qr(stacked)
        basis = (orthonormal * triangle.diagonal().sign()).mT.contiguous()
        basis[:, [0, -1]] = 0
        return cls(power, basis)

    def curve(self, coefficients: Tensor) -> Tensor:
        """Monotone curves [..., S], from 0 to 1, of coefficients [..., K'], K' <= K: of the first K' basis curves.

        Computed and returned in the dtype of ``coefficients``; differentiable (see :func:`monotone_repair`).
        """
        if not coefficients.is_floating_point():
            raise TypeError(f"EMoR.curve: coefficients must be floating point, got {coefficients.dtype}")
        count = self._count("curve", coefficients.shape[-1] if coefficients.dim() else 0)
        raw = self.mean.to(coefficients.dtype) + coefficients @ self.basis[:count].to(coefficients.dtype)
        return monotone_repair(raw)

    forward = curve

    def fit(self, curve: Tensor, components: int | None = None) -> Tensor:
        """Least-squares coefficients [..., components] of curves [..., L]; L other than S is resampled linearly."""
        count = self._count("fit", self.basis.shape[0] if components is None else components)
        deviation = resample_curve(curve, self.mean.shape[0]) - self.mean.to(curve.dtype)
        inverse: Tensor = torch.linalg.pinv(self.basis[:count].double()).to(curve.dtype)
        return torch.matmul(deviation, inverse)

    def _count(self, name: str, count: int) -> int:
        if not 1 <= count <= self.basis.shape[0]:
            raise ValueError(
                f"EMoR.{name}: the number of coefficients must lie in 1..{self.basis.shape[0]}, got {count}"
            )
        return count


def _read_blocks(path: Path) -> dict[str, Tensor]:
    """Blocks of numbers by name, each begun by a line `name =`."""
    blocks: dict[str, list[float]] = {}
    current: list[float] | None = None
    for line in path.read_text(encoding="ascii").splitlines():
        name, equals, rest = line.partition("=")
        if equals:
            current = blocks.setdefault(name.strip(), [])
            line = rest
        if current is None and line.strip():
            raise ValueError("text before the first block")
        if current is not None:
            current += map(float, line.split())
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in blocks.items()}
