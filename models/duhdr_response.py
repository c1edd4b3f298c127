"""INnet and Nnet of DuHDR: one image in, the camera's response curve found from it, the image mapped by that curve.

    x -> [x, Sobel, tent histograms] (102 channels) -> trunk -> mean over pixels -> 11 coefficients c
      -> monotone_repair(g0 + H c) (1024 samples) -> crf_lookup(x, curve)

INnet's basis is that of inverse responses (``invemor.txt``), Nnet's that of responses (``emor.txt``). The text calls
the trunk a ResNet-18; the published code has :mod:`hdrops.models.crf_net`, whose operations are those that the paper
prints. Nnet's published head depends on the image's size and serves one size only: both have INnet's head here.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hdrops
from hdrops.camera import EMoR
from hdrops.models.crf_net import Trunk
from hdrops.models.duhdr_networks import check_image

_BINS = (4, 8, 16)


class Preoperation(nn.Module):
    """An image beside what tells of its response: edges and histograms.

    Sobel derivatives by y and x of each colour, the border reflected, as ``tf.image.sobel_edges`` gives them; then
    :func:`hdrops.tent_histogram` with 4, 8 and 16 intervals.

    Shapes:
        [N, 3, H, W], H and W at least 2 -> [N, 102, H, W] (3 + 6 + 93).
    """

    CHANNELS = 3 + 6 + 3 * sum(m + 1 for m in _BINS)
    # A multiplication and an addition for each of 9 taps; a subtraction, a product, a subtraction for each tent.
    arithmetic_per_pixel = 6 * 2 * 9 + 3 * 3 * sum(m + 1 for m in _BINS)
    sobel: Tensor

    def __init__(self) -> None:
        super().__init__()
        y = torch.tensor([[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]])
        self.register_buffer("sobel", torch.stack((y, y.T)).repeat(3, 1, 1).unsqueeze(1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        padded = F.pad(image, (1, 1, 1, 1), mode="reflect")
        edges = F.conv2d(padded, self.sobel.to(image.dtype), groups=3)
        return torch.cat((image, edges, hdrops.tent_histogram(image, bins=_BINS)), 1)


class ResponseNet(nn.Module):
    """INnet or Nnet: maps an image by the response curve that it estimates for it (section 3.2, Eq. 7-10).

    Args:
        basis: path of ``invemor.txt`` for INnet, ``emor.txt`` for Nnet; None for the basis of
            :meth:`hdrops.camera.EMoR.parametric`.
        inverse: whether the curves are inverse responses (INnet).
        components: coefficients k; 11 in the paper.

    The mean curve and the k basis curves are buffers, in the state dict as ``basis.mean`` and ``basis.basis``: weights
    carry the basis that they were trained with. Autocast leaves the curve in float32.

    Shapes:
        [N, 3, H, W] in [0, 1], H and W at least 2 -> the same. Values outside count as the nearer end.
    """

    def __init__(self, basis: str | os.PathLike[str] | None = None, *, inverse: bool, components: int = 11) -> None:
        super().__init__()
        self.name = "INnet" if inverse else "Nnet"
        self.preoperation = Preoperation()
        self.trunk = Trunk(Preoperation.CHANNELS)
        self.coefficients = nn.Linear(512, components)
        nn.init.xavier_uniform_(self.coefficients.weight)
        nn.init.zeros_(self.coefficients.bias)
        self.basis = _basis(basis, inverse, components)

    def forward(self, image: Tensor) -> Tensor:
        return hdrops.crf_lookup(image, self.curve(image)[:, None])

    def curve(self, image: Tensor) -> Tensor:
        """The curves [N, 1024] of images [N, 3, H, W], from 0 to 1 and nowhere falling."""
        check_image(f"duhdr: {self.name}", image)
        coefficients = self.coefficients(self.trunk(self.preoperation(image)).mean((2, 3)))
        with torch.autocast(image.device.type, enabled=False):
            exact = torch.float64 if coefficients.dtype == torch.float64 else torch.float32
            curve: Tensor = self.basis.curve(coefficients.to(exact))
        return curve


def _basis(path: str | os.PathLike[str] | None, inverse: bool, components: int) -> EMoR:
    if path is None:
        whole = EMoR.parametric(components, inverse=inverse)
    else:
        whole = EMoR.load(path)
        # Inverse responses bend down from the diagonal, responses up.
        if bool(whole.mean.mean() < 0.5) != inverse:
            wanted, found = ("inverse responses", "responses")[:: 1 if inverse else -1]
            raise ValueError(f"duhdr: {path} must hold {wanted}, it holds {found}")
    if not 1 <= components <= len(whole.basis):
        raise ValueError(f"duhdr: components must lie in 1..{len(whole.basis)}, got {components}")
    return EMoR(whole.mean.float(), whole.basis[:components].float())
