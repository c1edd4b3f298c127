"""STHDR: three bracketed photographs with motion, aligned in feature space and merged in two stages at three scales.

Li, Yao, Xie and Wang, "Scale-aware Two-stage High Dynamic Range Imaging", 2022. :class:`STHDR` tells how it works.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrops.models._blocks import OutputConv2d
from hdrops.models._system import (
    System,
    at_least_float32,
    check_frames,
    check_images,
    check_options,
    crop_to,
    exposure_ratios,
    middle_over_shortest,
    pad_to_multiple,
)
from hdrops.models.losses import mu_law_l1
from hdrops.models.operations import PaperRow
from hdrops.nn import DeformConv2d, GlobalContextBlock, ModulatedDeformConv2d

GAMMA = 2.2
VARIANTS = ("hss", "ss", "ms", "scm_ss", "scm_ms")


@dataclass(frozen=True)
class STHDRConfig:
    """Options of :class:`STHDR`; the defaults are the paper's complete network.

    Attributes:
        variant: the paper's ablation. "hss": one U-Net, one scale. "ss": two stages. "ms": two stages at several
            scales. "scm_ss": two stages after alignment. "scm_ms": all of it.
        scales: of "ms" and "scm_ms"; each halves the size. The others have one.
        channels: of every feature at a scale's full size, a multiple of 2.
        stem_channels: between the two convolutions that each frame enters by.
        depth: levels of a U-Net; each doubles the channels and halves the size.
        slope: of leaky ReLU.
        context_ratio: of the global-context block's bottleneck.
        offset_groups: groups of channels with deformations of their own.
        mu: of the loss's tone mapping.
        scale_weights: lambda of the loss, finest scale first; at least as many as there are scales.
        first_stage_weight: of a loss of the first stage's images, which the paper does not have.
    """

    variant: str = "scm_ms"
    scales: int = 3
    channels: int = 32
    stem_channels: int = 16
    depth: int = 3
    slope: float = 0.2
    context_ratio: float = 1.0
    offset_groups: int = 1
    mu: float = 5000.0
    scale_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    first_stage_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"sthdr: variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        counts = dict.fromkeys(("scales", "channels", "stem_channels", "depth", "offset_groups"), 1)
        least = {**counts, "slope": 0, "scale_weights": 0, "first_stage_weight": 0}
        check_options("sthdr", self, least=least, above={"context_ratio": 0, "mu": 0})
        if self.channels % 2:
            raise ValueError(f"sthdr: channels must be even, for half of them are normalised, got {self.channels}")
        if self.channels % self.offset_groups:
            raise ValueError(
                f"sthdr: channels must be a multiple of offset_groups = {self.offset_groups}, got {self.channels}"
            )
        if len(self.scale_weights) < self.levels:
            raise ValueError(f"sthdr: scale_weights must be at least {self.levels}, got {len(self.scale_weights)}")

    @property
    def levels(self) -> int:
        """Scales that the variant has."""
        return self.scales if self.variant in ("ms", "scm_ms") else 1

    @property
    def aligns(self) -> bool:
        """Whether the variant has spatial correct modules."""
        return self.variant in ("scm_ss", "scm_ms")

    @property
    def stages(self) -> int:
        """U-Nets of the Merge Net."""
        return 1 if self.variant == "hss" else 2


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class GuidedDeformConv2d(ModulatedDeformConv2d):
    """DCNv2, 3x3 without bias, that predicts offsets and mask from its input beside a guide: [N, C, H, W] both."""

    def __init__(self, channels: int, offset_groups: int) -> None:
        super().__init__(channels, channels, 3, padding=1, offset_groups=offset_groups, bias=False)
        self.conv_offset = _conv(2 * channels, self.conv_offset.out_channels)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor, guide: Tensor) -> Tensor:  # type: ignore[override]
        offset, mask = self.predict(torch.cat((input, guide), 1))
        return DeformConv2d.forward(self, input, offset, mask)


class SpatialCorrectModule(nn.Module):
    """SCM: what a frame can add to the reference, moved to where it belongs, on top of the reference.

    Which channels are of use follows from the global context of both; the useful ones are joined with the reference,
    sampled by a deformable convolution, and added. [N, C, H, W] both -> the same.
    """

    def __init__(self, config: STHDRConfig) -> None:
        super().__init__()
        channels = config.channels
        self.entry = _conv(channels, channels)
        self.join = _conv(2 * channels, channels, 1)
        self.context = GlobalContextBlock(channels, config.context_ratio)
        self.compress = _conv(2 * channels, channels)
        self.deform = GuidedDeformConv2d(channels, config.offset_groups)
        self.exit = _conv(channels, channels)
        self.activate = nn.LeakyReLU(config.slope)

    def forward(self, frame: Tensor, reference: Tensor) -> Tensor:
        found, template = self.activate(self.entry(frame)), self.activate(self.entry(reference))
        importance = self.context(self.activate(self.join(torch.cat((found, template), 1))))
        useful = self.activate(self.compress(torch.cat((template, found * importance), 1)))
        aligned: Tensor = self.activate(self.exit(self.deform(useful, template))) + reference
        return aligned


class AlignNet(nn.Module):
    """Three frames [N, 6, H, W] -> one feature Z [N, C, H, W]; without SCMs the frames' features are joined as is."""

    def __init__(self, config: STHDRConfig) -> None:
        super().__init__()
        channels, activate = config.channels, nn.LeakyReLU(config.slope)
        self.stems = nn.ModuleList(
            nn.Sequential(_conv(6, config.stem_channels), activate, _conv(config.stem_channels, channels), activate)
            for _ in range(3)
        )
        self.scms = nn.ModuleList(SpatialCorrectModule(config) for _ in range(2 if config.aligns else 0))
        self.fusion = nn.Sequential(_conv(3 * channels, channels), activate, _conv(channels, channels), activate)

    def forward(self, frames: Sequence[Tensor]) -> Tensor:
        short, reference, long = (stem(frame) for stem, frame in zip(self.stems, frames, strict=True))
        if self.scms:
            short, long = self.scms[0](short, reference), self.scms[1](long, reference)
        fused: Tensor = self.fusion(torch.cat((short, reference, long), 1))
        return fused


