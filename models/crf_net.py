"""CRF-Net's trunk (Li and Peers, CVMP 2017): a ResNet of bottlenecks that ends after its block 3b; and its weights.

DuHDR's INnet and Nnet begin with it; their input has 102 channels where CRF-Net's has others, so that its first
convolution is their own. Padding is TensorFlow's. Layers have the names of the Caffe release: the convolution that
Caffe calls ``res2a_branch2b`` is ``res2a.branch2b.0`` here, and its norm ``bn2a_branch2b`` is ``res2a.branch2b.1``.
"""

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrops.models._weights import load_state, read_state
from hdrops.models.duhdr_networks import SameConv2d, pad_same

# Names of weights, as Caffe's converter to TensorFlow writes them and as torch does.
_CONVOLUTION = {"weights": "weight"}
_NORM = {"scale": "weight", "offset": "bias", "mean": "running_mean", "variance": "running_var"}
# All that a pickled array is made of.
_ARRAY_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_ARRAY_NAMES = ("_reconstruct", "ndarray", "dtype")


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=1e-3)  # TensorFlow's decay of 0.999


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(SameConv2d(inputs, outputs, kernel, stride, bias=False), _norm(outputs))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with batch norms beside the identity, or a projection where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch1 = _normed(inputs, outputs, 1, stride) if inputs != outputs else None
        self.branch2a = _normed(inputs, width, 1, stride)
        self.branch2b = _normed(width, width, 3)
        self.branch2c = _normed(width, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        found = self.branch2b(F.relu(self.branch2a(features))).relu()
        shortcut = features if self.branch1 is None else self.branch1(features)
        return F.relu(shortcut + self.branch2c(found))


class Trunk(nn.Module):
    """The ResNet; ``inputs`` are the channels of what it looks at.

    Shapes:
        [N, inputs, H, W] -> [N, 512, ceil(H / 8), ceil(W / 8)].
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv1 = SameConv2d(inputs, 64, 7, 2)
        self.bn_conv1 = _norm(64)
        self.pool1 = nn.MaxPool2d(3, 2)
        self.res2a = Bottleneck(64, 64)
        self.res2b = Bottleneck(256, 64)
        self.res2c = Bottleneck(256, 64)
        self.res3a = Bottleneck(256, 128, stride=2)
        self.res3b = Bottleneck(512, 128)

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu(self.bn_conv1(self.conv1(features)))
        # Zeros are the smallest values after a ReLU: they stand for no pixels.
        features = self.pool1(pad_same(features, 3, 2))
        for block in (self.res2a, self.res2b, self.res2c, self.res3a, self.res3b):
            features = block(features)
        return features


def load_crf_net(trunk: Trunk, path: str | os.PathLike[str]) -> None:
    """Starts a trunk from CRF-Net's published weights, all but ``conv1``, whose inputs are others.

    Args:
        trunk: changed in place.
        path: the published ``crf_net_v2.npy`` (a pickled dictionary ``{"res2a_branch1": {"weights": ...}, ...,
            "bn2a_branch1": {"scale": ..., "offset": ..., "mean": ..., "variance": ...}, ...}`` of arrays, kernels
            HWIO), or a file of torch with the state dict of a :class:`Trunk`. Neither can run code: what is no array
            is refused.

    Raises:
        OSError: no such file.
        ValueError: a file of another kind, or one that lacks a layer or has another shape.
    """
    path = Path(path)
    state = _from_caffe(_arrays(path), path) if path.suffix == ".npy" else read_state("duhdr", path)
    mine = trunk.state_dict()
    state = {name: value for name, value in state.items() if name in mine}
    own = {name: value for name, value in mine.items() if name.startswith("conv1.")}
    load_state("duhdr: CRF-Net", trunk, {**state, **own}, path)


def _from_caffe(layers: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Tensor]:
    """State dict of a :class:`Trunk` by Caffe's names: res2a_branch2b and bn2a_branch2b are ``res2a.branch2b``."""
    state = {}
    for layer, values in layers.items():
        if layer == "bn_conv1":
            prefix, names = layer, _NORM
        elif layer.startswith(("res", "bn")) and "_" in layer:
            block, branch = layer.removeprefix("res").removeprefix("bn").split("_", 1)
            norm = layer.startswith("bn")
            prefix, names = f"res{block}.{branch}.{int(norm)}", _NORM if norm else _CONVOLUTION
        else:
            continue
        for name, value in values.items():
            if name not in names:
                raise ValueError(f"duhdr: {path}: {layer} must have {', '.join(names)}, it has {name}")
            array = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
            state[f"{prefix}.{names[name]}"] = array.permute(3, 2, 0, 1) if array.dim() == 4 else array
    return state


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays and containers; a file that asks for anything else is refused before it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module in _ARRAY_MODULES and name in _ARRAY_NAMES) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise ValueError(f"it asks for {module}.{name}")


def _arrays(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The dictionary that ``numpy.save`` pickled into a file, from Python 2 or 3."""
    expected = f"duhdr: {path} must be a dictionary of arrays as numpy.save writes it"
    file = io.BytesIO(path.read_bytes())
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if shape != () or not dtype.hasobject:
            raise ValueError(f"holds an array of {dtype}")
        found = _ArraysOnly(file, encoding="latin1").load().item()
    except (ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{expected}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(layer, dict) for layer in found.values()):
        raise ValueError(expected)
    return found
