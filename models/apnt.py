"""APNT-Fusion: three photographs become one HDR image, saturated areas by transfer of texture from the shortest.

Chen, Yang, Chan, Li, Hou and Chau, "Attention-Guided Progressive Neural Texture Fusion for High Dynamic Range Image
Restoration". s, m and l are the short, middle and long exposure; the result is aligned with m. The authors published no
code, and the paper no widths, depths or windows: there the defaults of :class:`APNTConfig` are this package's choice::

    H_k = I_k^2.2 / t_k                                            Eq. 3        F_k = F_ex(H_k), one F_ex for all
    motion attention      a_k = F_mt^k(F_k, F_m), k in {s, l}                   A_k = sigmoid(a_k)
    to be merged          F_mef = [F_m, F_s A_s, F_l A_l]          Eq. 4
    saturation attention  a_sat^k = F_sat(mask of k), k in {s, m}  Eq. 12       A_sat = sigmoid(a_sat^m)
    saturation clues      F_nft = F_s sigmoid(a_s + a_sat^s)       Eq. 9
    matching (NTM)        Psi(H_m) to Psi(H_s masked): relu3_1, then relu2_1, then relu1_1 of VGG19     Eq. 5 to 8
    transfer (NFT)        F_swp^l = patches of Phi_l(F_nft), l = 0, 1, 2, where they matched; Phi = F_enc
    blending (PTB)        D_2, D_1, D_0 = F_dec(F_swp)
                          A_1 = F_sc^1(D_2 x4, D_1 x2), A_0 = F_sc^0(D_1 x2, D_0)                       Eq. 10, 11
                          H_mef = sigmoid(N_mef[A_sat D_2 x4, A_1 D_1 x2, A_0 D_0, F_mef])              Eq. 13
    output                H = H_m (1 - F_wgt(A_sat)) + H_mef       Eq. 14

    part              what it is, with C = 64 channels                                           parameters
    extract           F_ex: conv3 3 -> C                                                              1,792
    motion_short/long F_mt: conv3 2C -> C -> C                                                    2 x 110,720
    saturation        F_sat: conv3 1 -> C/2 -> C                                                     18,816
    encoder           F_enc: two channel attention blocks for each of the scales 1, 1/2, 1/4        446,616
    decoder           F_dec: likewise from coarse to fine; conv1 2C -> C joins a scale's F_swp       463,128
    enlarge2/1        x4, x2: two and one transposed conv4 of stride 2                              196,800
    scale1/0          F_sc: conv3 2C -> C -> C                                                    2 x 110,720
    reweight          F_wgt: conv3 C -> C/2 -> 3                                                     19,331
    merge             N_mef: conv3 6C -> C, ten channel attention blocks, conv3 C -> 3              967,339
    vgg               VGG19 up to relu3_1, frozen                                                   555,328

Where the paper is not followed to the letter, and why:

* The masked saturated domain. The paper compares H_s with (t_s / t_m) eps, which is I_s^2.2's level, not that of H_s.
  Here min(H_s, eps / t_m): what the middle exposure would clip is clipped, which is what the text wants. VGG sees
  min(H t_m / eps, 1) of both images, so that saturated areas are the same number, 1, in both.
* Eq. 5 divides by the norm of H_m's patch, which cannot change the best match and lets bright candidates win. Here the
  candidate's norm divides; ``normalize="query"`` is the letter.
* Eq. 9 adds A_s and a_sat^s before a sigmoid. Both are taken before their own sigmoids; a sum of values in (0, 1) could
  not close the gate.
* "A sigmoid at the end keeps H in [0, 1]" and the sum of Eq. 14 exclude each other. The sigmoid is N_mef's last, and
  ``predict`` clamps; ``sigmoid="output"`` takes the other reading.

Memory of matching, from the shapes: of a 1000 x 1500 image the features of both images are 2 x (64 x 1000 x 1500 +
128 x 500 x 750 + 256 x 250 x 375) floats, 1.34 GB in float32 and half in bfloat16; the matches 12 bytes for each of the
1,968,750 sites, 24 MB; the candidates' norms 8 MB. The features are channels last, so that the kernels need no copy of
them. Nothing grows with the window or with the square of the image: the correlation of all pairs at the coarsest scale
alone would take 35 GB, the unfolded 3x3 patches of one coarsest map 0.86 GB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hdrops
from hdrops.camera import mu_law
from hdrops.models import losses
from hdrops.models._blocks import ChannelAttentionBlock, OutputConv2d, start_by_xavier
from hdrops.models._system import (
    System,
    at_least_float32,
    check_images,
    check_options,
    crop_to,
    exposure_ratios,
    middle_over_shortest,
    pad_to_multiple,
)
from hdrops.models.backbones import VGG, imagenet_normalize
from hdrops.models.operations import PaperRow
from hdrops.ops.patch_match import NORMALIZATIONS, PATCH_SIZES

# Features that are matched, fine to coarse: of the whole, half and quarter resolution.
VGG_LAYERS = ("relu1_1", "relu2_1", "relu3_1")
_COARSEST = 2 ** (len(VGG_LAYERS) - 1)
_SLOPE = 0.1


@dataclass(frozen=True)
class APNTConfig:
    """Options of :class:`APNTFusion`; the defaults are the whole system. Those of table II are marked with its rows.

    Attributes:
        channels: C, of every feature.
        blocks: channel attention blocks of N_mef.
        reduction: of channel attention.
        inputs: what F_ex sees, "radiance" (H_k) or "both" (I_k and H_k).
        gamma: of the camera, Eq. 3.
        saturation: code from which a pixel counts as saturated.
        ms_hdr: match in the masked saturated domain; False is "w/o MS-HDR": VGG then sees H_s t_m / eps unclipped.
        transfer: False is "w/o NFT": F_dec takes Phi(F_m), and nothing is matched.
        matching: "vgg", or "vgg_fine" ("w/o VGG-L2L3": relu1_1 alone, in a window of the same reach, matches of the
            coarser scales being those of each block's first site), or "encoder" ("w/o VGG w F_enc": Phi(F_m) to
            Phi(F_nft), without a gradient through the matching).
        motion_attention: False is "w/o Motion Att.": A_s = A_l = 1, in Eq. 9 too.
        scale_attention: False is "w/o Scale Att.": A_1 = A_0 = 1.
        radii: of the window at each scale, coarse to fine; a site is 4, 2, 1 pixels there.
        patch_size: of matching and transfer.
        normalize: of matching, see :func:`hdrops.patch_match`.
        vgg_curve: "linear", or "mu" for VGG to see tone-mapped images.
        vgg_weights: a file of torchvision's VGG19, "torchvision" or None for a random start.
        seed: of VGG's random start; the rest starts from torch's global generator.
        swap_mask: keep Phi(F_m) where m is not saturated, instead of replacing every patch.
        shared_saturation: one F_sat for both masks.
        sigmoid: "merge" on H_mef, "output" on the sum of Eq. 14.
        mu: of the loss and of ``vgg_curve="mu"``.
    """

    channels: int = 64
    blocks: int = 10
    reduction: int = 16
    inputs: str = "radiance"
    gamma: float = 2.2
    saturation: float = 0.98
    ms_hdr: bool = True
    transfer: bool = True
    matching: str = "vgg"
    motion_attention: bool = True
    scale_attention: bool = True
    radii: Sequence[int] = (8, 2, 2)
    patch_size: int = 3
    normalize: str = "key"
    vgg_curve: str = "linear"
    vgg_weights: str | None = None
    seed: int = 0
    swap_mask: bool = False
    shared_saturation: bool = True
    sigmoid: str = "merge"
    mu: float = 5000.0

    def __post_init__(self) -> None:
        for option, allowed in (
            ("inputs", ("radiance", "both")),
            ("matching", ("vgg", "vgg_fine", "encoder")),
            ("vgg_curve", ("linear", "mu")),
            ("sigmoid", ("merge", "output")),
            ("normalize", NORMALIZATIONS),
            ("patch_size", PATCH_SIZES),
        ):
            if getattr(self, option) not in allowed:
                words = ", ".join(map(str, allowed))
                raise ValueError(f"apnt: {option} must be one of {words}, got {getattr(self, option)!r}")
        if len(self.radii) != len(VGG_LAYERS):
            raise ValueError(f"apnt: radii must be {len(VGG_LAYERS)} of at least 0, got {list(self.radii)}")
        counts = {"channels": 2, "blocks": 0, "reduction": 1, "radii": 0}
        check_options("apnt", self, least=counts, above={"gamma": 0, "mu": 0})
        if self.channels % 2 or self.channels % self.reduction:
            raise ValueError(
                f"apnt: channels must be even and a multiple of reduction = {self.reduction}, got {self.channels}"
            )
        if not 0 < self.saturation <= 1:
            raise ValueError(f"apnt: saturation must lie in (0, 1], got {self.saturation}")


def to_radiance(images: Tensor, times: Tensor, gamma: float = 2.2) -> Tensor:
    """H_k = I_k^gamma / t_k, Eq. 3, in float32 at least; codes below 0 count as 0.

    Args:
        images: [N, P, 3, H, W] codes in [0, 1].
        times: exposure times, [P] or [N, P].
        gamma: of the camera.
    """
    codes = at_least_float32(images)
    return codes.clamp_min(0).pow(gamma) / times.to(codes).reshape(-1, times.shape[-1], 1, 1, 1)


class Encoder(nn.Module):
    """F_enc: two channel attention blocks at each scale, bilinear halving between. [N, C, H, W] -> fine to coarse."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_two_blocks(channels, reduction) for _ in VGG_LAYERS)

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for level in self.levels:
            if found:
                x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
            x = level(x)
            found.append(x)
        return found


