"""DuHDR: a photograph in, radiance out, by networks that undo the steps of a camera (She, Ye, Li, Zhao, Zhu and Wang,
"Single-image HDR reconstruction by dual learning the camera imaging process").

The primary path undoes what a camera does, one network for each of its steps; the secondary path does it again, so that
training can compare the result with the photograph, and learn from photographs that have no HDR image::

    L -> Dnet -> I_n -> INnet -> I_clip -> ITnet -> H_hat -> OOnet({H_hat, I_clip, I_n}) -> H_oo          primary
    L <- Q    <- I_n <- Nnet  <- I_clip <- C     <- H                                                     secondary

    Dnet   U-net: takes out the noise of 8 bits and of JPEG                                  1,999,779 parameters
    INnet  finds the inverse response of the camera from the image and applies it            1,200,971
    ITnet  VGG16 auto-encoder: what lies beyond white, added under a mask                   24,569,118
    OOnet  U-net: contrast and colour                                     2,553,479 with RFB; 3,046,659 without
    Nnet   INnet's twin for the response; for training only                                  1,200,971
    C, Q   hdrops.truncate and hdrops.quantize_ste, without parameters

Where sources differ. Followed is the published code for the widths of the networks and the trunk of INnet, because
its parameters and operations are those that the paper prints; and the text for the rest: the mask's 0.95 (code: 0.88),
what OOnet takes (code: L in place of H_hat), the mask on ITnet's output, Nnet, the receptive field blocks. The paper's
table, though, counts OOnet without receptive field blocks: ``downblock="conv"`` gives its 30.81 M parameters.
Quantisation has no gradient in the code; here it has the straight-through one, without which the dual losses train
nothing.

Training, with all losses, is in :mod:`hdrops.models.duhdr_training`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hdrops
from hdrops.models import crf_net, duhdr_training
from hdrops.models._system import System, check_options, crop_to, pad_to_multiple
from hdrops.models.duhdr_networks import Dnet, ITnet, OOnet, check_image
from hdrops.models.duhdr_response import ResponseNet
from hdrops.models.operations import PaperRow

# Inference: sizes are raised to multiples of the first, then a border of the second is added on each side.
_MULTIPLE = 64
_BORDER = 32


@dataclass(frozen=True)
class DuHDRConfig:
    """Options of DuHDR; the defaults are the paper's.

    Attributes:
        downblock: of OOnet, "rfb" (the text) or "conv" (what the paper's complexity was counted with).
        multi_scale: whether OOnet has MS-SE in its middle; without, "conv" and "rfb" are the ablation's U-Net and RFB.
        alpha: radiance from which ITnet's mask rises; 0.88 to go with SingleHDR's weights.
        components: coefficients of a response curve.
        secondary: whether to have Nnet, which training needs and inference does not.
        invemor: path of the public ``invemor.txt``, INnet's basis; None for :meth:`hdrops.camera.EMoR.parametric`.
        emor: path of ``emor.txt``, Nnet's basis; None likewise.
        vgg_weights: of VGG16, where ITnet starts and what the perceptual loss compares: a file, "torchvision", or None
            for a random start (:class:`hdrops.models.backbones.VGG`).
        vgg_input: what those weights expect, "caffe" (the published system) or "torchvision".
        crf_net: path of CRF-Net's weights, where INnet and Nnet start (:func:`hdrops.models.crf_net.load_crf_net`);
            None for a random start.
        seed: of VGG's random start. The other layers start from torch's global generator.
        dn_dual: weight of Q in Eq. 5.
        dnm_dual: weight of Nnet in Eq. 13.
        dnm_dn: weight of Dnet in Eq. 13.
        prec: weight of the perceptual loss in Eq. 16 and 17.
        itn_dual: weight of the well exposed area in Eq. 17.
        iterations: of truncation and ITnet, in Eq. 18-20.
    """

    downblock: str = "rfb"
    multi_scale: bool = True
    alpha: float = 0.95
    components: int = 11
    secondary: bool = True
    invemor: str | None = None
    emor: str | None = None
    vgg_weights: str | None = None
    vgg_input: str = "caffe"
    crf_net: str | None = None
    seed: int = 0
    dn_dual: float = 10.0
    dnm_dual: float = 0.01
    dnm_dn: float = 0.005
    prec: float = 0.001
    itn_dual: float = 10.0
    iterations: int = 3

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("dn_dual", "dnm_dual", "dnm_dn", "prec", "itn_dual"), 0)
        check_options("duhdr", self, least={**weights, "iterations": 1, "components": 1}, above={})


class Reconstruction(NamedTuple):
    """What the primary path finds, stage by stage; all [N, 3, H, W].

    Attributes:
        nonlinear: I_n, Dnet's: the photograph without the noise of its coding, in [0, 1].
        clipped: I_clip, INnet's: linear, in [0, 1].
        restored: H_hat, ITnet's: linear, beyond 1 where the photograph is white.
        radiance: H_oo, OOnet's: the result, at least 0.
    """

    nonlinear: Tensor
    clipped: Tensor
    restored: Tensor
    radiance: Tensor


class DuHDR(System):
    """DuHDR, see :mod:`hdrops.models.duhdr` for the system and :class:`DuHDRConfig` for its options.

    Shapes:
        ``forward``: L [N, 3, H, W], RGB codes in [0, 1], any H and W -> :class:`Reconstruction`. Sizes that are no
        multiples of 32 are padded by reflection inside; L is converted to the weights' type. ``predict`` resizes and
        pads as the published inference does.

    Radiance is relative: training sets the mean of its HDR images to 0.5.

    The state dict has ``dnet.*``, ``innet.*``, ``itnet.*``, ``oonet.*`` and, with ``secondary``, ``nnet.*``. Within
    them: ``itnet.encoder.*`` has torchvision's names of VGG16, ``innet.trunk.*`` CRF-Net's
    (:mod:`hdrops.models.crf_net`), ``innet.basis.*`` the basis of response curves. Published weights need their kernels
    turned from HWIO to OIHW (depthwise: HWCM to CMHW), nothing else: padding, enlargement and depth_to_space are
    TensorFlow's, so no channel changes its place.

    Half precision: under autocast, which keeps the response curves in float32; not by ``.half()``, which rounds them.

    Example:
        >>> import torch, hdrops.models
        >>> model = hdrops.models.create("duhdr", secondary=False).eval()
        >>> with torch.no_grad():
        ...     model.predict(torch.rand(1, 1, 3, 40, 50)).shape
        torch.Size([1, 3, 40, 50])
    """

    name: ClassVar[str] = "duhdr"
    frames: ClassVar[int] = 1
    Config: ClassVar[type] = DuHDRConfig
    _printed: ClassVar[dict[str, object]] = {"downblock": "conv", "secondary": False}
    paper_rows: ClassVar[Sequence[PaperRow]] = (
        PaperRow("Table 2, DuHDR", "tensorflow", (512, 512), 30.81, 452.43, _printed),
        PaperRow("section 4.2, Dnet", "tensorflow", (512, 512), None, 37.94, _printed, "dnet"),
        PaperRow("section 4.2, INnet", "tensorflow", (512, 512), None, 54.50, _printed, "innet"),
        PaperRow("section 4.2, ITnet", "tensorflow", (512, 512), None, 320.52, _printed, "itnet"),
        PaperRow("section 4.2, OOnet", "tensorflow", (512, 512), None, 39.47, _printed, "oonet"),
    )
    config: DuHDRConfig

    def __init__(self, config: DuHDRConfig | None = None) -> None:
        config = config or DuHDRConfig()
        super().__init__(config)
        self.dnet = Dnet()
        self.innet = ResponseNet(config.invemor, inverse=True, components=config.components)
        self.itnet = ITnet(config.alpha, config.vgg_weights, config.vgg_input, config.seed)
        self.oonet = OOnet(config.downblock, config.multi_scale)
        self.nnet = ResponseNet(config.emor, inverse=False, components=config.components) if config.secondary else None
        if config.crf_net is not None:
            for net in (self.innet, self.nnet):
                if net is not None:
                    crf_net.load_crf_net(net.trunk, config.crf_net)

    def forward(self, ldr: Tensor) -> Reconstruction:
        check_image("duhdr", ldr)
        padded, size = pad_to_multiple(ldr.to(self.itnet.fuse.weight.dtype), ITnet.MULTIPLE)
        nonlinear = self.dnet(padded)
        clipped = self.innet(nonlinear)
        restored = self.itnet(clipped)
        radiance = self.oonet(restored, clipped, nonlinear)
        return Reconstruction(*(crop_to(image, size) for image in (nonlinear, clipped, restored, radiance)))

    def photograph(self, radiance: Tensor) -> Tensor:
        """The secondary path, Eq. 1: Q(Nnet(C(H))), the photograph that the camera would take of H [N, 3, H, W].

        Differentiable, through Q straight-through.

        Raises:
            ValueError: the model was made without Nnet.
        """
        check_image("duhdr", radiance)
        return hdrops.quantize_ste(self.nonlinear_net(hdrops.truncate(radiance)))

    @property
    def nonlinear_net(self) -> ResponseNet:
        """Nnet; raises ValueError where the model was made without."""
        if self.nnet is None:
            raise ValueError("duhdr: the secondary path needs Nnet, and the model was made with secondary=False")
        return self.nnet

    def loss(self, batch: "duhdr_training.Batch", phase: str = "P8", perceptual: nn.Module | None = None) -> Tensor:
        """The loss of a phase of training; see :mod:`hdrops.models.duhdr_training` for the phases and equations.

        Args:
            batch: images; what a phase needs of them is told by the error where it is missing.
            phase: "P1" ... "P8" of Algorithm 1, "U1" ... "U4" of Algorithm 2.
            perceptual: :class:`hdrops.models.duhdr_training.Perceptual`, for the phases that train ITnet on pairs.
        """
        return duhdr_training.phase_named(phase).loss(self, batch, perceptual)

    def example_inputs(self, height: int, width: int, part: str = "") -> tuple[Any, ...]:
        return tuple(torch.rand(1, 3, height, width) for _ in range(3 if part == "oonet" else 1))

    def _predict(self, images: Tensor, log_exposures: Tensor) -> Tensor:
        """The published inference: raised to multiples of 64, mirrored border of 32, cropped, brought back."""
        image = images[:, 0]
        size = image.shape[-2:]
        raised = [-(-length // _MULTIPLE) * _MULTIPLE for length in size]
        resized = list(size) != raised
        if resized:
            image = F.interpolate(image, size=raised, mode="bicubic", align_corners=False).clamp(0, 1)
        radiance: Tensor = self(_mirror(_mirror(image, -1), -2)).radiance
        radiance = radiance[..., _BORDER:-_BORDER, _BORDER:-_BORDER]
        if resized:
            radiance = F.interpolate(radiance, size=size, mode="bicubic", align_corners=False).clamp_min(0)
        return radiance


def _mirror(image: Tensor, axis: int) -> Tensor:
    """A border that repeats the edge (numpy's "symmetric"), on both sides."""
    length = image.shape[axis]
    before, after = image.narrow(axis, 0, _BORDER), image.narrow(axis, length - _BORDER, _BORDER)
    return torch.cat((before.flip(axis), image, after.flip(axis)), axis)