class HINBlock(nn.Module):
    """HINet's block: two convolutions beside a 1x1 one; of the first's channels one half is instance-normalised.

    Args:
        normalise: the encoder's blocks do, the decoder's do not.
        fuses: adds convolutions of another U-Net's two features of this size (HINet's cross-stage feature fusion).
    """

    def __init__(self, inputs: int, outputs: int, slope: float, normalise: bool, fuses: bool = False) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs)
        self.norm = nn.InstanceNorm2d(outputs // 2, affine=True) if normalise else None
        self.second = _conv(outputs, outputs)
        self.identity = _conv(inputs, outputs, 1)
        self.activate = nn.LeakyReLU(slope)
        self.fuse_encoder = _conv(outputs, outputs) if fuses else None
        self.fuse_decoder = _conv(outputs, outputs) if fuses else None

    def forward(self, input: Tensor, encoder: Tensor | None = None, decoder: Tensor | None = None) -> Tensor:
        x = self.first(input)
        if self.norm is not None:
            half, rest = x.chunk(2, 1)
            x = torch.cat((self.norm(half), rest), 1)
        x = self.activate(self.second(self.activate(x))) + self.identity(input)
        if self.fuse_encoder is not None and self.fuse_decoder is not None:
            x = x + self.fuse_encoder(encoder) + self.fuse_decoder(decoder)
        output: Tensor = x
        return output


class UNetFeatures(NamedTuple):
    """A U-Net's features above its bottleneck, finest first: level l is [N, C*2^l, H/2^l, W/2^l]."""

    encoder: list[Tensor]
    decoder: list[Tensor]


class HINUNet(nn.Module):
    """HINet's U-Net, [N, C, H, W] with H and W multiples of 2^(depth-1) -> its features.

    Down by convolutions 4x4 of stride 2 without bias, up by transposed ones 2x2; skips pass a convolution 3x3.
    """

    def __init__(self, config: STHDRConfig, fuses: bool) -> None:
        super().__init__()
        widths = [config.channels << level for level in range(config.depth)]
        inputs = [config.channels, *widths]
        above = range(config.depth - 1)
        self.encoder = nn.ModuleList(
            HINBlock(inputs[level], width, config.slope, normalise=True, fuses=fuses and level in above)
            for level, width in enumerate(widths)
        )
        self.down = nn.ModuleList(
            nn.Conv2d(widths[level], widths[level], 4, stride=2, padding=1, bias=False) for level in above
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[level + 1], widths[level], 2, stride=2) for level in above)
        self.skip = nn.ModuleList(_conv(widths[level], widths[level]) for level in above)
        self.decoder = nn.ModuleList(
            HINBlock(2 * widths[level], widths[level], config.slope, normalise=False) for level in above
        )

    def forward(self, x: Tensor, other: UNetFeatures | None = None) -> UNetFeatures:
        """The features of ``x``; a U-Net that fuses takes those of the stage before as ``other``."""
        encoded: list[Tensor] = []
        for level, down in enumerate(self.down):
            fused = () if other is None else (other.encoder[level], other.decoder[level])
            encoded.append(self.encoder[level](x, *fused))
            x = down(encoded[level])
        x = self.encoder[-1](x)
        decoded: list[Tensor] = []
        for level in reversed(range(len(self.up))):
            x = torch.cat((self.up[level](x), self.skip[level](encoded[level])), 1)
            x = self.decoder[level](x)
            decoded.insert(0, x)
        return UNetFeatures(encoded, decoded or [x])


