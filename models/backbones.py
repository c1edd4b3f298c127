"""VGG16 and VGG19, whose features three of the systems match, compare or build on.

The layers carry the names of the paper (conv1_1, relu1_1, ..., pool5) and the state dict those of torchvision
(``features.0.weight``), so that torchvision's weights load from a file. Without weights a network is initialised at
random from a seed: good for tests, useless for training.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hdrops.models._weights import load_state, read_state

# Channels of each block of convolutions.
_BLOCKS = {
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def layer_names(depth: int) -> list[str]:
    """Names of the layers in order: conv1_1, relu1_1, conv1_2, ..., pool1, conv2_1, ..., pool5."""
    if depth not in _BLOCKS:
        raise ValueError(f"VGG: depth must be 16 or 19, got {depth!r}")
    names = []
    for block, channels in enumerate(_BLOCKS[depth], 1):
        for layer in range(1, len(channels) + 1):
            names += [f"conv{block}_{layer}", f"relu{block}_{layer}"]
        names.append(f"pool{block}")
    return names


class VGG(nn.Module):
    """VGG (Simonyan and Zisserman 2015) up to the last of the layers asked for.

    Args:
        depth: 16 or 19.
        layers: names of the features to give, such as "relu3_1" or "pool2", in the network's order.
        weights: a file with torchvision's state dict of that VGG, "torchvision" to have torchvision load its own (which
            may download them), or None for a random start.
        seed: of the random start.
        trainable: whether the weights are trained; frozen otherwise.

    Shapes:
        [N, 3, H, W], already normalised as the weights expect -> one [N, C_l, H_l, W_l] for each layer.

    Raises:
        ValueError: an unknown depth or layer, layers out of order, or a state dict that does not fit.
        OSError: the weights cannot be read, or cannot be downloaded; the message says what to do.
    """

    def __init__(
        self,
        depth: int,
        layers: Sequence[str],
        weights: str | os.PathLike[str] | None = None,
        seed: int = 0,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        names = layer_names(depth)
        if not layers or any(name not in names for name in layers):
            raise ValueError(f"VGG: layers must be of {', '.join(names)}, got {', '.join(layers) or 'none'}")
        self.depth = depth
        self._wanted = [names.index(name) for name in layers]
        if self._wanted != sorted(set(self._wanted)):
            raise ValueError(f"VGG: layers must be in the network's order, each once, got {', '.join(layers)}")
        self.features = nn.Sequential(*_modules(depth)[: self._wanted[-1] + 1])
        if weights is None:
            self._start_at_random(seed)
        else:
            self._load(weights)
        if not trainable:
            self.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        found = []
        for index, layer in enumerate(self.features):
            image = layer(image)
            if index in self._wanted:
                found.append(image)
        return found

    def _start_at_random(self, seed: int) -> None:
        # Drawn on the CPU: a seed gives the same weights wherever they are, and a generator draws on its own device.
        generator = torch.Generator("cpu").manual_seed(seed)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                drawn = torch.empty(layer.weight.shape, device="cpu")
                nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
                assert layer.bias is not None
                with torch.no_grad():
                    layer.weight.copy_(drawn)
                nn.init.zeros_(layer.bias)

    def _load(self, weights: str | os.PathLike[str]) -> None:
        op = f"VGG{self.depth}"
        state = _from_torchvision(self.depth) if weights == "torchvision" else read_state(op, weights)
        mine = {name: value for name, value in state.items() if name in self.state_dict()}
        load_state(op, self, mine, weights)


def imagenet_normalize(image: Tensor) -> Tensor:
    """RGB in [0, 1] as torchvision's weights expect it: mean and deviation of ImageNet taken out."""
    mean, deviation = (image.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (image - mean) / deviation


def _modules(depth: int) -> list[nn.Module]:
    modules: list[nn.Module] = []
    inputs = 3
    for channels in _BLOCKS[depth]:
        for outputs in channels:
            # Not in place: the features before a ReLU can be asked for too.
            modules += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        modules.append(nn.MaxPool2d(2))
    return modules


def _from_torchvision(depth: int) -> dict[str, Tensor]:
    try:
        from torchvision import models
    except ImportError as error:
        raise OSError(
            f"VGG: weights='torchvision' needs torchvision ({error}): pip install it, or give a file of weights"
        ) from error
    try:
        model = getattr(models, f"vgg{depth}")(weights="IMAGENET1K_V1")
    except OSError as error:  # urllib's errors are of this kind
        raise OSError(
            f"VGG: torchvision could not download VGG{depth} ({error}); download its state dict on a machine with a "
            "network and give the file as weights"
        ) from error
    state: dict[str, Tensor] = model.state_dict()
    return state