class Decoder(nn.Module):
    """F_dec: the encoder mirrored; each finer scale joins the coarser one's output to its own input, fine to coarse."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_two_blocks(channels, reduction) for _ in VGG_LAYERS)
        self.join = nn.ModuleList(nn.Conv2d(2 * channels, channels, 1) for _ in VGG_LAYERS[1:])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        found = [self.levels[-1](features[-1])]
        for level in range(len(self.join) - 1, -1, -1):
            coarser = F.interpolate(found[0], scale_factor=2, mode="bilinear", align_corners=False)
            joined = self.join[level](torch.cat((coarser, features[level]), 1))
            found.insert(0, self.levels[level](joined))
        return found


class TextureMatching(nn.Module):
    """NTM: for every place of the middle exposure the most similar one of the short exposure, at three scales."""

    def __init__(self, config: APNTConfig) -> None:
        super().__init__()
        self.config = config
        self.vgg: VGG | None = None
        if config.matching != "encoder":
            layers = VGG_LAYERS if config.matching == "vgg" else VGG_LAYERS[:1]
            self.vgg = VGG(19, layers, config.vgg_weights, config.seed)

    def features(self, radiance: Tensor, white: Tensor, masked: bool) -> list[Tensor]:
        """VGG's features, fine to coarse, of H [N, 3, H, W], white being eps / t_m; masked: clipped there."""
        assert self.vgg is not None
        level = radiance / white
        if masked:
            level = level.clamp_max(1)
        if self.config.vgg_curve == "mu":
            level = mu_law(level, self.config.mu)
        # Channels last goes on to the features, of which matching then needs no copy.
        level = level.to(next(self.vgg.parameters()).dtype, memory_format=torch.channels_last)
        with torch.no_grad():
            found: list[Tensor] = self.vgg(imagenet_normalize(level))
        return found

    def match(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> list[Tensor]:
        """Indices [N, H_l, W_l] into the keys' grids, int64, all fine to coarse."""
        config = self.config
        options: dict[str, Any] = {"patch_size": config.patch_size, "normalize": config.normalize}
        if config.matching == "vgg_fine":
            reach = _COARSEST * config.radii[0]
            fine = hdrops.patch_match(queries[0], keys[0], radius=reach, **options).index
            return [_coarser(fine, 2**level) for level in range(len(VGG_LAYERS))]
        matches = hdrops.patch_match_pyramid(queries[::-1], keys[::-1], radii=config.radii, **options)
        return [found.index for found in reversed(matches)]

    def forward(self, short: Tensor, middle: Tensor, white: Tensor) -> list[Tensor]:
        """Matches of H_m [N, 3, H, W] in H_s by VGG's features; H and W multiples of 4, white [N, 1, 1, 1]."""
        keys = self.features(short, white, self.config.ms_hdr)
        return self.match(self.features(middle, white, True), keys)


class APNTFusion(System):
    """The network; see :mod:`hdrops.models.apnt` for the paper, the diagram and what is followed.

    Shapes:
        images [N, 3, 3, H, W], RGB codes in [0, 1] of the short, middle and long exposure; times [3] or [N, 3] ->
        H_out [N, 3, H, W], linear, in the unit of images^gamma / times. Any H and W: padded inside to multiples of 4
        by reflection.

    The network is made for H in [0, 1], and can give at most 2. ``prepare`` therefore gives the shortest exposure the
    time 1, so that what saturates even that one is 1; ``encode_target`` and ``decode`` go to that unit and back to the
    middle exposure's, as training and ``predict`` need it.

    Features follow the weights' dtype and autocast. H, the output and the convolutions that it is made by stay in
    float32 under autocast. With weights in channels_last the whole network runs in it. ``torch.compile`` finds no graph
    breaks.

    Training, as the paper has it: :meth:`loss`, Adam with 1e-5, crops of 256 one at a time.

    The state dict has the names of the parts (``extract.weight``, ``encoder.levels.0.1.body.2.bias``, ...); those of
    VGG, under ``matching.vgg.features``, are torchvision's. A part that a configuration does not use is not there.

    Example:
        >>> import torch, hdrops.models
        >>> model = hdrops.models.create("apnt", channels=16, blocks=1).eval()
        >>> with torch.no_grad():
        ...     model.predict(torch.rand(1, 3, 3, 30, 37), torch.tensor([0.25, 1, 4]).log()).shape
        torch.Size([1, 3, 30, 37])
    """

    name: ClassVar[str] = "apnt"
    frames: ClassVar[int] = 3
    Config: ClassVar[type] = APNTConfig
    # The paper prints no figures: these lines only say what the network takes, without the matching.
    paper_rows: ClassVar[Sequence[PaperRow]] = (
        PaperRow("training crop, nothing printed", "fixed", (256, 256)),
        PaperRow("test image, nothing printed", "fixed", (1000, 1500)),
    )
    config: APNTConfig

    def __init__(self, config: APNTConfig | None = None) -> None:
        config = config or APNTConfig()
        super().__init__(config)
        channels, reduction = config.channels, config.reduction

        def attention(wanted: bool) -> nn.Sequential | None:
            return _two_convs(2 * channels, channels, channels) if wanted else None

        self.extract = nn.Conv2d(3 if config.inputs == "radiance" else 6, channels, 3, padding=1)
        self.motion_short = attention(config.motion_attention)
        self.motion_long = attention(config.motion_attention)
        self.saturation = _two_convs(1, channels // 2, channels)
        separate = config.transfer and not config.shared_saturation
        self.saturation_short = _two_convs(1, channels // 2, channels) if separate else None
        self.encoder = Encoder(channels, reduction)
        self.decoder = Decoder(channels, reduction)
        self.enlarge2 = nn.Sequential(_doubling(channels), _doubling(channels))
        self.enlarge1 = _doubling(channels)
        self.scale1 = attention(config.scale_attention)
        self.scale0 = attention(config.scale_attention)
        self.reweight = _two_convs(channels, channels // 2, 3, OutputConv2d)
        self.merge = nn.Sequential(
            nn.Conv2d(6 * channels, channels, 3, padding=1),
            *(ChannelAttentionBlock(channels, reduction) for _ in range(config.blocks)),
            OutputConv2d(channels, 3, 3, padding=1),
        )
        start_by_xavier(self)
        # After that: VGG has its own start.
        self.matching = TextureMatching(config) if config.transfer else None

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """H_out, Eq. 14; see the class for shapes and units.

        Args:
            images: sorted by exposure, the shortest first.
            times: exposure times, positive and rising; their values are not looked at (``prepare`` does).

        Raises:
            ValueError: images that are not three frames of RGB, times of another shape.
            TypeError: images or times that are not floating point.
        """
        check_images(self.name, images, self.frames)
        self._check_times(images, times)
        frames, size = pad_to_multiple(images.flatten(0, 1), _COARSEST)
        codes = frames.reshape(*images.shape[:3], *frames.shape[2:])
        radiance = to_radiance(codes, times, self.config.gamma)
        level = self.config.saturation**self.config.gamma
        white = level / times.to(radiance)[..., 1].reshape(-1, 1, 1, 1)

        fused, encoded = self._streams(codes, radiance, white)
        saturation = self.saturation(self._saturated(radiance[:, 1], white)).sigmoid()
        merged = self.merge(self._blended(encoded, saturation, fused))
        kept = radiance[:, 1] * (1 - self.reweight(saturation).sigmoid())
        output = kept + merged.sigmoid() if self.config.sigmoid == "merge" else (kept + merged).sigmoid()
        return crop_to(output, size)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """mean |T(H_gt) - T(H_out)| with T(x) = log(1 + mu x) / log(1 + mu), Eq. 15 and 16.

        Args:
            output: H_out of ``forward``, [N, 3, H, W].
            target: H_gt, likewise, in the same unit.

        Raises:
            ValueError: two shapes.
        """
        return losses.mu_law_l1(output, target, self.config.mu)

    @staticmethod
    def prepare(images: Tensor, log_exposures: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of ``forward``: the images, and times [1 or N, 3] relative to the shortest, at least float32.

        Args:
            images: float codes [N, 3, 3, H, W] in [0, 1], clamped to that, by ascending exposure.
            log_exposures: natural logarithms of seconds, [3] or [N, 3], ascending.

        Raises:
            ValueError: another shape, or exposures that do not ascend. TypeError: images that are not floating point.
        """
        check_images(APNTFusion.name, images, APNTFusion.frames)
        codes = at_least_float32(images).clamp(0, 1)
        return codes, exposure_ratios(APNTFusion.name, log_exposures, codes, reference=0).flatten(1)

    @staticmethod
    def encode_target(radiance: Tensor, log_exposures: Tensor) -> Tensor:
        """The target of :meth:`loss` for radiance [N, 3, H, W] relative to the middle exposure; clamped to [0, 1]."""
        return (radiance / middle_over_shortest(APNTFusion.name, radiance, log_exposures)).clamp(0, 1)

    @staticmethod
    def decode(output: Tensor, log_exposures: Tensor) -> Tensor:
        """Radiance [N, 3, H, W] relative to the middle exposure from H_out, which is clamped to [0, 1] first."""
        return output.clamp(0, 1) * middle_over_shortest(APNTFusion.name, output, log_exposures)

    def example_inputs(self, height: int, width: int, part: str = "") -> tuple[Any, ...]:
        if not part:
            return torch.rand(1, 3, 3, height, width), torch.tensor([1.0, 4.0, 16.0])
        channels = {
            "extract": self.extract.in_channels,
            "saturation": 1,
            "encoder": self.config.channels,
            "merge": 6 * self.config.channels,
            "matching.vgg": 3,
        }
        if part not in channels:
            raise ValueError(f"{self.name}: part must be one of {', '.join(channels)}, got {part!r}")
        return (torch.rand(1, channels[part], height, width),)

    def _predict(self, images: Tensor, log_exposures: Tensor) -> Tensor:
        return self.decode(self(*self.prepare(images, log_exposures)), log_exposures)

    def _check_times(self, images: Tensor, times: Tensor) -> None:
        if not times.is_floating_point():
            raise TypeError(f"{self.name}: times must be floating point, got {times.dtype}")
        if times.shape not in ((self.frames,), (1, self.frames), (images.shape[0], self.frames)):
            raise ValueError(
                f"{self.name}: times must be [{self.frames}] or [{images.shape[0]}, {self.frames}] exposure times, got "
                f"shape {list(times.shape)} (images shape {list(images.shape)})"
            )

    def _streams(self, codes: Tensor, radiance: Tensor, white: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The two streams: F_mef, Eq. 4, and F_swp, fine to coarse; without transfer Phi(F_m) instead."""
        seen = radiance if self.config.inputs == "radiance" else torch.cat((codes.to(radiance), radiance), 2)
        frames = seen.to(self.extract.weight.dtype).unbind(1)
        short, middle, long = (F.leaky_relu(self.extract(frame), _SLOPE) for frame in frames)
        motion_short, motion_long = _logits(self.motion_short, short, middle), _logits(self.motion_long, long, middle)
        fused = torch.cat((middle, _gated(short, motion_short), _gated(long, motion_long)), 1)
        if self.matching is None:
            return fused, self.encoder(middle)
        clues = self._clues(radiance[:, 0], white, short, motion_short)
        return fused, self._transfer(radiance, white, clues, middle)

    def _saturated(self, radiance: Tensor, white: Tensor) -> Tensor:
        """The mask [N, 1, H, W] of pixels that the middle exposure clips in at least one channel, as 0 and 1."""
        return (radiance >= white).any(1, keepdim=True).to(self.extract.weight.dtype)

    def _clues(self, short_radiance: Tensor, white: Tensor, short: Tensor, motion: Tensor | None) -> Tensor:
        """F_nft, Eq. 9."""
        net = self.saturation_short or self.saturation
        logits = net(self._saturated(short_radiance, white))
        clues: Tensor = short * (logits + (1.0 if motion is None else motion)).sigmoid()
        return clues

    def _transfer(self, radiance: Tensor, white: Tensor, clues: Tensor, middle: Tensor) -> list[Tensor]:
        """F_swp, fine to coarse: patches of Phi(F_nft) where they belong in the middle exposure."""
        assert self.matching is not None
        config = self.config
        sources = self.encoder(clues)
        targets = self.encoder(middle) if config.swap_mask or config.matching == "encoder" else []
        if config.matching == "encoder":
            found = self.matching.match([x.detach() for x in targets], [x.detach() for x in sources])
        else:
            found = self.matching(radiance[:, 0], radiance[:, 1], white)
        swapped = [
            hdrops.patch_swap(source, index, patch_size=config.patch_size)
            for source, index in zip(sources, found, strict=True)
        ]
        if config.swap_mask:
            mask = self._saturated(radiance[:, 1], white)
            masks = [F.max_pool2d(mask, 2**level) > 0 for level in range(len(swapped))]
            swapped = [torch.where(*choice) for choice in zip(masks, swapped, targets, strict=True)]
        return swapped

    def _blended(self, encoded: Sequence[Tensor], saturation: Tensor, fused: Tensor) -> Tensor:
        """What N_mef sees, Eq. 10 to 13."""
        fine, half, quarter = self.decoder(encoded)
        half, quarter = self.enlarge1(half), self.enlarge2(quarter)
        blended = (
            saturation * quarter,
            _gated(half, _logits(self.scale1, quarter, half)),
            _gated(fine, _logits(self.scale0, half, fine)),
        )
        return torch.cat((*blended, fused), 1)


def _two_convs(inputs: int, hidden: int, outputs: int, last: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    """The form of every attention module: its logits, without the sigmoid."""
    first = nn.Conv2d(inputs, hidden, 3, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(_SLOPE), last(hidden, outputs, 3, padding=1))


def _two_blocks(channels: int, reduction: int) -> nn.Sequential:
    return nn.Sequential(*(ChannelAttentionBlock(channels, reduction) for _ in range(2)))


def _doubling(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)


def _logits(attention: nn.Module | None, first: Tensor, second: Tensor) -> Tensor | None:
    """What an attention module says of two features; None where it is taken out, which stands for a map of ones."""
    return None if attention is None else attention(torch.cat((first, second), 1))


def _gated(features: Tensor, logits: Tensor | None) -> Tensor:
    return features if logits is None else features * logits.sigmoid()


def _coarser(index: Tensor, step: int) -> Tensor:
    """Matches at 1 / step of the resolution: those of the first site of every block."""
    width = index.shape[2]
    first = index[:, ::step, ::step]
    return (first // width // step) * (width // step) + first % width // step
