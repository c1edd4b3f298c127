"""All that a GPU must show, in one command of less than ten minutes: `make gpu`, or `python -m benches.gpu`.

1. build   the CUDA library for the GPU at hand, in place
2. tests   the whole suite on the GPU, and the tests only a GPU can run (tests/test_cuda.py)
3. memcheck, racecheck   compute-sanitizer on small shapes of every kernel
4. bench   the cases of benches/gpu_cases.py against torchvision, cuDNN's dense convolution, torch.compile of the
           reference and plain PyTorch, with the share of the bandwidth and the arithmetic rate measured in the same run

`--steps` picks steps; a step that fails does not stop the next, but the exit code tells. Logs, one JSON and a plot
go to `--out` (default: benches/results, logs to build/gpu). A time is the median of GPU times between two events, the
contenders in turns, after a write that empties the second-level cache and keeps the GPU busy while Python queues the
contender: neither a warm cache nor the speed of Python is in it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "tests", "memcheck", "racecheck", "bench")
SANITIZER = ["compute-sanitizer", "--error-exitcode", "99", "--target-processes", "application-only"]


def run_logged(name: str, command: list[str], logs: Path, limit: float, **environment: str) -> dict:
    """Runs a step as a program of its own; its output goes to a log, whose end is printed."""
    print(f"=== {name}: {' '.join(command)}", flush=True)
    begin, log = time.perf_counter(), logs / f"{name}.log"
    with log.open("w") as out:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=limit,
                env={**os.environ, **environment},
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        except FileNotFoundError as error:
            out.write(str(error))
            code = 127
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-25:]))
    seconds = round(time.perf_counter() - begin, 1)
    print(f"--- {name}: exit code {code} after {seconds} s", flush=True)
    return {"exit_code": code, "seconds": seconds, "last_line": lines[-1] if lines else ""}


def build(logs: Path, limit: float) -> dict:
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    jobs = str(min(16, os.cpu_count() or 1))
    return run_logged(
        "build", command, logs, limit, HDROPS_CUDA="1", HDROPS_CUDA_ARCH=f"{major}.{minor}", MAX_JOBS=jobs
    )


def tests(logs: Path, limit: float) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider"]
    try:
        import xdist  # noqa: F401

        command += ["-n", str(min(8, os.cpu_count() or 1))]
    except ImportError:
        pass
    return run_logged("tests", command, logs, limit, PYTHONPATH=str(ROOT))


def sanitize(tool: str, logs: Path, limit: float) -> dict:
    pytest = [sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider", "-m", "sanitizer"]
    command = [*SANITIZER, "--tool", tool, *pytest]
    # Torch's caching allocator would hide reads past the end of a tensor from memcheck.
    return run_logged(tool, command, logs, limit, PYTHONPATH=str(ROOT), PYTORCH_NO_CUDA_MEMORY_CACHING="1")


class Clock:
    """Times GPU work between two events, the second-level cache emptied before."""

    def __init__(self) -> None:
        self.flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def time(self, function: Callable[[], object]) -> float:
        """Milliseconds."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def ceilings(clock: Clock) -> dict[str, float]:
    """What the GPU at hand reaches at most: bytes a second of a copy, operations a second of square products."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    best = min(clock.time(lambda: target.copy_(source)) for _ in range(10))
    found = {"copy_bytes_per_s": 2.0 * source.numel() / (best * 1e-3)}
    size = 8192
    for name, dtype, allow_tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        best = min(clock.time(lambda a=a, b=b: a @ b) for _ in range(5))
        found[f"{name}_flops_per_s"] = 2.0 * size**3 / (best * 1e-3)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that a call holds at most beyond what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(contenders: dict[str, Callable[[], object]], clock: Clock, rounds: int) -> dict[str, dict]:
    """Each contender's times and memory, or why it cannot run this case."""
    found: dict[str, dict] = {}
    running = {}
    for name, function in contenders.items():
        try:
            for _ in range(2):
                function()
            found[name] = {"peak_bytes": peak_memory(function)}
            running[name] = function
        except Exception as error:  # a peer may refuse a case; ours must not, and main() looks
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    samples: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, function in running.items():
            samples[name].append(clock.time(function))
    for name, values in samples.items():
        cuts = statistics.quantiles(values, n=5)
        found[name] |= {"median_ms": statistics.median(values), "p20_ms": cuts[0], "p80_ms": cuts[-1]}
    return found


def shares(record: dict, limits: dict[str, float]) -> list[str]:
    """How near our contenders come to the machine."""
    lines = []
    for name, times in record["times"].items():
        if not name.startswith("hdrops") or "error" in times:
            continue
        seconds, notes = times["median_ms"] * 1e-3, []
        if record["rate"]:
            rate = record["flops"] / seconds
            notes.append(f"{rate / 1e12:.1f} TFLOP/s, {100 * rate / limits[record['rate'] + '_flops_per_s']:.0f} %")
        if record["bytes"]:
            rate = record["bytes"] / seconds
            notes.append(f"{rate / 1e9:.0f} GB/s, {100 * rate / limits['copy_bytes_per_s']:.0f} % of a copy")
        lines.append(f"    {name}: {'; '.join(notes)}")
    return lines


