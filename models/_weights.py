"""Files of weights: read without running what is in them, and compared with the model before they are loaded."""

import os
import pickle
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def read_state(op: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file of ``torch.save``, also one that stands under "model" in a dict with more.

    Args:
        op: name for messages.
        path: the file. It can run no code: what is more than tensors and containers is refused.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file of weights, or holds no state dict; the message is one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the age of a pickle that it refuses or reads all the same
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise type(error)(f"{op}: {path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # Torch's own words advise to read it nevertheless.
        raise ValueError(
            f"{op}: {path} must hold a state dict of tensors alone, as torch.save(model.state_dict(), ...) writes it; "
            "it holds more, which could run code, or is damaged"
        ) from error
    except Exception as error:  # torch has many kinds for a file that is none of its own
        words = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{op}: {path} is no file of weights ({type(error).__name__}: {words})") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state:
        found = "an empty dict" if isinstance(state, dict) else f"one {type(state).__name__}"
        raise ValueError(f"{op}: {path} must hold a state dict, names with tensors, got {found}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{op}: {path} must hold a state dict, names with tensors, got {name!r} with {type(value).__name__}"
            )
    return state


def load_state(op: str, module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Loads a state dict that :func:`read_state` found in ``path``; it must have every name of the module and no other.

    Raises:
        ValueError: names or shapes differ, or a value is sparse, or complex where the module's is real. The message
            counts them and gives the first of each.
    """
    # Batch norms have counted their batches since torch 0.4.1 only.
    wanted = {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state]
    others = [name for name in state if name not in wanted and not name.endswith("num_batches_tracked")]
    unlike = [
        f"{name} must be {_in_words(value)}, got {_in_words(state[name])}"
        for name, value in wanted.items()
        if name in state and _in_words(state[name]) != _in_words(value)
    ]
    wrong = []
    if missing:
        wrong.append(f"it lacks {len(missing)} of {len(wanted)} weights, {missing[0]} first")
    if others:
        wrong.append(f"it has {len(others)} others, {others[0]} first")
    if unlike:
        wrong.append(f"{len(unlike)} are of another form: {unlike[0]}")
    if wrong:
        raise ValueError(f"{op}: {path} does not fit the model: {'; '.join(wrong)}")
    module.load_state_dict(state, strict=False)


def _in_words(value: Tensor) -> str:
    kind = "complex " if value.is_complex() else ""
    return f"{kind}{'' if value.layout == torch.strided else 'sparse '}{list(value.shape)}"
