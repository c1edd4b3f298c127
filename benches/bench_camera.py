"""Recovery of a response curve against OpenCV, at equal numbers of samples and with our default."""

import torch

from benches.bench_crf import bracket
from benches.registry import Case, Contenders, optional
from hdrops import camera


def recovery(samples: int) -> Contenders:
    stack, times = bracket(5, 1080, 1920)
    log_times = times.log().float()[None]
    found: Contenders = {"hdrops": lambda: camera.estimate_crf(stack, log_times, samples=samples)}
    cv2 = optional("cv2")
    if cv2 is not None and samples <= 1000:
        images = [frame.movedim(0, -1).contiguous().numpy() for frame in stack[0]]
        seconds = times.float().numpy()
        calibrate = cv2.createCalibrateDebevec(samples=samples)
        found["OpenCV CalibrateDebevec"] = lambda: calibrate.process(images, seconds)
    return found


def robertson() -> Contenders:
    stack, times = bracket(5, 270, 480)
    log_times = times.log().float()[None]
    found: Contenders = {"hdrops": lambda: camera.estimate_crf(stack, log_times, method="robertson")}
    cv2 = optional("cv2")
    if cv2 is not None:
        images = [frame.movedim(0, -1).contiguous().numpy() for frame in stack[0]]
        seconds = times.float().numpy()
        found["OpenCV CalibrateRobertson"] = lambda: cv2.createCalibrateRobertson().process(images, seconds)
    return found


def given_samples(count: int, frames: int) -> Contenders:
    """The solve alone: codes [S, P, 3] as gathered."""
    generator = torch.Generator().manual_seed(0)
    radiance = torch.rand(count, 1, 3, generator=generator).double() ** 3 * 8
    log_times = torch.arange(frames).double() * 0.7 - 0.35 * frames
    codes = ((radiance * log_times.exp()[None, :, None]).clamp(0, 1) ** (1 / 2.2) * 255).round().byte()
    smoothness = 20 * (count / 150) ** 0.5
    return {"hdrops": lambda: camera.solve_debevec(codes, log_times, smoothness=smoothness)}


CASES = [
    Case("estimate_crf debevec 70 samples 5x3x1080p", lambda: recovery(70), {"OpenCV CalibrateDebevec": 20}),
    Case("estimate_crf debevec 300 samples 5x3x1080p", lambda: recovery(300), {"OpenCV CalibrateDebevec": 20}),
    Case("estimate_crf debevec 16000 samples 5x3x1080p", lambda: recovery(16000)),
    Case("solve_debevec 16000 samples x 16 frames x 3", lambda: given_samples(16000, 16)),
    Case("estimate_crf robertson 5x3x270x480", robertson),
]