def verdicts(record: dict) -> list[str]:
    lines = []
    for name, times in record["times"].items():
        if "error" in times:
            lines.append(f"    {name:34s} {times['error']}")
            continue
        ours = record["times"][record["partners"].get(name, "hdrops")]
        ratio = times["median_ms"] / ours["median_ms"] if "median_ms" in ours else float("nan")
        goal = record["goals"].get(name)
        verdict = "" if goal is None else f"  goal {goal:.2f}x {'reached' if ratio >= goal else 'NOT reached'}"
        spread = f"[{times['p20_ms']:.4f} .. {times['p80_ms']:.4f}]"
        memory = f"{times['peak_bytes'] / 1e6:8.1f} MB"
        lines.append(f"    {name:34s} {times['median_ms']:9.4f} ms {spread:22s} {memory} {ratio:8.2f}x{verdict}")
    return lines


def bench(pattern: str, budget: float, rounds: int) -> dict:
    """All cases whose name matches, as long as the time lasts; those left out are named."""
    from benches.gpu_cases import CASES

    begin, clock = time.perf_counter(), Clock()
    limits = ceilings(clock)
    print("ceilings: " + ", ".join(f"{name} {value:.3g}" for name, value in limits.items()), flush=True)
    records, left_out = [], []
    for case in CASES:
        if not re.search(pattern, case.name):
            continue
        if time.perf_counter() - begin > budget:
            left_out.append(case.name)
            continue
        times = measure(case.build(), clock, rounds)
        record = {
            "case": case.name,
            "times": times,
            "goals": case.goals,
            "partners": case.partners,
            "flops": case.flops,
            "bytes": case.bytes,
            "rate": case.rate,
        }
        records.append(record)
        print("\n".join([case.name, *verdicts(record), *shares(record, limits)]), flush=True)
        torch.cuda.empty_cache()
    if left_out:
        print(f"out of time, not measured: {', '.join(left_out)}")
    return {"ceilings": limits, "records": records, "left_out": left_out}


def plot(document: dict, path: Path) -> None:
    """Time of every contender of every case, relative to ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = []
    for record in document["records"]:
        for name, times in record["times"].items():
            ours = record["times"][record["partners"].get(name, "hdrops")]
            if not name.startswith("hdrops") and "median_ms" in times and "median_ms" in ours:
                ratio = times["median_ms"] / ours["median_ms"]
                bars.append((f"{record['case']}\nvs {name}", ratio, record["goals"].get(name)))
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(10, 0.34 * len(bars) + 1.2))
    axes.barh(range(len(bars)), [ratio for _, ratio, _ in bars], color="#4477aa")
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=6)
    for row, (_, ratio, goal) in enumerate(bars):
        axes.text(ratio, row, f" {ratio:.1f}x", va="center", fontsize=7)
        if goal:
            axes.plot([goal, goal], [row - 0.4, row + 0.4], color="#cc3311", linewidth=2)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("peer time / hdrops time (higher is better); red: the ratio to reach")
    axes.set_title(
        f"{document['gpu']}, torch {document['torch']}, CUDA {document['cuda']}, {document['date']}", fontsize=8
    )
    axes.margins(x=0.1, y=0.01)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu", description="Build, test, sanitize and measure on a GPU."
    )
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results", help="where the JSON and the plot go")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu", help="where the logs of the steps go")
    parser.add_argument("--filter", default="", help="only benchmark cases that match this regular expression")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each contender")
    parser.add_argument("--seconds", type=float, default=570, help="for everything; each step gets what is left")
    options = parser.parse_args()
    steps = options.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--steps must be of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit("hdrops: torch finds no CUDA device; this command needs one")
    options.out.mkdir(parents=True, exist_ok=True)
    options.logs.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()

    def left(reserve: float = 0) -> float:
        return max(10.0, options.seconds - reserve - (time.perf_counter() - begin))

    document = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": str(date.today()),
        "steps": {},
    }
    for step in (step for step in STEPS if step in steps):
        if step == "build":
            document["steps"][step] = build(options.logs, left())
        elif step == "tests":
            document["steps"][step] = tests(options.logs, left(reserve=240))
        elif step != "bench":
            document["steps"][step] = sanitize(step, options.logs, min(100, left(reserve=150)))
        else:
            document |= bench(options.filter, left(reserve=10), options.rounds)
    stem = document["gpu"].lower().replace("nvidia", "").strip().replace(" ", "-") + f"-{document['date']}"
    path = options.out / f"{stem}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    if "records" in document:
        plot(document, path.with_suffix(".png"))
    print(f"wrote {path.name}")
    failed = [name for name, step in document["steps"].items() if step["exit_code"] != 0]
    for record in document.get("records", []):
        failed += [
            f"{record['case']}: {n}" for n, t in record["times"].items() if n.startswith("hdrops") and "error" in t
        ]
    if failed:
        sys.exit(f"hdrops: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
