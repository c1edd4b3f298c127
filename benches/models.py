"""Whole systems with the operators' kernels against the same systems without: `python -m benches.models [NAME ...]`.

A case is a forward pass or a training step (forward and backward; the mean square of the outputs stands for the loss)
of one image of the size that the paper trains on, or tests on where a CPU can. The contenders are the same model, the
same weights and inputs, and differ in the operators alone: hdrops's kernels; torchvision's deform_conv2d, the rest in
plain PyTorch; all in plain PyTorch (``hdrops.reference``). Wall time, median, the contenders in turns in one process;
peak memory is the rise of the resident high-water mark over one call in a process of its own (Linux).
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benches.memory import high_water_mb, reset_high_water
from benches.registry import optional
from hdrops import _backends, models
from hdrops import nn as operators

CONTENDERS = ("hdrops", "torchvision", "plain PyTorch")


@dataclass(frozen=True)
class Case:
    """One system or part of it, size and direction; ``peers`` are the contenders that differ from hdrops in it."""

    model: str
    size: tuple[int, int]
    training: bool
    peers: tuple[str, ...]
    part: str = ""

    @property
    def name(self) -> str:
        direction = "training step" if self.training else "forward"
        return f"{self.model}{'.' * bool(self.part)}{self.part} {direction} {self.size[0]}x{self.size[1]}"


def _cases() -> Iterator[Case]:
    everyone, plain = ("torchvision", "plain PyTorch"), ("plain PyTorch",)
    yield Case("sthdr", (512, 512), False, everyone)
    yield Case("sthdr", (256, 256), True, everyone)
    # No operator of hdrops is in it: the cheap alternative to deformable alignment, as a measure of it.
    yield Case("eapnet", (1060, 1900), False, ())
    yield Case("eapnet", (256, 256), True, ())
    yield Case("duhdr", (256, 256), False, plain)
    yield Case("duhdr", (256, 256), True, plain)
    yield Case("apnt", (256, 256), False, plain)
    yield Case("apnt", (256, 256), True, plain)
    # Its networks have no operator of hdrops, its HDR layer is of nothing else.
    yield Case("diffhdr", (256, 256), False, ())
    yield Case("diffhdr", (256, 256), False, plain, part="layer")
    yield Case("diffhdr", (256, 256), True, plain, part="layer")


CASES = tuple(_cases())


@contextlib.contextmanager
def operators_of(contender: str) -> Iterator[None]:
    """The operators come from there while the context is open."""
    requested, deform = _backends._REQUESTED, operators.deform_conv2d
    try:
        if contender != "hdrops":
            _backends._REQUESTED = "reference"
        if contender == "torchvision":
            operators.deform_conv2d = sys.modules["torchvision"].ops.deform_conv2d
        yield
    finally:
        _backends._REQUESTED, operators.deform_conv2d = requested, deform


def prepare(case: Case) -> Callable[[], object]:
    """The call that is measured, its model and inputs made."""
    torch.manual_seed(0)
    system = models.create(case.model).train(case.training)
    model, inputs = system.get_submodule(case.part), system.example_inputs(*case.size, case.part)
    if case.part:  # a part's gradient goes on to what comes before it
        inputs = tuple(x.requires_grad_(case.training) if isinstance(x, Tensor) and x.dim() > 1 else x for x in inputs)

    def forward() -> object:
        with torch.no_grad():
            return model(*inputs)

    def step() -> object:
        model.zero_grad()
        loss = sum(output.square().mean() for output in tensors(model(*inputs)))
        loss.backward()
        return loss

    return step if case.training else forward


def tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors with a gradient in a nest of tuples, lists, dicts and dataclasses."""
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            yield outputs
    else:
        parts = outputs.values() if isinstance(outputs, dict) else getattr(outputs, "__dict__", outputs)
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from tensors(part)


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of each contender that is there."""
    call = prepare(case)
    present = [name for name in ("hdrops", *case.peers) if name != "torchvision" or optional("torchvision")]
    samples: dict[str, list[float]] = {name: [] for name in present}
    for turn in range(rounds + 1):
        for name in present:
            with operators_of(name):
                begin = time.perf_counter()
                call()
                if turn > 0:
                    samples[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in samples.items()}


def peak_memory(case: Case, contender: str, threads: int) -> float | None:
    """MB, measured in a process of its own; None where it failed there."""
    command = [sys.executable, "-m", "benches.models", "--threads", str(threads), "--child", case.name, contender]
    told = subprocess.run(command, capture_output=True, text=True)
    return float(told.stdout.split()[-1]) if told.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.models", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that is not")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        case = next(case for case in CASES if case.name == options.child[0])
        call = prepare(case)
        optional("torchvision")
        with operators_of(options.child[1]):
            reset_high_water()
            before = high_water_mb()
            call()
            print(high_water_mb() - before)
        return
    print(f"torch {torch.__version__}, {options.threads} threads; ratio: peer / hdrops")
    for case in CASES:
        if options.names and case.model not in options.names:
            continue
        seconds = measure(case, options.rounds)
        print(case.name)
        for name, value in seconds.items():
            memory = peak_memory(case, name, options.threads)
            told = "memory not measured" if memory is None else f"{memory:7.0f} MB"
            print(f"    {name:14s} {value:8.3f} s {value / seconds['hdrops']:6.2f}x   {told}", flush=True)


if __name__ == "__main__":
    main()
