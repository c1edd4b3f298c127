"""DiffHDR: a single photograph becomes an exposure stack, the stack radiance, all differentiable.

Kim, Lee and Kang, "End-to-End Differentiable Learning to HDR Image Synthesis for Multi-exposure Images", AAAI 2021.
The networks are here; :mod:`hdrops.models.diffhdr_layer` has the HDR layer, :mod:`hdrops.models.diffhdr_losses` what
they are trained with.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrops.models._system import System, check_options, crop_to, pad_to_multiple
from hdrops.models.diffhdr_layer import HDRLayer
from hdrops.models.operations import PaperRow

# Exposure values of the stack, in stops; the steps between them are what the networks learn.
EVS = (-3, -2, -1, 0, 1, 2, 3)


@dataclass(frozen=True)
class DiffHDRConfig:
    """Options of :class:`DiffHDR`; the defaults are the paper's network, as its public code fixes the widths.

    Attributes:
        tone_channels: width of the global network's first level; each further level doubles it.
        edge_channels: of the local network.
        refine_channels: of the refinement network.
        recurrent: whether the recurrent units' states go from step to step; False starts each step from zero.
        conditional: whether each step has an affine map of its own in the instance norms; False is one for all steps.
        smoothness: lambda of the response's second differences.
        gradient_scale: slope of the HDR layer's lookup; 1 as printed, 255 the slope to pixels in [0, 1].

    Both switches are rows of the paper's ablation, whose other networks are not described. "Decomposition" is
    ``forward(refine=False)``, whose images are the global network's alone; the HDR layer and L_CoBi are in the losses.
    """

    tone_channels: int = 32
    edge_channels: int = 16
    refine_channels: int = 16
    recurrent: bool = True
    conditional: bool = True
    smoothness: float = 20.0
    gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("tone_channels", "edge_channels", "refine_channels"), 1)
        check_options("diffhdr", self, least=counts, above={"smoothness": 0, "gradient_scale": 0})


class ExposureStack(NamedTuple):
    """What :class:`DiffHDR` makes of a photograph, for the exposure values -3 ... 3.

    Attributes:
        images: refined, [N, 7, 3, H, W] in [-1, 1]; at the photograph's own exposure the photograph.
        tones: of the global networks, likewise.
        edges: of the local networks, [N, 7, 1, H, W] in [0, 1]; at the photograph's own exposure the given ones.
    """

    images: Tensor
    tones: Tensor
    edges: Tensor


class ConditionalInstanceNorm(nn.Module):
    """Instance norm with an affine map for each condition: gamma_e (X - mu) / sigma + beta_e.

    The paper prints beta_e inside the division; its code has it outside, as conditional instance norm does elsewhere.
    """

    def __init__(self, channels: int, conditions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(conditions, channels))
        self.bias = nn.Parameter(torch.zeros(conditions, channels))

    def forward(self, x: Tensor, condition: int) -> Tensor:
        """Of the step ``condition``; a map that stands alone is every step's."""
        mine = condition if len(self.weight) > 1 else 0
        return F.instance_norm(x, weight=self.weight[mine], bias=self.bias[mine])


