"""The networks of DuHDR that work on pixels: Dnet, ITnet and OOnet (:mod:`hdrops.models.duhdr` joins them).

They follow TensorFlow 1, for which the published system was written, so that its weights need nothing but their layout
changed (HWIO to OIHW): "SAME" padding, which for a stride of 2 pads bottom and right first; bilinear enlargement whose
pixel 2i is pixel i; depth_to_space, whose input channels run over the place in the block before the channel.

Dnet and OOnet are one U-net with other blocks: a stem at full size, down blocks that halve by average pooling, a
block in the middle, up blocks that double, concatenate the features of their size and convolve.
"""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrops.models.backbones import VGG, imagenet_normalize

# Mean of blue, green and red in [0, 255] that the Caffe release of VGG16 takes out.
_CAFFE_MEAN = (103.939, 116.779, 123.68)
VGG_INPUTS = ("caffe", "torchvision")
# What VGG16 gives the decoder: its features before each pooling, and the last pooling.
_ENCODER = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3", "pool5")


def check_image(op: str, image: Tensor, multiple: int = 1, channels: int = 3) -> None:
    """Raises unless ``image`` is a float [N, channels, H, W] whose H and W are multiples of ``multiple``."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{op}: the image must be a tensor, got {type(image).__name__}")
    if image.dim() != 4 or image.shape[1] != channels:
        raise ValueError(f"{op}: the image must be [N, {channels}, H, W], got shape {list(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"{op}: the image must be floating point, got {image.dtype}")
    if image.shape[2] % multiple or image.shape[3] % multiple or 0 in image.shape[2:]:
        raise ValueError(
            f"{op}: height and width must be positive multiples of {multiple}, got shape {list(image.shape)}"
        )


def pad_same(image: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's SAME padding: ceil(size / stride) outputs, an odd rest at bottom and right."""
    down, across = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in image.shape[-2:])
    return F.pad(image, (across // 2, across - across // 2, down // 2, down - down // 2), value=value)


class SameConv2d(nn.Conv2d):
    """A convolution with SAME padding, which begins as TensorFlow's layers do: Glorot uniform, bias 0."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        padding = dilation * (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if self.stride[0] > 1:
            input = pad_same(input, self.kernel_size[0], self.stride[0])
        return super().forward(input)


def enlarge(features: Tensor) -> Tensor:
    """Twice the size, bilinear as in TensorFlow 1: pixel 2i is pixel i, 2i + 1 the mean of i and i + 1."""
    height, width = features.shape[-2:]
    padded = F.pad(features, (0, 1, 0, 1), mode="replicate")
    size = (2 * height + 1, 2 * width + 1)
    larger = F.interpolate(padded, size=size, mode="bilinear", align_corners=True)
    return larger[..., : 2 * height, : 2 * width]


def depth_to_space(features: Tensor, block: int = 2) -> Tensor:
    """[N, block^2 C, H, W] -> [N, C, block H, block W] in TensorFlow's order: input channel (dy * block + dx) C + c."""
    channels = features.shape[1] // block**2
    torchs_order = features.unflatten(1, (block**2, channels)).transpose(1, 2).flatten(1, 2)
    return F.pixel_shuffle(torchs_order, block)


def _leaky(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(SameConv2d(inputs, outputs, kernel), nn.LeakyReLU(0.1, inplace=True))


def _relu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(SameConv2d(inputs, outputs, kernel, stride, groups=groups), nn.ReLU(inplace=True))


def _down(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Half the size, then two convolutions."""
    return nn.Sequential(nn.AvgPool2d(2), _leaky(inputs, outputs, kernel), _leaky(outputs, outputs, kernel))


class _Up(nn.Module):
    """Twice the size, a convolution, concatenation with the skipped features, a convolution."""

    def __init__(self, inputs: int, skipped: int, outputs: int) -> None:
        super().__init__()
        self.first = _leaky(inputs, outputs, 3)
        self.second = _leaky(outputs + skipped, outputs, 3)

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        found: Tensor = self.second(torch.cat((self.first(enlarge(features)), skipped), 1))
        return found


class _UNet(nn.Module):
    """Features [N, 3, H, W] of an image; ``widths`` are the stem's channels and those of each level below it."""

    def __init__(self, inputs: int, widths: Sequence[int], down: Sequence[nn.Module], middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(_leaky(inputs, widths[0], 7), _leaky(widths[0], widths[0], 7))
        self.down = nn.ModuleList(down)
        self.middle = middle
        # Each level has the width of the encoder's of its size, the features skipped too.
        self.up = nn.ModuleList(_Up(widths[i + 1], widths[i], widths[i]) for i in reversed(range(len(down))))
        self.out = SameConv2d(widths[0], 3, 3)

    def features(self, image: Tensor) -> Tensor:
        levels = [self.stem(image)]
        for block in self.down:
            levels.append(block(levels[-1]))
        features = self.middle(levels.pop())
        for block in self.up:
            features = block(features, levels.pop())
        found: Tensor = self.out(features)
        return found


class Dnet(_UNet):
    """Dequantisation: takes the noise of 8 bits and JPEG out of a photograph (section 3.1).

    A U-net of widths 16, 32, 64, 128, 256 whose output, through tanh, is added to the photograph. The text says six
    levels; this has the five of the published code, whose parameters and operations are those that the paper prints.

    Shapes:
        [N, 3, H, W] in [0, 1], H and W multiples of 16 -> the same.
    """

    MULTIPLE = 16

    def __init__(self) -> None:
        widths, kernels = (16, 32, 64, 128, 256), (5, 3, 3, 3)
        blocks = [_down(widths[i], widths[i + 1], kernel) for i, kernel in enumerate(kernels)]
        super().__init__(3, widths, blocks, nn.Identity())

    def forward(self, image: Tensor) -> Tensor:
        check_image("duhdr: Dnet", image, self.MULTIPLE)
        return (image + self.features(image).tanh()).clamp(0, 1)


def _norm(channels: int) -> nn.BatchNorm2d:
    # RFBNet's momentum is 0.01 as torch counts it. The published code hands 0.01 to TensorFlow, which counts the other
    # way round, so that its averages hold the last batch alone: an oversight that is not repeated here.
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.01)


def _normed(inputs: int, outputs: int, kernel: int, dilation: int = 1, relu: bool = True) -> nn.Sequential:
    layers = [SameConv2d(inputs, outputs, kernel, dilation=dilation, bias=False), _norm(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class ReceptiveFieldBlock(nn.Module):
    """Receptive field block (Liu et al., ECCV 2018): three branches that end in dilations of 1, 2 and 3.

    ReLU(0.1 * fuse(branches) + shortcut); convolutions without bias, each with a batch norm.

    Shapes:
        [N, inputs, H, W] -> [N, outputs, H, W]; inputs at least 16.
    """

    def __init__(self, inputs: int, outputs: int, scale: float = 0.1) -> None:
        super().__init__()
        q = inputs // 8
        self.scale = scale
        self.near = nn.Sequential(_normed(inputs, 2 * q, 1), _normed(2 * q, 2 * q, 3, relu=False))
        self.middle = nn.Sequential(
            _normed(inputs, q, 1), _normed(q, 2 * q, 3), _normed(2 * q, 2 * q, 3, dilation=2, relu=False)
        )
        self.far = nn.Sequential(
            _normed(inputs, q, 1),
            _normed(q, 3 * (q // 2), 3),
            _normed(3 * (q // 2), 2 * q, 3),
            _normed(2 * q, 2 * q, 3, dilation=3, relu=False),
        )
        self.fuse = _normed(6 * q, outputs, 1, relu=False)
        self.shortcut = _normed(inputs, outputs, 1, relu=False)

    def forward(self, features: Tensor) -> Tensor:
        branches = torch.cat((self.near(features), self.middle(features), self.far(features)), 1)
        return F.relu(self.scale * self.fuse(branches) + self.shortcut(features))


class SqueezeExcitation(nn.Module):
    """Channels weighted by a gate from their means (Hu et al., CVPR 2018); dense layers without bias."""

    def __init__(self, channels: int, ratio: int = 2) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // ratio, bias=False)
        self.excite = nn.Linear(channels // ratio, channels, bias=False)
        for layer in (self.squeeze, self.excite):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, features: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(features.mean((2, 3))))).sigmoid()
        weighted: Tensor = features * gate[:, :, None, None]
        return weighted


class _ScaleUnit(nn.Module):
    """Depthwise convolutions of three sizes, added up, gated and mixed, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_relu(channels, channels, k, groups=channels) for k in (3, 5, 7))
        self.gate = SqueezeExcitation(channels)
        self.mix = _relu(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        near, middle, far = (scale(features) for scale in self.scales)
        found: Tensor = self.mix(self.gate(near + middle + far)) + features
        return found


class MultiScaleSE(nn.Module):
    """The MS-SE block: attention over channels at half the size, over features of three scales (Eq. 23).

    Shapes:
        [N, channels, H, W], H and W even -> the same.
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.own = _relu(channels, channels, 5)
        self.reduce = nn.Sequential(_relu(channels, 2 * channels, 5, stride=2), _relu(2 * channels, 2 * channels, 1))
        self.units = nn.Sequential(*(_ScaleUnit(2 * channels) for _ in range(3)))
        self.fuse = _relu(channels + channels // 2, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        attended = depth_to_space(self.units(self.reduce(features)))
        found: Tensor = self.fuse(torch.cat((self.own(features), attended), 1))
        return found


class OOnet(_UNet):
    """Overall optimisation: corrects contrast and colour of the restored image (section 3.4, Eq. 21-23).

    A U-net of widths 16, 32, 64, 128, 128 with MS-SE in the middle: H_oo = ReLU(H_hat + features).

    Args:
        downblock: "rfb", average pooling and a receptive field block, as the text and figure 4 have it; or "conv",
            pooling and two convolutions, with which the parameters and operations that the paper prints come out.
        multi_scale: False leaves MS-SE out, and nothing in its place.

    Shapes:
        H_hat, I_clip and I_n [N, 3, H, W], H and W multiples of 32 -> [N, 3, H, W], at least 0.
    """

    MULTIPLE = 32

    def __init__(self, downblock: str = "rfb", multi_scale: bool = True) -> None:
        if downblock not in ("rfb", "conv"):
            raise ValueError(f"duhdr: downblock must be 'rfb' or 'conv', got {downblock!r}")
        widths, kernels = (16, 32, 64, 128, 128), (5, 3, 3, 3)
        blocks: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            if downblock == "rfb":
                blocks.append(nn.Sequential(nn.AvgPool2d(2), ReceptiveFieldBlock(widths[i], widths[i + 1])))
            else:
                blocks.append(_down(widths[i], widths[i + 1], kernel))
        super().__init__(9, widths, blocks, MultiScaleSE(widths[-1]) if multi_scale else nn.Identity())

    def forward(self, restored: Tensor, clipped: Tensor, nonlinear: Tensor) -> Tensor:
        for image in (restored, clipped, nonlinear):
            check_image("duhdr: OOnet", image, self.MULTIPLE)
        return F.relu(restored + self.features(torch.cat((restored, clipped, nonlinear), 1)))


def vgg_input(image: Tensor, convention: str) -> Tensor:
    """RGB about [0, 1] as VGG16's weights expect it.

    Args:
        image: [N, 3, H, W].
        convention: "caffe", blue, green and red in [0, 255] without their means, as in the published system; or
            "torchvision", see :func:`hdrops.models.backbones.imagenet_normalize`.
    """
    if convention == "torchvision":
        return imagenet_normalize(image)
    colours = zip(reversed(image.unbind(1)), _CAFFE_MEAN, strict=True)
    return torch.stack([255 * colour - mean for colour, mean in colours], 1)


def overexposed(image: Tensor, alpha: float) -> Tensor:
    """The mask of Eq. 15, [N, 1, H, W] in [0, 1]: how far the brightest channel lies above ``alpha``.

    Held below 1, as the published code does: the truncated images that training feeds back may exceed 1.
    """
    return ((image.amax(1, keepdim=True) - alpha) / (1 - alpha)).clamp(0, 1)


class _Fuse(SameConv2d):
    """1x1 convolution of two features side by side that begins as their sum."""

    def __init__(self, channels: int) -> None:
        super().__init__(2 * channels, channels, 1)
        identity = torch.eye(channels).repeat(1, 2)
        self.weight.data.copy_(identity[:, :, None, None])


class _Decode(nn.Module):
    """Twice the size, convolution, ReLU, batch norm, ReLU; then fused with the encoder's features."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolve = _relu(inputs, outputs, 3)
        self.norm = nn.BatchNorm2d(outputs)
        self.fuse = _Fuse(outputs)

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        larger = F.interpolate(features, scale_factor=2.0, mode="nearest")
        found: Tensor = self.fuse(torch.cat((F.relu(self.norm(self.convolve(larger))), skipped), 1))
        return found


class ITnet(nn.Module):
    """Inverse truncation: what lies beyond white, from an auto-encoder with skips (section 3.3, Eq. 15).

    H_hat = I_clip + mask * SAE(I_clip). The encoder is VGG16, trained along; at 1/32 a convolution and a batch norm;
    five steps up, each fused with VGG's features of its size (divided by 255 under the "caffe" convention) by a 1x1
    convolution that begins as their sum; 1x1 to 3 channels, batch norm, ReLU, fused likewise with the image itself,
    ReLU. The auto-encoder is Eilertsen et al.'s (SIGGRAPH Asia 2017) with enlargement and convolution for transposed
    convolution. The sources do not tell the eps and momentum of the batch norms: here torch's 1e-5 and 0.1; and their
    image at the last fusion, "scaled by 255", may be I_clip, as here and in Eilertsen's, or VGG's input over 255.

    Args:
        alpha: radiance from which the mask rises: 0.95 in the paper; SingleHDR's weights and the published code
            have 0.88.
        weights: of VGG16, see :class:`hdrops.models.backbones.VGG`.
        convention: what those weights expect, see :func:`vgg_input`.
        seed: of VGG's random start.

    Shapes:
        [N, 3, H, W], linear, about [0, 1], H and W multiples of 32 -> [N, 3, H, W], nowhere below the input.
    """

    MULTIPLE = 32

    def __init__(
        self,
        alpha: float = 0.95,
        weights: str | os.PathLike[str] | None = None,
        convention: str = "caffe",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha < 1:
            raise ValueError(f"duhdr: alpha must lie in [0, 1), got {alpha}")
        if convention not in VGG_INPUTS:
            raise ValueError(f"duhdr: vgg_input must be one of {', '.join(VGG_INPUTS)}, got {convention!r}")
        if weights == "torchvision" and convention != "torchvision":
            raise ValueError(f"duhdr: torchvision's weights of VGG16 need vgg_input='torchvision', got {convention!r}")
        self.alpha = alpha
        self.convention = convention
        self.encoder = VGG(16, _ENCODER, weights, seed, trainable=True)
        self.bottom = nn.Sequential(SameConv2d(512, 512, 3), nn.BatchNorm2d(512), nn.ReLU(inplace=True))
        self.decoder = nn.ModuleList(
            _Decode(inputs, outputs) for inputs, outputs in ((512, 512), (512, 512), (512, 256), (256, 128), (128, 64))
        )
        self.out = nn.Sequential(SameConv2d(64, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.fuse = _Fuse(3)

    def forward(self, clipped: Tensor) -> Tensor:
        check_image("duhdr: ITnet", clipped, self.MULTIPLE)
        if self.bottom.training and clipped[:, 0].numel() == self.MULTIPLE**2:
            raise ValueError(
                f"duhdr: ITnet: in training its batch norm needs more than one image of {self.MULTIPLE} x "
                f"{self.MULTIPLE} pixels, or a larger one, got shape {list(clipped.shape)}"
            )
        return clipped + self.mask(clipped) * self.beyond_white(clipped)

    def mask(self, clipped: Tensor) -> Tensor:
        """Where the image is overexposed: [N, 1, H, W] in [0, 1]."""
        return overexposed(clipped, self.alpha)

    def beyond_white(self, clipped: Tensor) -> Tensor:
        """The auto-encoder's output, before the mask: [N, 3, H, W], at least 0."""
        *levels, deepest = self.encoder(vgg_input(clipped, self.convention))
        scale = 1 / 255 if self.convention == "caffe" else 1.0
        features = self.bottom(deepest)
        for step in self.decoder:
            features = step(features, levels.pop() * scale)
        return F.relu(self.fuse(torch.cat((self.out(features), clipped), 1)))
