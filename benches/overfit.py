"""Each system learns one small picture by heart: `python -m benches.overfit [NAME ...]`.

One crop of an invented scene with walking people, photographed at one, three or seven exposures, is all the data.
The loss is the system's own; printed are its value before the first step and the mean of the last five. A system has
learnt if the latter is below :data:`GOALS`, the share of the first that it must come down to.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hdrops import models
from hdrops._moving_scene import moving_scene
from hdrops.models.diffhdr import EVS, DiffHDR, ExposureStack, canny_edges
from hdrops.models.diffhdr_losses import CentralizedAdam, DiffHDRLoss
from hdrops.models.duhdr_training import Batch

# name: steps, rate, and the share of the first loss to reach.
GOALS = {
    "sthdr": (60, 1e-3, 0.3),
    "eapnet": (60, 1e-3, 0.4),
    "duhdr": (40, 3e-4, 0.4),
    "apnt": (60, 3e-4, 0.4),
    "diffhdr": (30, 1e-3, 0.7),
}
# Networks of the paper's form, but narrow, where its width takes minutes a step.
NARROW: dict[str, dict[str, object]] = {
    "diffhdr": {"tone_channels": 8, "edge_channels": 8, "refine_channels": 8},
    "apnt": {"blocks": 3},
}


def scene(size: int = 64) -> Tensor:
    """Radiance [3 moments, 3, size, size], 1 being the middle exposure's white at the 90th percentile."""
    radiance = torch.from_numpy(moving_scene(seed=1, height=2 * size, width=2 * size, people=3).radiance)
    crop = radiance[:, size // 2 : size // 2 + size, size // 2 : size // 2 + size].permute(0, 3, 1, 2).contiguous()
    return crop / crop[1].quantile(0.9)


def bracket(radiance: Tensor, stops: Tensor) -> Tensor:
    """Photographs [1, P, 3, H, W], 8 bit, gamma 2.2, of radiance [P or 1, 3, H, W]."""
    exposed = radiance * stops.exp2().view(-1, 1, 1, 1)
    return ((exposed.clamp(0, 1) ** (1 / 2.2)) * 255).round()[None] / 255


def loss_of(model: models.System) -> Callable[[], Tensor]:
    """The system's loss on the scene, anew at each call."""
    radiance = scene()
    if isinstance(model, DiffHDR):
        return _diffhdr(model, radiance[1:2])
    stops = torch.tensor([-2.0, 0.0, 2.0])
    if model.frames == 1:
        batch = Batch(bracket(radiance[1:2], stops[1:2])[0], radiance[1:2])
        return lambda: model.loss(batch, "P8")
    log_exposures = stops * math.log(2)
    inputs = model.prepare(bracket(radiance, stops), log_exposures)
    target = model.encode_target(radiance[1:2], log_exposures)
    return lambda: model.loss(model(*inputs), target)


def _diffhdr(model: DiffHDR, radiance: Tensor) -> Callable[[], Tensor]:
    """All three losses of a full recursion from the middle exposure."""
    images = bracket(radiance, torch.tensor([float(ev) for ev in EVS])) * 2 - 1
    target = ExposureStack(images, images, canny_edges(images))
    wanted, criterion = model.radiance(images), DiffHDRLoss()

    def loss() -> Tensor:
        stack = model(images[:, 3], target.edges[:, 3])
        return torch.stack(list(criterion(stack, target, model.radiance(stack.images), wanted).values())).sum()

    return loss


def learn(name: str) -> tuple[float, float]:
    """The first loss, and the mean of the last five."""
    torch.manual_seed(0)
    steps, rate, _ = GOALS[name]
    model = models.create(name, **NARROW.get(name, {})).train()
    loss = loss_of(model)
    kind = CentralizedAdam if name == "diffhdr" else torch.optim.Adam
    optimizer = kind([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values[0], statistics.mean(values[-5:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.overfit", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    failed = []
    for name in options.names or GOALS:
        begin = time.perf_counter()
        first, last = learn(name)
        steps, rate, share = GOALS[name]
        if not last <= share * first:
            failed.append(name)
        note = "".join(f" {key}={value}" for key, value in NARROW.get(name, {}).items())
        print(
            f"{name:8s} {steps} steps of {rate:g}: loss {first:.4g} -> {last:.4g}, {last / first:.2f} of it "
            f"(goal {share}), {time.perf_counter() - begin:.0f} s{note}",
            flush=True,
        )
    if failed:
        raise SystemExit(f"did not learn: {', '.join(failed)}")


if __name__ == "__main__":
    main()