class ConvGRU(nn.Module):
    """Gated recurrent unit of 3x3 convolutions; a state of None is zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.update, self.reset, self.candidate = (nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:
        state = torch.zeros_like(x) if state is None else state
        both = torch.cat((x, state), 1)
        update = self.update(both).sigmoid()
        candidate = self.candidate(torch.cat((x, self.reset(both).sigmoid() * state), 1)).tanh()
        return torch.lerp(state, candidate, update)


class DoubleConv(nn.Module):
    """Convolution, swish, convolution, an optional norm, swish."""

    def __init__(self, inputs: int, outputs: int, norm: nn.Module | None = None, first: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, first, padding=first // 2)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm = norm

    def forward(self, x: Tensor, condition: int) -> Tensor:
        x = self.second(F.silu(self.first(x)))
        if isinstance(self.norm, ConditionalInstanceNorm):
            x = self.norm(x, condition)
        elif self.norm is not None:
            x = self.norm(x)
        return F.silu(x)


class UNet(nn.Module):
    """The form of all three networks: halving and doubling channels, a bottleneck, and the way back.

    A level of the way back joins the pooled feature of its size, is enlarged twofold, and takes a double convolution.

    Args:
        inputs: channels in.
        channels: of the first level.
        levels: halvings of the resolution.
        pool: halves the resolution.
        enlarge: "bilinear" or "nearest".
        recurrent: a ConvGRU and a double convolution are the bottleneck, instead of one convolution.
        encoder_norm: makes the norm of the encoder's double convolutions from their channels, or None.
        decoder_norm: of the decoder's.
        decoder_kernel: of the decoder's first convolutions.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        levels: int,
        pool: nn.Module,
        enlarge: str,
        recurrent: bool,
        encoder_norm: Callable[[int], nn.Module] | None,
        decoder_norm: Callable[[int], nn.Module],
        decoder_kernel: int,
    ) -> None:
        super().__init__()
        widths = [channels << level for level in range(levels + 1)]
        self.entry = nn.Conv2d(inputs, channels, 3, padding=1)
        self.encoder = nn.ModuleList(
            DoubleConv(narrow, wide, encoder_norm(wide) if encoder_norm else None)
            for narrow, wide in itertools.pairwise(widths)
        )
        self.pool = pool
        self.enlarge = enlarge
        deepest = widths[-1]
        self.gru = ConvGRU(deepest) if recurrent else None
        self.bottleneck = DoubleConv(deepest, deepest) if recurrent else nn.Conv2d(deepest, deepest, 3, padding=1)
        self.decoder = nn.ModuleList(
            DoubleConv(2 * wide, wide // 2, decoder_norm(wide // 2), decoder_kernel) for wide in widths[:0:-1]
        )

    def forward(self, x: Tensor, condition: int, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The last level's feature beside the entry's, [N, 2*channels, H, W], and the state for the next step."""
        entry = x = self.entry(x)
        pooled = []
        for level in self.encoder:
            x = self.pool(level(x, condition))
            pooled.append(x)
        if self.gru is not None:
            x = state = self.gru(x, state)
            x = self.bottleneck(x, condition)
        else:
            x = F.silu(self.bottleneck(x))
        for level, skip in zip(self.decoder, reversed(pooled), strict=True):
            x = F.interpolate(torch.cat((x, skip), 1), scale_factor=2, mode=self.enlarge)
            x = level(x, condition)
        return torch.cat((x, entry), 1), state


class ToneNet(nn.Module):
    """The global network: the photograph one stop further, by its tones. [N, 3, H, W] in [-1, 1], likewise out."""

    def __init__(self, channels: int, conditions: int) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return ConditionalInstanceNorm(channels, conditions)

        self.body = UNet(3, channels, 5, nn.AvgPool2d(2), "bilinear", True, None, norm, 1)
        self.exit = nn.Conv2d(2 * channels, 3, 3, padding=1)

    def forward(self, image: Tensor, condition: int, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, state = self.body(image, condition, state)
        return (self.exit(x).tanh() + image) / 2, state


class EdgeNet(nn.Module):
    """The local network: the edge map one stop further, from grey and edges. [N, 2, H, W] -> [N, 1, H, W] in [0, 1]."""

    def __init__(self, channels: int, conditions: int) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return ConditionalInstanceNorm(channels, conditions)

        self.body = UNet(2, channels, 4, nn.MaxPool2d(2), "nearest", True, norm, norm, 1)
        self.exit = nn.Conv2d(2 * channels, 2, 3, padding=1)
        self.exit_norm = norm(2)
        self.edge = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, grey_and_edge: Tensor, condition: int, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, state = self.body(grey_and_edge, condition, state)
        x = F.silu(self.exit_norm(self.exit(x), condition))
        return self.edge(torch.cat((x, grey_and_edge), 1)).sigmoid(), state


class RefineNet(nn.Module):
    """The refinement network: photograph, tones and edges together, [N, 7, H, W] -> [N, 3, H, W] in [-1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return nn.InstanceNorm2d(channels, affine=True)

        self.body = UNet(7, channels, 5, nn.AvgPool2d(2), "bilinear", False, None, norm, 3)
        self.exit = nn.Conv2d(2 * channels, 3, 3, padding=1)

    def forward(self, image: Tensor, tone: Tensor, edge: Tensor) -> Tensor:
        x, _ = self.body(torch.cat((image, tone, edge), 1), 0, None)
        refined: Tensor = (self.exit(x).tanh() + tone) / 2
        return refined


class StopNet(nn.Module):
    """Three networks that carry a photograph one stop up, or one down."""

    def __init__(self, config: DiffHDRConfig) -> None:
        super().__init__()
        conditions = len(EVS) - 1 if config.conditional else 1
        self.tone = ToneNet(config.tone_channels, conditions)
        self.edge = EdgeNet(config.edge_channels, conditions)
        self.refine = RefineNet(config.refine_channels)

    def forward(
        self, image: Tensor, edge: Tensor, condition: int, states: Sequence[Tensor | None], refine: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
        """Image, tone, edge and states one stop further; without ``refine`` the image is the tone."""
        tone, tone_state = self.tone(image, condition, states[0])
        grey = image.mean(1, keepdim=True)
        next_edge, edge_state = self.edge(torch.cat((grey, edge), 1), condition, states[1])
        further = self.refine(image, tone, next_edge) if refine else tone
        return further, tone, next_edge, (tone_state, edge_state)


class DiffHDR(System):
    """Stop-up and stop-down networks, applied again and again, and the differentiable HDR layer.

    ::

        photograph, EV e --- up ---> e+1 --- up ---> ... +3        each step: tones   (global U-Net, ConvGRU)
                        \\-- down --> e-1 -- down --> ... -3                   edges   (local U-Net, ConvGRU)
        stack of 7 --> HDRLayer --> radiance                                  refined (U-Net of both and the image)

    Both directions have networks of the same form and weights of their own. The states of the recurrent units go from
    step to step. Conditional instance norm picks its affine map by the step: 0 between -3 and -2, 5 between 2 and 3.

    Shapes:
        image [N, 3, H, W] in [-1, 1], edge [N, 1, H, W] in {0, 1} or None: then :func:`canny_edges` finds them, on the
        CPU. H and W multiples of 32 (``predict`` pads), converted to the weights' type -> :class:`ExposureStack`.

    Parameters are named ``up`` and ``down``, then ``tone``, ``edge``, ``refine``, then ``body.entry``,
    ``body.encoder.L``, ``body.gru``, ``body.bottleneck``, ``body.decoder.L`` and ``exit``.

    Training, as the code has it: ``DiffHDRLoss`` and ``CentralizedAdam`` of :mod:`hdrops.models.diffhdr_losses`, 1e-4
    for the global and local networks, 1e-5 for the refinement; single 256 x 256 images, flipped and scaled at random;
    80,000 iterations, the first 10,000 with ``refine=False`` and without L_HDR. Each takes a step with ``teacher`` from
    a random exposure value, and one without from -1, 0 or 1. With ``refine=False``, and from -3 or 3, some networks are
    not used: DistributedDataParallel then needs ``find_unused_parameters``.

    Where paper and public code differ: the shift of conditional instance norm is outside its division (code); the
    output norm of the local network takes the step's own map (the code always takes the first, by a missing argument);
    the slope of the response at code 0 is g(0) (equation 3; the code reads the index of the first pixel).

    Example:
        >>> import torch, hdrops.models
        >>> model = hdrops.models.create("diffhdr", tone_channels=2, edge_channels=2, refine_channels=2).eval()
        >>> with torch.no_grad():
        ...     model.predict(torch.rand(1, 1, 3, 40, 50)).shape
        torch.Size([1, 3, 40, 50])
    """

    name = "diffhdr"
    frames = 1
    Config = DiffHDRConfig
    # The paper prints no table of complexity: these are what its public code measures.
    paper_rows = tuple(
        PaperRow(f"code, {what}, one step", "fixed", (256, 256), millions, giga, part=part)
        for what, part, millions, giga in (
            ("global network", "up.tone", 98.918403, 27.5),
            ("local network", "up.edge", 6.188815, 5.76),
            ("refinement network", "up.refine", 11.007971, 8.58),
        )
    )

    def __init__(self, config: DiffHDRConfig | None = None) -> None:
        config = config or DiffHDRConfig()
        super().__init__(config)
        self.up = StopNet(config)
        self.down = StopNet(config)
        self.layer = HDRLayer(config.smoothness, config.gradient_scale)

    def forward(
        self,
        image: Tensor,
        edge: Tensor | None = None,
        ev: int = 0,
        refine: bool = True,
        teacher: ExposureStack | None = None,
    ) -> ExposureStack:
        """The exposure stack of a photograph.

        Args:
            image: [N, 3, H, W] in [-1, 1].
            edge: its edge map [N, 1, H, W], or None to find it.
            ev: the exposure value that the photograph counts as, -3 to 3.
            refine: whether to run the refinement networks; without, the tones go on to the next step.
            teacher: the true stack; each step then starts from its image and edges instead of the last prediction, and
                the recurrent states carry no gradient (phase A of the training).

        Raises:
            ValueError: shapes or an exposure value that do not fit. TypeError: an image that is not floating point.
        """
        self._check(image, edge, ev, teacher)
        edge = canny_edges(image) if edge is None else edge
        weight = self.up.edge.edge.weight
        image, edge = image.to(weight.dtype), edge.to(weight.dtype)
        found = {ev: (image, image, edge)}
        for net, step in ((self.up, 1), (self.down, -1)):
            states: tuple[Tensor | None, Tensor | None] = (None, None)
            current, current_edge, at = image, edge, ev
            while EVS[0] <= at + step <= EVS[-1]:
                if teacher is not None:
                    true = (teacher.images, teacher.edges)
                    current, current_edge = (part[:, at - EVS[0]].to(weight.dtype) for part in true)
                    states = _detached(states[0]), _detached(states[1])
                if not self.config.recurrent:
                    states = (None, None)
                condition = min(at, at + step) - EVS[0]
                current, tone, current_edge, states = net(current, current_edge, condition, states, refine)
                at += step
                found[at] = (current, tone, current_edge)
        return ExposureStack(*(torch.stack([found[value][part] for value in EVS], 1) for part in range(3)))

    def radiance(self, images: Tensor) -> Tensor:
        """Radiance [N, 3, H, W] of a stack's images [N, 7, 3, H, W] in [-1, 1], by the HDR layer, t = 2^EV."""
        radiance: Tensor = self.layer((images + 1) / 2, log_exposures(images.device))[0]
        return radiance

    def example_inputs(self, height: int, width: int, part: str = "") -> tuple[Any, ...]:
        channels = {"tone": 3, "edge": 2}
        last = part.split(".")[-1]
        if last in channels:
            return torch.rand(1, channels[last], height, width), 0, None
        images = [torch.rand(1, count, height, width) for count in (3, 3, 1)]
        if part and last != "refine":
            parts = ", ".join(f"{net}.{name}" for net in ("up", "down") for name in (*channels, "refine"))
            raise ValueError(f"diffhdr: complexity is told of the whole network or of {parts}, not of {part!r}")
        return tuple(images) if part else (images[0], images[2])

    def _predict(self, images: Tensor, log_exposures: Tensor) -> Tensor:
        image, size = pad_to_multiple(images[:, 0] * 2 - 1, 32)
        return crop_to(self.radiance(self(image).images), size)

    def _check(self, image: Tensor, edge: Tensor | None, ev: int, teacher: ExposureStack | None) -> None:
        if not isinstance(image, Tensor):
            raise TypeError(f"diffhdr: image must be a tensor, got {type(image).__name__}")
        if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] % 32 or image.shape[3] % 32:
            raise ValueError(
                f"diffhdr: image must be [N, 3, H, W] with H and W multiples of 32, got shape {list(image.shape)}"
            )
        if not image.is_floating_point():
            raise TypeError(f"diffhdr: image must be floating point in [-1, 1], got {image.dtype}")
        if 0 in image.shape:
            raise ValueError(f"diffhdr: image must have pixels, got shape {list(image.shape)}")
        if not isinstance(ev, int) or ev not in EVS:
            raise ValueError(f"diffhdr: ev must be an integer from {EVS[0]} to {EVS[-1]}, got {ev!r}")
        n, _, height, width = image.shape
        expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [("edge", edge, (n, 1, height, width))]
        if teacher is not None:
            if not isinstance(teacher, ExposureStack):
                raise TypeError(f"diffhdr: teacher must be an ExposureStack, got {type(teacher).__name__}")
            expected += [
                ("teacher.images", teacher.images, (n, len(EVS), 3, height, width)),
                ("teacher.edges", teacher.edges, (n, len(EVS), 1, height, width)),
            ]
        for name, tensor, shape in expected:
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"diffhdr: {name} must be {list(shape)}, got shape {list(tensor.shape)}")


def _detached(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.detach()


def log_exposures(device: torch.device | None = None) -> Tensor:
    """Natural logarithms [7] of the stack's exposures, 2^EV seconds."""
    return torch.tensor([ev * math.log(2) for ev in EVS], dtype=torch.float32, device=device)


@torch.compiler.disable
def canny_edges(images: Tensor) -> Tensor:
    """Canny's edges of images [..., 3, H, W] in [-1, 1]: [..., 1, H, W], 0 or 1, without a gradient (equation 5).

    Grey in [0, 1], NaN counted as 0, is smoothed by a Gaussian of sigma 2; the thresholds of its Sobel magnitude are
    0.1 and 0.2.

    Raises:
        ImportError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("diffhdr: edge maps need OpenCV: pip install 'hdrops[photo]', or give them") from error
    # Derivatives in fixed point, as OpenCV takes them: the largest, 4, becomes 2^13.
    scale = 2.0**11
    luma = images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(3, 1, 1)
    grey = ((images.detach().float() + 1) / 2 * luma).sum(-3).nan_to_num().clamp(0, 1).cpu().numpy()
    edges = torch.empty(grey.shape, dtype=torch.uint8, device="cpu")
    for plane, out in zip(grey.reshape(-1, *grey.shape[-2:]), edges.view(-1, *grey.shape[-2:]), strict=True):
        smooth = cv2.GaussianBlur(plane, (0, 0), 2, borderType=cv2.BORDER_REPLICATE)
        dx, dy = (
            (cv2.Sobel(smooth, cv2.CV_32F, *order, borderType=cv2.BORDER_REPLICATE) * scale).round().astype("int16")
            for order in ((1, 0), (0, 1))
        )
        out.copy_(torch.from_numpy(cv2.Canny(dx, dy, 0.1 * scale, 0.2 * scale, L2gradient=True) // 255))
    return edges.unsqueeze(-3).to(images)
