"""EAPNet: three bracketed photographs merged at low cost by depthwise separable convolutions, without deformable ones.

Yu, Zhang, Ma and Wang, "Efficient Progressive High Dynamic Range Image Restoration via Attention and Alignment
Network", CVPR Workshops 2022 (NTIRE challenge). :class:`EAPNet` tells how it works; :class:`EMA` is its average of
weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hdrops.models._blocks import OutputConv2d
from hdrops.models._system import (
    System,
    at_least_float32,
    check_frames,
    check_images,
    check_options,
    crop_to,
    exposure_ratios,
    pad_to_multiple,
)
from hdrops.models.losses import NTIRE_GAMMA, check_same_shape, ntire_tonemap, ntire_white
from hdrops.models.operations import PaperRow

# The paper's two networks; "standard" is what the configuration's defaults are.
VARIANTS: dict[str, dict[str, object]] = {
    "standard": {"blocks": 4, "align": "half", "upsampling": "transposed"},
    "lightweight": {"blocks": 3, "align": "full", "upsampling": "bilinear"},
}
_SLOPE = 0.1


@dataclass(frozen=True)
class EAPNetConfig:
    """Options of :class:`EAPNet`; the defaults are the paper's standard network.

    Attributes:
        blocks: progressive dilated U-shape blocks (PDUB) in the restoration.
        align: resolution of the alignment, "full" or "half" of its features'; "none" for no alignment.
        upsampling: in a PDUB, "bilinear" or "transposed".
        shared: one encoder for all frames and one attention and alignment for both outer ones, as in AHDRNet.
        channels: of encoder, attention and alignment.
        restoration_channels: of the restoration.
        growth: channels that each layer of a PDUB's dense block adds.
        dense_layers: of a PDUB's dense block.
        mu: of the loss's tone mapping.
        tanh_weight: of the loss's first part.
        mu_weight: of the loss's second part.
        l1_weight: of the plain mean absolute difference, with which the paper compares its loss.
    """

    blocks: int = 4
    align: str = "half"
    upsampling: str = "transposed"
    shared: bool = False
    channels: int = 32
    restoration_channels: int = 80
    growth: int = 32
    dense_layers: int = 6
    mu: float = 5000.0
    tanh_weight: float = 1.0
    mu_weight: float = 1.0
    l1_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("align", ("full", "half", "none")), ("upsampling", ("bilinear", "transposed"))):
            if getattr(self, name) not in known:
                raise ValueError(f"eapnet: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        least = dict.fromkeys(("blocks", "dense_layers", "tanh_weight", "mu_weight", "l1_weight"), 0)
        counts = dict.fromkeys(("channels", "restoration_channels", "growth"), 1)
        check_options("eapnet", self, least={**least, **counts}, above={"mu": 0})


class SeparableConv2d(nn.Sequential):
    """Depthwise 3x3 and pointwise 1x1 convolution, both with bias."""

    def __init__(self, inputs: int, outputs: int, dilation: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, padding=dilation, dilation=dilation, groups=inputs),
            nn.Conv2d(inputs, outputs, 1),
        )


def _activated(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(SeparableConv2d(inputs, outputs, dilation), nn.LeakyReLU(_SLOPE))


def _resize(image: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(image, size=like.shape[2:], mode="bilinear", align_corners=False)


class Encoder(nn.Module):
    """Multi-scale encoder: a frame [N, 6, H, W] -> features [N, C, H, W] and [N, C, H/2, W/2] (equations 3 and 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(6, channels, 3, padding=1), nn.LeakyReLU(_SLOPE))
        self.high = _activated(channels, channels)
        self.low = nn.Sequential(*(_activated(channels, channels) for _ in range(3)))

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        high = self.high(self.entry(frame))
        return high, self.low(F.avg_pool2d(high, 2))


class Attention(nn.Module):
    """How much of a frame's feature to take at each place beside the reference's: [N, C, H, W] both -> in (0, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_activated(2 * channels, channels), SeparableConv2d(channels, channels))

    def forward(self, frame: Tensor, reference: Tensor) -> Tensor:
        weight: Tensor = self.body(torch.cat((frame, reference), 1)).sigmoid()
        return weight


class Alignment(nn.Module):
    """Feature alignment by a predicted scale and bias, scale * F_i + bias (Young et al.): [N, C, H, W] both -> one.

    Where it ``halves`` the resolution, the features are averaged 2x2 before and the result is enlarged.
    """

    def __init__(self, channels: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.body = nn.Sequential(_activated(2 * channels, channels), SeparableConv2d(channels, 2 * channels))

    def forward(self, frame: Tensor, reference: Tensor) -> Tensor:
        full = frame
        if self.halves:
            frame, reference = F.avg_pool2d(frame, 2), F.avg_pool2d(reference, 2)
        scale, bias = self.body(torch.cat((frame, reference), 1)).chunk(2, 1)
        aligned = scale * frame + bias
        return _resize(aligned, full) if self.halves else aligned


class Guide(nn.Module):
    """A frame's feature aligned with the reference's and weighed by attention, at one of the encoder's scales."""

    def __init__(self, config: EAPNetConfig) -> None:
        super().__init__()
        self.attention = Attention(config.channels)
        self.align = None if config.align == "none" else Alignment(config.channels, config.align == "half")

    def forward(self, frame: Tensor, reference: Tensor) -> Tensor:
        aligned = frame if self.align is None else self.align(frame, reference)
        guided: Tensor = self.attention(frame, reference) * aligned
        return guided