class SupervisedAttention(nn.Module):
    """MPRNet's supervised attention module: an image from a feature, and the feature attended by that image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.feature = _conv(channels, channels)
        self.image = _conv(channels, 3)
        self.attention = _conv(3, channels)

    def forward(self, feature: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """The attended feature [N, C, H, W] and the image [N, 3, H, W], a correction of ``base``."""
        image = self.image(feature) + base
        return self.feature(feature) * self.attention(image).sigmoid() + feature, image


class Merged(NamedTuple):
    """What the Merge Net makes of a scale: radiance, the feature it is read from, and the first stage's image."""

    image: Tensor
    feature: Tensor
    first: Tensor | None


class MergeNet(nn.Module):
    """One U-Net or two of them, the second on what the first's image attends to beside Z."""

    def __init__(self, config: STHDRConfig) -> None:
        super().__init__()
        channels, two = config.channels, config.stages == 2
        self.stage1 = HINUNet(config, fuses=False)
        self.sam = SupervisedAttention(channels) if two else None
        self.entry = nn.Sequential(_conv(2 * channels, channels, 1), _conv(channels, channels)) if two else None
        self.stage2 = HINUNet(config, fuses=True) if two else None
        self.head = OutputConv2d(channels, 3, 3, padding=1)

    def forward(self, aligned: Tensor, base: Tensor) -> Merged:
        """Merges Z [N, C, H, W]; ``base`` [N, 3, H, W] is the reference's radiance."""
        features, first = self.stage1(aligned), None
        if self.sam is not None and self.entry is not None and self.stage2 is not None:
            attended, first = self.sam(features.decoder[0], base)
            features = self.stage2(self.entry(torch.cat((attended, aligned), 1)), features)
        return Merged(self.head(features.decoder[0]).sigmoid(), features.decoder[0], first)


class STHDROutput(NamedTuple):
    """What :class:`STHDR` gives, finest scale first: [N, 3, H, W], then half the size rounded up, and so on.

    Attributes:
        images: radiance in [0, 1], 1 being white of the shortest exposure.
        first: the first stage's images in the same unit, not bounded; empty for "hss".
    """

    images: tuple[Tensor, ...]
    first: tuple[Tensor, ...]


