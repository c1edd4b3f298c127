"""The operators as modules, with the names and state dicts of the libraries people come from."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hdrops.ops import _common
from hdrops.ops.crf import crf_lookup
from hdrops.ops.deform_conv2d import deform_conv2d
from hdrops.ops.global_context import context_pool, global_context
from hdrops.ops.merge_exposures import merge_exposures
from hdrops.ops.patch_match import PatchMatch as Matches
from hdrops.ops.patch_match import patch_match
from hdrops.ops.patch_swap import patch_swap


class DeformConv2d(nn.Module):
    """Deformable convolution with given offsets: ``torchvision.ops.DeformConv2d``, its arguments and its state dict.

    Args:
        in_channels: channels C of the input.
        out_channels: channels O of the output.
        kernel_size: one integer, or one each for height and width; so are stride, padding and dilation.
        stride: distance between output sites.
        padding: zeros on each side.
        dilation: distance between taps.
        groups: groups of channels that are convolved apart.
        bias: whether to learn one.

    Shapes:
        input [N, C, H, W], offset [N, 2*offset_groups*kh*kw, out_h, out_w], mask [N, offset_groups*kh*kw, out_h, out_w]
        or None -> [N, O, out_h, out_w]; see :func:`hdrops.deform_conv2d`.

    Example:
        >>> import torch, hdrops
        >>> layer = hdrops.nn.DeformConv2d(4, 6, 3, padding=1)
        >>> layer(torch.rand(1, 4, 8, 9), torch.zeros(1, 18, 8, 9)).shape
        torch.Size([1, 6, 8, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels % groups != 0:
                raise ValueError(f"{op}: {name} must be a multiple of groups = {groups}, got {channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _common.checked_pair(op, "kernel_size", kernel_size, 1)
        self.stride = _common.checked_pair(op, "stride", stride, 1)
        self.padding = _common.checked_pair(op, "padding", padding, 0)
        self.dilation = _common.checked_pair(op, "dilation", dilation, 1)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias as ``torch.nn.Conv2d`` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask=mask)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return text + (", bias=False" if self.bias is None else "")


class ModulatedDeformConv2d(DeformConv2d):
    """Modulated deformable convolution (DCNv2) that predicts its offsets and mask from its input.

    A convolution ``conv_offset`` of the same kernel gives 3*offset_groups*kh*kw channels: the offsets of
    :func:`hdrops.deform_conv2d`, then the mask before its sigmoid. It starts at zero: no offset, a mask of one half.

    State dicts load, with ``load_state_dict``, from

    * mmcv's ModulatedDeformConv2dPack: the same names and layout;
    * the DCNv2 forks (class DCN): ``conv_offset_mask.*`` in that layout;
    * 4uiiurz1's pytorch-deform-conv-v2, modulated, 3x3 with padding 1: ``conv.*``, ``m_conv.*``, and ``p_conv.*`` with
      the y of all taps before the x of all taps.

    Args:
        in_channels: channels C of the input.
        out_channels: channels O of the output.
        kernel_size: one integer, or one each for height and width; so are stride, padding and dilation.
        stride: distance between output sites.
        padding: zeros on each side.
        dilation: distance between taps, for the predicting convolution too.
        groups: groups of channels that are convolved apart.
        offset_groups: groups of channels with offsets of their own.
        bias: whether to learn one.

    Example:
        >>> import torch, hdrops
        >>> layer = hdrops.nn.ModulatedDeformConv2d(4, 6, 3, padding=1, offset_groups=2)
        >>> layer(torch.rand(1, 4, 8, 9)).shape
        torch.Size([1, 6, 8, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        if offset_groups < 1 or in_channels % offset_groups != 0:
            raise ValueError(
                f"ModulatedDeformConv2d: in_channels must be a multiple of offset_groups = {offset_groups}, "
                f"got {in_channels}"
            )
        self.offset_groups = offset_groups
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels, 3 * offset_groups * taps, self.kernel_size, self.stride, self.padding, self.dilation
        )
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Offset [N, 2*offset_groups*kh*kw, out_h, out_w] and mask [N, offset_groups*kh*kw, out_h, out_w] in (0, 1)."""
        predicted = self.conv_offset(input)
        sites = predicted.shape[1] // 3
        return predicted[:, : 2 * sites], predicted[:, 2 * sites :].sigmoid()

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        offset, mask = self.predict(input)
        return super().forward(input, offset, mask)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", offset_groups={self.offset_groups}" if self.offset_groups != 1 else "")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        _rename_dcnv2_fork(self, state_dict, prefix)
        _convert_4uiiurz1(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _rename_dcnv2_fork(layer: ModulatedDeformConv2d, state: dict[str, Any], prefix: str) -> None:
    """The forks' name; their predicting convolution is never dilated, ours has the layer's dilation."""
    if prefix + "conv_offset_mask.weight" in state:
        if layer.dilation != (1, 1):
            raise ValueError(
                f"ModulatedDeformConv2d: {prefix}conv_offset_mask of a DCNv2 fork predicts with dilation 1; "
                f"it cannot be loaded into a layer of dilation {layer.dilation}"
            )
        for name in ("weight", "bias"):
            _rename(state, f"{prefix}conv_offset_mask.{name}", f"{prefix}conv_offset.{name}")


def _convert_4uiiurz1(layer: ModulatedDeformConv2d, state: dict[str, Any], prefix: str) -> None:
    """Joins ``p_conv`` (all y, then all x) and ``m_conv`` to the interleaved ``conv_offset``."""
    if prefix + "p_conv.weight" not in state:
        return
    if prefix + "m_conv.weight" not in state:
        raise ValueError(
            f"ModulatedDeformConv2d: {prefix}p_conv without {prefix}m_conv is an unmodulated layer of "
            "pytorch-deform-conv-v2; only the modulated form has this layer's mask"
        )
    geometry = (layer.kernel_size, layer.padding, layer.dilation, layer.offset_groups)
    if geometry != ((3, 3), (1, 1), (1, 1), 1):
        raise ValueError(
            "ModulatedDeformConv2d: layers of pytorch-deform-conv-v2 load into kernel_size 3, padding 1, dilation 1, "
            "offset_groups 1, got "
            f"{layer.kernel_size}, {layer.padding}, {layer.dilation}, {layer.offset_groups}"
        )
    for name in ("weight", "bias"):
        offset = state.pop(f"{prefix}p_conv.{name}")
        y, x = offset.chunk(2)
        mask = state.pop(f"{prefix}m_conv.{name}")
        state[f"{prefix}conv_offset.{name}"] = torch.cat([torch.stack([y, x], dim=1).flatten(0, 1), mask])
        _rename(state, f"{prefix}conv.{name}", f"{prefix}{name}")


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    if old in state:
        state[new] = state.pop(old)


class GlobalContextBlock(nn.Module):
    """The global-context block: mmcv's ``ContextBlock``, its arguments, its state dict and its result.

    Args:
        in_channels: channels C of the input.
        ratio: of the bottleneck, P = int(C * ratio) >= 1.
        pooling_type: "att", attention pooling. mmcv's "avg" is refused: it is a squeeze-and-excitation block.
        fusion_types: "channel_add", "channel_mul" or both (then x * sigmoid(t_mul) + t_add), in a tuple.

    The last convolution of each bottleneck starts at zero: the block starts as the identity, or for "channel_mul" as a
    factor of one half. One fusion type is one operator, :func:`hdrops.global_context`; with both, the pooling is.

    Shapes:
        input [N, C, H, W] -> the same.

    Example:
        >>> import torch, hdrops
        >>> block = hdrops.nn.GlobalContextBlock(8, 1 / 4)
        >>> input = torch.rand(1, 8, 6, 7)
        >>> torch.equal(block(input), input)
        True
    """

    def __init__(
        self,
        in_channels: int,
        ratio: float,
        pooling_type: str = "att",
        fusion_types: Sequence[str] = ("channel_add",),
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if pooling_type == "avg":
            raise NotImplementedError(f"{op}: pooling_type must be 'att', got 'avg', which has no kernel here")
        if pooling_type != "att":
            raise ValueError(f"{op}: pooling_type must be 'att', got {pooling_type!r}")
        names = ("channel_add", "channel_mul")
        known = isinstance(fusion_types, (tuple, list)) and all(name in names for name in fusion_types)
        if not known or not fusion_types:
            raise ValueError(
                f"{op}: fusion_types must be a tuple of 'channel_add' and 'channel_mul', got {fusion_types!r}"
            )
        if not 1 <= in_channels * ratio < math.inf:
            raise ValueError(f"{op}: int(in_channels * ratio) must be at least 1, got int({in_channels} * {ratio})")
        planes = int(in_channels * ratio)
        self.in_channels = in_channels
        self.ratio = ratio
        self.planes = planes
        self.pooling_type = pooling_type
        self.fusion_types = tuple(fusion_types)
        self.conv_mask = nn.Conv2d(in_channels, 1, 1)
        nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
        assert self.conv_mask.bias is not None
        nn.init.zeros_(self.conv_mask.bias)
        self.channel_add_conv = self._bottleneck() if "channel_add" in fusion_types else None
        self.channel_mul_conv = self._bottleneck() if "channel_mul" in fusion_types else None

    def _bottleneck(self) -> nn.Sequential:
        excite = nn.Conv2d(self.planes, self.in_channels, 1)
        nn.init.zeros_(excite.weight)
        assert excite.bias is not None
        nn.init.zeros_(excite.bias)
        return nn.Sequential(
            nn.Conv2d(self.in_channels, self.planes, 1),
            nn.LayerNorm([self.planes, 1, 1]),
            nn.ReLU(inplace=True),
            excite,
        )

    def forward(self, input: Tensor) -> Tensor:
        key_weight, key_bias = self.conv_mask.weight.flatten(), self.conv_mask.bias
        if self.channel_add_conv is not None and self.channel_mul_conv is not None:
            ambient = _common.autocast_dtype(input)
            if ambient is not None:  # as global_context does
                input = _common.cast(input, ambient)
            context = context_pool(input, key_weight, key_bias)[:, :, None, None]
            output: Tensor = input * self.channel_mul_conv(context).sigmoid() + self.channel_add_conv(context)
            return output
        bottleneck = self.channel_mul_conv if self.channel_add_conv is None else self.channel_add_conv
        assert bottleneck is not None
        squeeze, norm, excite = bottleneck[0], bottleneck[1], bottleneck[3]
        assert isinstance(squeeze, nn.Conv2d) and isinstance(norm, nn.LayerNorm) and isinstance(excite, nn.Conv2d)
        assert squeeze.bias is not None and excite.bias is not None
        return global_context(
            input,
            key_weight,
            key_bias,
            squeeze.weight.flatten(1),
            squeeze.bias,
            norm.weight.flatten(),
            norm.bias.flatten(),
            excite.weight.flatten(1),
            excite.bias,
            fusion="mul" if self.channel_add_conv is None else "add",
            eps=norm.eps,
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, ratio={self.ratio}, fusion_types={self.fusion_types}"


def _check_curve(op: str, curve: Tensor | None, learnable: bool) -> None:
    """Raises unless a layer can begin with ``curve``; its operator checks the shape."""
    if curve is None:
        return
    if not isinstance(curve, Tensor):
        raise TypeError(f"{op}: curve must be a tensor or None, got {type(curve).__name__}")
    if learnable and not curve.is_floating_point():
        raise TypeError(f"{op}: a learnable curve must be floating point, got {curve.dtype}")


class CRF(nn.Module):
    """A camera response curve that every pixel passes through, learned or fixed; see :func:`hdrops.crf_lookup`.

    Args:
        levels: values L of a curve, 2 to 2**20; overruled by ``curve``.
        channels: number of curves, one for each channel of the input; None for one curve that all channels share.
        curve: the curve to begin with, [L] or [C, L], copied; None for the identity, a ramp from 0 to 1.
        learnable: whether the curve is a parameter; else it is a buffer. Either is in the state dict, as ``curve``.
        mode: "linear" or "nearest".
        gradient_scale: slope of "nearest" per finite difference of the curve; None is L - 1.

    Shapes:
        input [N, C, ...] (any shape where one curve is shared), pixels in [0, 1] or codes of uint8 or uint16 -> the
        input's shape, in its dtype, for codes in the curve's.

    Example:
        >>> import torch, hdrops
        >>> gamma = hdrops.nn.CRF(curve=torch.linspace(0, 1, 1024) ** 2.2, learnable=False)
        >>> gamma(torch.full((1, 3, 2, 2), 0.5)).mean().round(decimals=3)
        tensor(0.2180)
    """

    curve: Tensor

    def __init__(
        self,
        levels: int = 1024,
        channels: int | None = None,
        *,
        curve: Tensor | None = None,
        learnable: bool = True,
        mode: str = "linear",
        gradient_scale: float | None = None,
    ) -> None:
        super().__init__()
        _check_curve("CRF", curve, learnable)
        if curve is None:
            ramp = torch.linspace(0, 1, levels)
            curve = ramp if channels is None else ramp.repeat(channels, 1)
        elif curve.dim() not in (1, 2) or (channels is not None and tuple(curve.shape[:-1]) != (channels,)):
            wanted = "[L] or [C, L]" if channels is None else f"[{channels}, L]"
            raise ValueError(f"CRF: curve must be {wanted}, got shape {_common.shape_of(curve)}")
        curve = curve.detach().clone()
        if learnable:
            self.curve = nn.Parameter(curve)
        else:
            self.register_buffer("curve", curve)
        self.mode = mode
        self.gradient_scale = gradient_scale

    def forward(self, input: Tensor) -> Tensor:
        curve = self.curve if self.curve.dim() == 1 else self.curve.unsqueeze(0)
        return crf_lookup(input, curve, mode=self.mode, gradient_scale=self.gradient_scale)

    def extra_repr(self) -> str:
        shared = self.curve.dim() == 1
        return (
            f"levels={self.curve.shape[-1]}, channels={None if shared else self.curve.shape[0]}, "
            f"learnable={isinstance(self.curve, nn.Parameter)}, mode={self.mode!r}"
        )


class ExposureMerge(nn.Module):
    """Merges brackets with one camera's response: :func:`hdrops.merge_exposures` as a layer.

    Args:
        curve: inverse response [L] or [1, C or 1, L]; None is linear. It is saved in the state dict.
        learnable: makes ``curve`` a parameter, so that it is trained through the merge.
        weight: ``"hat"``, ``"debevec"``, ``"uniform"`` or a table [L].
        fallback: whether pixels clipped in every frame take one frame's estimate.

    Shapes:
        stack [N, P, C, H, W], log_exposures [N or 1, P], mask [N or 1, P, 1, H, W] or None -> [N, C, H, W].

    Example:
        >>> import torch, hdrops
        >>> merge = hdrops.nn.ExposureMerge(torch.linspace(0.01, 1, 256), learnable=True)
        >>> merge(torch.rand(1, 3, 3, 8, 9), torch.tensor([[-2.0, 0.0, 2.0]])).shape
        torch.Size([1, 3, 8, 9])
    """

    curve: Tensor | None
    weight_table: Tensor | None

    def __init__(
        self,
        curve: Tensor | None = None,
        *,
        learnable: bool = False,
        weight: str | Tensor = "hat",
        fallback: bool = True,
    ) -> None:
        super().__init__()
        _check_curve("ExposureMerge", curve, learnable)
        if not isinstance(weight, (str, Tensor)):
            raise TypeError(f"ExposureMerge: weight must be a name or a tensor, got {type(weight).__name__}")
        if learnable and curve is None:
            raise ValueError("ExposureMerge: learnable=True needs a curve to start from, got None")
        if learnable and curve is not None:
            self.curve = nn.Parameter(curve.detach().clone())
        else:
            self.register_buffer("curve", None if curve is None else curve.detach().clone())
        self.weight = weight if isinstance(weight, str) else None
        self.register_buffer("weight_table", weight.detach().clone() if isinstance(weight, Tensor) else None)
        self.fallback = fallback

    def forward(self, stack: Tensor, log_exposures: Tensor, mask: Tensor | None = None) -> Tensor:
        weight = self.weight if self.weight is not None else self.weight_table
        assert weight is not None
        return merge_exposures(stack, log_exposures, self.curve, weight=weight, mask=mask, fallback=self.fallback)

    def extra_repr(self) -> str:
        shape = "linear" if self.curve is None else f"curve {_common.shape_of(self.curve)}"
        return f"{shape}, weight={self.weight or 'table'}, fallback={self.fallback}"


class PatchMatch(nn.Module):
    """Matches the patches of two feature maps within a local window: :func:`hdrops.patch_match` as a layer.

    Args:
        radius: of the window, one integer or one each for height and width.
        patch_size: 1, 3, 5 or 7.
        normalize: ``"key"``, ``"query"``, ``"both"`` or ``"none"``.

    Shapes:
        query [N, C, Hq, Wq], key [N, C, Hk, Wk], centers int64 [N, Hq, Wq] or None -> the named tuple (index, score),
        both [N, Hq, Wq].

    Example:
        >>> import torch, hdrops
        >>> match = hdrops.nn.PatchMatch(radius=3, normalize="both")
        >>> index, score = match(torch.rand(1, 4, 8, 9), torch.rand(1, 4, 8, 9))
        >>> index.shape
        torch.Size([1, 8, 9])
    """

    def __init__(self, radius: int | Sequence[int], *, patch_size: int = 3, normalize: str = "key") -> None:
        super().__init__()
        self.radius = _common.checked_pair(type(self).__name__, "radius", radius, 0)
        self.patch_size = patch_size
        self.normalize = normalize

    def forward(self, query: Tensor, key: Tensor, centers: Tensor | None = None) -> Matches:
        return patch_match(
            query, key, radius=self.radius, centers=centers, patch_size=self.patch_size, normalize=self.normalize
        )

    def extra_repr(self) -> str:
        return f"radius={self.radius}, patch_size={self.patch_size}, normalize={self.normalize!r}"


class PatchSwap(nn.Module):
    """Lays matched patches out over the query's grid: :func:`hdrops.patch_swap` as a layer.

    Args:
        patch_size: 1, 3, 5 or 7, in sites of the match.
        scale: pixels of the source for one site of the match, 1, 2 or 4.
        border: ``"exclude"`` or ``"zero"``.

    Shapes:
        source [N, C, scale*Hk, scale*Wk], index int64 [N, Hq, Wq] -> [N, C, scale*Hq, scale*Wq].

    Example:
        >>> import torch, hdrops
        >>> match, swap = hdrops.nn.PatchMatch(radius=2), hdrops.nn.PatchSwap(scale=2)
        >>> features = torch.rand(1, 4, 8, 9)
        >>> swap(torch.rand(1, 3, 16, 18), match(features, features).index).shape
        torch.Size([1, 3, 16, 18])
    """

    def __init__(self, *, patch_size: int = 3, scale: int = 1, border: str = "exclude") -> None:
        super().__init__()
        self.patch_size = patch_size
        self.scale = scale
        self.border = border

    def forward(self, source: Tensor, index: Tensor) -> Tensor:
        return patch_swap(source, index, patch_size=self.patch_size, scale=self.scale, border=self.border)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, scale={self.scale}, border={self.border!r}"