class DenseBlock(nn.Module):
    """Dilated residual dense block of separable convolutions: each layer adds channels, a 1x1 one brings them back."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(SeparableConv2d(channels + index * growth, growth, 1 + index % 3), nn.ReLU())
            for index in range(layers)
        )
        self.join = nn.Conv2d(channels + layers * growth, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        residual: Tensor = self.join(x)
        return input + residual


class PDUB(nn.Module):
    """Progressive dilated U-shape block: [N, C, H, W] -> the same; most of it at half of H and W, ever more dilated."""

    def __init__(self, config: EAPNetConfig) -> None:
        super().__init__()
        channels = config.restoration_channels
        self.entry = _activated(channels, channels)
        self.dilated = nn.Sequential(*(_activated(channels, channels, dilation) for dilation in (1, 2, 3)))
        self.dense = DenseBlock(channels, config.growth, config.dense_layers)
        transposed = config.upsampling == "transposed"
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2) if transposed else None
        self.exit = SeparableConv2d(channels, channels)

    def forward(self, input: Tensor) -> Tensor:
        x = self.entry(input)
        below = self.dense(self.dilated(F.avg_pool2d(x, 2)))
        restored: Tensor = self.exit(x + (_resize(below, x) if self.up is None else self.up(below)))
        return input + restored


class EAPNet(System):
    """EAPNet, by Yu, Zhang, Ma and Wang (2022); its options are :class:`EAPNetConfig`.

    ::

        X_1, X_2, X_3  frames short, medium (the reference), long: each photograph beside itself at the medium exposure
        encoders       of each frame a feature at full and one at half resolution
        guides         of each outer frame and resolution: attention * (scale * feature + bias), both predicted from
                       the feature beside the reference's
        fuse           all six features, at half resolution
        PDUB, 4 or 3   half resolution, with a quarter inside
        tail           enlarged, joined with the reference's full feature, a convolution, ReLU

    ``hdrops.models.create("eapnet")`` is the standard network, ``variant="lightweight"`` the other; both are sets of
    options (``VARIANTS``) that single options overrule.

    Shapes:
        ``forward``: short, medium, long, each [N, 6, H, W] from :meth:`prepare`, any H and W -> [N, 3, H, W], at least
        0, gamma-encoded (linear is its 2.24th power), 1 being white of the medium exposure. Padding by reflection to
        multiples of 4 is inside: 1060x1900, which the paper pads to 1080x1920, needs none.

    ``predict`` linearises. Frames are converted to the weights' type; images are float32 under autocast. Channels-last
    frames and weights stay so.

    Training, as the paper has it: :meth:`loss`; crops of 256 with half overlap, batches of 32; Adam, 8e-4 after 1,000
    steps of linear warm-up, times 0.75 every 100,000 steps; :class:`EMA`.

    The state dict has ``encoders.I`` (0 short, 1 medium, 2 long) with ``entry, high, low``; ``guides_high.J`` and
    ``guides_low.J`` (0 short, 1 long) with ``attention`` and ``align``; ``fuse``; ``blocks.B`` with ``entry, dilated,
    dense, up, exit``; ``post``, ``tail``, ``head``. With ``shared`` there is I = J = 0 alone.

    What the text leaves open, and what was chosen. The text at hand has no diagram of its modules, no channels and no
    formula of the loss. Widths and layers are such that the tables' operations are met within 1 % and parameters
    within 2.5 %; other choices meet them as well, so take inner widths for a reading, not for the authors' own.
    Attention follows AHDRNet, the encodings and the tone-mapped loss the challenge's rules, tanh L1 HDRUNet. "Half" is
    the alignment's resolution only, as the section on the implementation says; halving the attention too, as the
    caption of Table 1 says, would cost a tenth less than the table's figure. The tables' operations count a transposed
    convolution on its output's grid, four times what it takes. Weights of the loss's parts are 1 each. The last bias
    starts at 0.5, because a channel that starts below 0 everywhere would have no gradient through ReLU.

    Example:
        >>> import torch, hdrops.models
        >>> model = hdrops.models.create("eapnet", variant="lightweight").eval()
        >>> with torch.no_grad():
        ...     model.predict(torch.rand(1, 3, 3, 30, 40), [0.0, 1.4, 2.8]).shape
        torch.Size([1, 3, 30, 40])
    """

    MULTIPLE: ClassVar[int] = 4

    name: ClassVar[str] = "eapnet"
    frames: ClassVar[int] = 3
    Config: ClassVar[type] = EAPNetConfig
    paper_rows: ClassVar[Sequence[PaperRow]] = tuple(
        PaperRow(label, "torchinfo", (1060, 1900), kilo and kilo / 1000, giga, {"variant": variant, **options})
        for label, variant, options, kilo, giga in (
            ("Table 1, 3", "lightweight", {"align": "none", "shared": True}, None, 121.03),
            ("Table 1, 4", "lightweight", {"shared": True}, None, 146.28),
            ("Table 1, 5", "lightweight", {"align": "none"}, None, 121.03),
            ("Table 1, 6; Table 5, lightweight", "lightweight", {}, 393.73, 146.28),
            ("Table 1, 7", "lightweight", {"align": "half"}, None, 126.43),
            ("Table 1, 8; Table 4, standard", "standard", {}, 576.23, 198.38),
            ("Table 2, 2 PDUBs", "lightweight", {"blocks": 2}, None, 128.25),
            ("Table 2, 4 PDUBs", "lightweight", {"blocks": 4}, None, 164.31),
            ("Table 2, 5 PDUBs", "lightweight", {"blocks": 5}, None, 182.34),
        )
    )
    config: EAPNetConfig

    def __init__(self, config: EAPNetConfig | None = None) -> None:
        config = config or EAPNetConfig()
        super().__init__(config)
        channels, wide = config.channels, config.restoration_channels
        self.encoders = nn.ModuleList(Encoder(channels) for _ in range(1 if config.shared else 3))
        outer = range(1 if config.shared else 2)
        self.guides_high = nn.ModuleList(Guide(config) for _ in outer)
        self.guides_low = nn.ModuleList(Guide(config) for _ in outer)
        self.fuse = SeparableConv2d(6 * channels, wide)
        self.blocks = nn.Sequential(*(PDUB(config) for _ in range(config.blocks)))
        self.post = SeparableConv2d(wide, wide)
        self.tail = SeparableConv2d(wide, channels)
        self.head = OutputConv2d(channels, 3, 3, padding=1)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, 0.5)

    @classmethod
    def options(cls) -> list[str]:
        return ["variant", *super().options()]

    @classmethod
    def build(cls, **config: object) -> System:
        """The system with ``config`` in place of the options of ``variant``, "standard" or "lightweight".

        Raises:
            ValueError: an option it does not have, or a value it does not take.
            TypeError: a value of another type than the option's default.
        """
        variant = config.pop("variant", "standard")
        if not isinstance(variant, str) or variant not in VARIANTS:
            raise ValueError(f"eapnet: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        return super().build(**{**VARIANTS[variant], **config})

    def forward(self, short: Tensor, medium: Tensor, long: Tensor) -> Tensor:
        check_frames(self.name, (short, medium, long), 6)
        size = (short.shape[2], short.shape[3])
        frames = [
            pad_to_multiple(frame.to(self.head.weight.dtype), self.MULTIPLE)[0] for frame in (short, medium, long)
        ]
        features = [self.encoders[index % len(self.encoders)](frame) for index, frame in enumerate(frames)]
        high, low = (
            self._guided(guides, [feature[scale] for feature in features])
            for scale, guides in enumerate((self.guides_high, self.guides_low))
        )
        restored = self.post(self.blocks(self.fuse(torch.cat((F.avg_pool2d(high, 2), low), 1))))
        reference = features[1][0]
        restored = F.leaky_relu(self.tail(_resize(restored, reference)) + reference, _SLOPE)
        return crop_to(self.head(restored).relu(), size)

    @staticmethod
    def _guided(guides: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
        """The reference's feature, the short frame's and the long one's: [N, 3C, H, W]."""
        short, reference, long = features
        return torch.cat((reference, guides[0](short, reference), guides[-1](long, reference)), 1)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""The sum of two mean absolute differences, of tanh and of tone-mapped images.

        .. math::
            L = \overline{|tanh(\hat H) - tanh(H)|} + \overline{|U(\hat H) - U(H)|}, \quad
            U(x) = log(1 + \mu \, tanh(x^{2.24} / w)) / log(1 + \mu)

        with w the 99th percentile of each target's linear values (:func:`hdrops.models.losses.ntire_white`). The paper
        compares it with its parts and with plain L1: options ``tanh_weight``, ``mu_weight``, ``l1_weight``.

        Args:
            outputs: what ``forward`` gave.
            target: H [N, 3, H, W], gamma-encoded as the output is, from :meth:`encode_target`.

        Returns:
            A scalar.

        Raises:
            ValueError: the shapes differ.
        """
        check_same_shape("eapnet", outputs, target)
        config, white = self.config, ntire_white(target)
        by_tanh = F.l1_loss(outputs.tanh(), target.tanh())
        by_mu = F.l1_loss(ntire_tonemap(outputs, white, config.mu), ntire_tonemap(target, white, config.mu))
        loss = config.tanh_weight * by_tanh + config.mu_weight * by_mu
        return loss + config.l1_weight * F.l1_loss(outputs, target) if config.l1_weight else loss

    @staticmethod
    def prepare(images: Tensor, log_exposures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The frames X_i that ``forward`` takes (equation 2): the photograph beside itself at the medium exposure.

        That is f(I_i) = (I_i^2.24 t_2 / t_i)^(1/2.24) = I_i (t_2 / t_i)^(1/2.24), gamma-encoded like the photograph.

        Args:
            images: float codes [N, 3, 3, H, W] in [0, 1], clamped to that, by ascending exposure.
            log_exposures: natural logarithms of seconds, [3] or [N, 3], ascending.

        Returns:
            Three [N, 6, H, W], at least float32: RGB code, then the RGB code it would have at the medium exposure,
            without an upper end.

        Raises:
            ValueError: another shape, or exposures that do not ascend. TypeError: images that are not floating point.
        """
        check_images(EAPNet.name, images, EAPNet.frames)
        codes = at_least_float32(images).clamp(0, 1)
        aligned = codes * exposure_ratios(EAPNet.name, log_exposures, codes, reference=1).pow(-1 / NTIRE_GAMMA)
        short, medium, long = torch.cat((codes, aligned), 2).unbind(1)
        return short, medium, long

    @staticmethod
    def encode_target(radiance: Tensor, log_exposures: Tensor | None = None) -> Tensor:
        """The target of :meth:`loss` for radiance [N, 3, H, W] relative to the middle exposure: its 2.24th root."""
        return radiance.clamp_min(0).pow(1 / NTIRE_GAMMA)

    @staticmethod
    def decode(outputs: Tensor, log_exposures: Tensor | None = None) -> Tensor:
        """Radiance [N, 3, H, W] relative to the middle exposure from what ``forward`` gave."""
        return outputs.pow(NTIRE_GAMMA)

    def example_inputs(self, height: int, width: int, part: str = "") -> tuple[Tensor, ...]:
        """Arguments for one image; of a part of ``blocks`` the feature that it takes."""
        if part.split(".")[0] == "blocks":
            # Of the image as forward pads it.
            half = (-(-length // self.MULTIPLE) * self.MULTIPLE // 2 for length in (height, width))
            return (torch.rand(1, self.config.restoration_channels, *half),)
        if part:
            raise ValueError(f"eapnet: complexity is told of the whole network or its blocks, not of {part!r}")
        return tuple(torch.rand(1, 6, height, width) for _ in range(3))

    def _predict(self, images: Tensor, log_exposures: Tensor) -> Tensor:
        return self.decode(self(*self.prepare(images, log_exposures)))


class EMA(AveragedModel):
    """The paper's temporal ensemble: every 5,000 steps the averaged weights take the mean of their own and the model's.

    ``ema.module`` is the averaged model, and is called by ``ema(...)``. At the first of these steps it becomes the
    model; before, it is the model as it was when the average was made. Training goes on from its state dict;
    ``hdrops predict`` takes that of ``ema.module``.

    Args:
        model: what is trained; a copy of it is kept.
        decay: share that stays of the average.
        interval: steps between two updates.

    Raises:
        ValueError: a decay outside of [0, 1], or an interval below 1.

    Example:
        >>> import torch
        >>> from hdrops.models.eapnet import EMA
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = EMA(model, interval=2)
        >>> for step in range(1, 5):
        ...     _ = torch.nn.init.constant_(model.weight, step)
        ...     ema.after_step(model, step)
        >>> ema.module.weight.item()  # step 2 gives 2, step 4 the mean of 2 and 4
        3.0
    """

    def __init__(self, model: nn.Module, decay: float = 0.5, interval: int = 5000) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"EMA: interval must be an integer of at least 1, got {interval!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA: decay must lie in [0, 1], got {decay}")
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.interval = interval

    def after_step(self, model: nn.Module, step: int) -> None:
        """To be called after optimiser step number ``step``, the first being 1; updates every ``interval`` steps."""
        if step % self.interval == 0:
            self.update_parameters(model)