class STHDR(System):
    """STHDR, by Li, Yao, Xie and Wang (2022); its options are :class:`STHDRConfig`.

    ::

        X_1, X_2, X_3  frames short, medium (the reference), long, each the photograph beside its radiance (eq. 1, 2)
        stems          F_i, a feature of each frame, weights of its own
        SCM, two       AF_i = F_2 + what F_i adds: global context chooses channels, a deformable convolution places them
        fusion         Z of (AF_1, F_2, AF_3)
        U-Net, SAM     first stage: an image, and the feature it attends to
        U-Net          second stage of (that feature, Z), with the first's features added in its encoder
        head           radiance

    at three scales of the frames, coarsest first, by the same weights; each finer scale's Z is joined with the coarser
    radiance, enlarged (in "ms" with the coarser feature, by weights of each scale its own).

    Shapes:
        ``forward``: short, medium, long, each [N, 6, H, W] from :meth:`prepare`, any H and W of which one is above
        2^(depth - 1 + scales - 1) = 16 -> :class:`STHDROutput`. Padding by reflection to multiples of 16 is inside.

    Radiance is relative to white of the shortest exposure inside (the paper keeps it in [0, 1]); ``predict`` gives it
    relative to the middle exposure. Frames are converted to the weights' type; images are float32 under autocast.
    Channels-last frames and weights stay so.

    Training, as the paper has it: :meth:`loss`; Adam with betas 0.9 and 0.999, cosine from 1e-4 to 1e-6; crops of 256,
    batches of 16, flips and rotations; then 2,000 epochs with crops of 384 and batches of 8.

    The state dict has ``align.stems.I`` (I = 0 short, 1 medium, 2 long), ``align.scms.J`` (0 short, 1 long) with
    ``entry, join, context, compress, deform, exit``; ``align.fusion``; ``merge.stageS`` with ``encoder.L, down.L, up.L,
    skip.L, decoder.L`` (L = 0 finest), ``merge.sam``, ``merge.entry``, ``merge.head``; ``handover.K`` (K the finer
    scale; one for all with SCMs). The modules of hdrops.nn have mmcv's names within theirs.

    What the text leaves open, and what was chosen. The U-Nets are HINet's with 32, 64 and 128 channels: 32 everywhere,
    as the text says, has neither the parameters nor the operations of Table 4, these have both. Stems, kernels of SCM
    and of fusion, and the form of the hand-over are such that Table 4 is met within 0.3 % (operations of the complete
    network: 1.8 %) and the text is followed. SAM corrects the reference's radiance; the text names no base image.
    "Another Align Net for finer merging" is the second stage: figure and section on the Merge Net say so. Exposures are
    relative to the shortest, for radiance in [0, 1] to hold what the short frame sees. Scales are 2x2 means of frames
    and of the ground truth. The paper says that operations were counted at 512x512; they are those of 256x256, while
    its rows of other methods are of 512x512 (``paper_rows`` says 256).

    Example:
        >>> import torch, hdrops.models
        >>> model = hdrops.models.create("sthdr", variant="ss").eval()
        >>> with torch.no_grad():
        ...     model.predict(torch.rand(1, 3, 3, 30, 40), [0.0, 1.4, 2.8]).shape
        torch.Size([1, 3, 30, 40])
    """

    name: ClassVar[str] = "sthdr"
    frames: ClassVar[int] = 3
    Config: ClassVar[type] = STHDRConfig
    paper_rows: ClassVar[Sequence[PaperRow]] = tuple(
        PaperRow(f"Table 4, {variant.upper()}", "thop", (256, 256), millions, giga, {"variant": variant})
        for variant, millions, giga in (
            ("hss", 0.6793, 13.4207),
            ("ss", 1.4195, 27.2021),
            ("ms", 1.4598, 37.1876),
            ("scm_ss", 1.5514, 36.7321),
            ("scm_ms", 1.5641, 48.1668),
        )
    )
    config: STHDRConfig

    def __init__(self, config: STHDRConfig | None = None) -> None:
        config = config or STHDRConfig()
        super().__init__(config)
        channels = config.channels
        self.align = AlignNet(config)
        self.merge = MergeNet(config)
        finer = config.levels - 1
        if config.aligns:
            # One for all scales: it reads an image, which looks the same at each.
            self.handover = nn.ModuleList(_conv(channels + 3, channels) for _ in range(min(finer, 1)))
        else:
            self.handover = nn.ModuleList(_conv(2 * channels, channels) for _ in range(finer))

    @property
    def multiple(self) -> int:
        """What padding makes heights and widths a multiple of."""
        return 1 << (self.config.depth - 1 + self.config.levels - 1)

    def forward(self, short: Tensor, medium: Tensor, long: Tensor) -> STHDROutput:
        check_frames(self.name, (short, medium, long), 6)
        height, width = short.shape[2:]
        if max(height, width) <= self.multiple:
            raise ValueError(
                f"sthdr: height or width must be above {self.multiple}, for instance norm needs two pixels at the "
                f"coarsest level, got {height}x{width}"
            )
        frames = [frame.to(self.merge.head.weight.dtype) for frame in (short, medium, long)]
        pyramid = [[pad_to_multiple(frame, self.multiple)[0] for frame in frames]]
        for _ in range(self.config.levels - 1):
            pyramid.append([F.avg_pool2d(frame, 2) for frame in pyramid[-1]])
        images: list[Tensor] = []
        first: list[Tensor] = []
        merged: Merged | None = None
        for level in reversed(range(self.config.levels)):
            aligned = self.align(pyramid[level])
            if merged is not None:
                aligned = self._hand_over(level, aligned, merged)
            merged = self.merge(aligned, pyramid[level][1][:, 3:])
            # Sizes are halved rounding up, as loss() halves the ground truth.
            size = (-(-height >> level), -(-width >> level))
            images.insert(0, crop_to(merged.image, size))
            if merged.first is not None:
                first.insert(0, crop_to(merged.first, size))
        return STHDROutput(tuple(images), tuple(first))

    def _hand_over(self, level: int, aligned: Tensor, coarser: Merged) -> Tensor:
        guide = coarser.image if self.config.aligns else coarser.feature
        guide = F.interpolate(guide, scale_factor=2, mode="bilinear", align_corners=False)
        join = self.handover[0 if self.config.aligns else level]
        joined: Tensor = join(torch.cat((aligned, guide.to(aligned.dtype)), 1))
        return joined

    def loss(self, outputs: STHDROutput, target: Tensor) -> Tensor:
        r"""The multi-scale loss of equation 5.

        .. math::
            L = \sum_k \lambda_k \, \overline{|T(\hat H_k) - T(H_k)|}, \quad T(H) = log(1 + \mu H) / log(1 + \mu)

        Args:
            outputs: what ``forward`` gave.
            target: H_1 [N, 3, H, W] in the images' unit, from :meth:`encode_target`; coarser ones are its 2x2 means.

        Returns:
            A scalar. With ``first_stage_weight`` the same sum over the first stage's images is added, so weighted.

        Raises:
            ValueError: the target has another shape than the finest image.
        """
        config, targets = self.config, [target]
        for _ in outputs.images[1:]:
            targets.append(F.avg_pool2d(targets[-1], 2, ceil_mode=True))
        total = target.new_zeros(())
        for stage, images in ((1.0, outputs.images), (config.first_stage_weight, outputs.first)):
            if stage:
                for weight, image, truth in zip(config.scale_weights, images, targets, strict=False):
                    total = total + stage * weight * mu_law_l1(image, truth, config.mu)
        return total

    @staticmethod
    def prepare(images: Tensor, log_exposures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The frames X_i that ``forward`` takes (equations 1 and 2): the photograph beside I_i^2.2 / t_i.

        Args:
            images: float codes [N, 3, 3, H, W] in [0, 1], clamped to that, by ascending exposure.
            log_exposures: natural logarithms of seconds, [3] or [N, 3], ascending.

        Returns:
            Three [N, 6, H, W], at least float32: RGB code, then RGB radiance in [0, 1] relative to white of the
            shortest exposure.

        Raises:
            ValueError: another shape, or exposures that do not ascend. TypeError: images that are not floating point.
        """
        check_images(STHDR.name, images, STHDR.frames)
        codes = at_least_float32(images).clamp(0, 1)
        radiance = codes.pow(GAMMA) / exposure_ratios(STHDR.name, log_exposures, codes, reference=0)
        short, medium, long = torch.cat((codes, radiance), 2).unbind(1)
        return short, medium, long

    @staticmethod
    def encode_target(radiance: Tensor, log_exposures: Tensor) -> Tensor:
        """The target of :meth:`loss` for radiance [N, 3, H, W] relative to the middle exposure; clamped to [0, 1]."""
        return (radiance / middle_over_shortest(STHDR.name, radiance, log_exposures)).clamp(0, 1)

    @staticmethod
    def decode(outputs: STHDROutput, log_exposures: Tensor) -> Tensor:
        """Radiance [N, 3, H, W] relative to the middle exposure from what ``forward`` gave."""
        image = outputs.images[0]
        return image * middle_over_shortest(STHDR.name, image, log_exposures)

    def example_inputs(self, height: int, width: int, part: str = "") -> tuple[Tensor, ...]:
        if part:
            raise ValueError(f"sthdr: complexity is told of the whole network, not of its part {part!r}")
        return tuple(torch.rand(1, 6, height, width) for _ in range(3))

    def _predict(self, images: Tensor, log_exposures: Tensor) -> Tensor:
        return self.decode(self(*self.prepare(images, log_exposures)), log_exposures)
