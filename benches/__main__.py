"""Runs the benchmark cases: `python -m benches [--filter TEXT] [--threads 1,2] [--seconds S] [--save]`.

The contenders of a case take turns in one process, so that what disturbs the machine disturbs all of them. A time is
the median over the rounds: process CPU time with one thread (other programs do not count in it), wall time with more.
The
table gives the time, the ratio peer / hdrops beside the ratio to reach, and how near hdrops comes to the multiply-add
rate and the copy bandwidth of one core, measured in the same run (benches/limits.py). `--save` writes
benches/results/<processor>-<date>.json and the same as a picture.
"""

import argparse
import json
import platform
import statistics
import textwrap
import time
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

import hdrops
from benches import limits
from benches.registry import Case, cases

RESULTS = Path(__file__).parent / "results"
PEERS = ("torchvision", "onnxruntime", "opencv-python-headless", "numpy")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"hdrops": hdrops.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def set_threads(count: int) -> None:
    torch.set_num_threads(count)
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(count)


def timed(function, clock) -> float:
    begin = clock()
    function()
    return clock() - begin


def run(case: Case, threads: int, seconds: float) -> dict[str, dict[str, float]]:
    """Times of each contender in milliseconds: median, 20th and 80th percentile, rounds."""
    set_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    contenders = case.build()
    first = {name: timed(function, time.perf_counter) for name, function in contenders.items()}
    # A slow contender sits out rounds rather than take the time of the others.
    every = {name: max(1, round(cost / (4 * min(first.values())))) for name, cost in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    begin, turn = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or min(map(len, samples.values())) < 3:
        for name, function in contenders.items():
            if turn % every[name] == 0:
                if threads > 1:  # let the last contender's waiting threads go to sleep, which would share our cores
                    time.sleep(0.1)
                samples[name].append(timed(function, clock))
        turn += 1
    result = {}
    for name, values in samples.items():
        cuts = statistics.quantiles(values, n=5)
        result[name] = {
            "median_ms": statistics.median(values) * 1e3,
            "p20_ms": cuts[0] * 1e3,
            "p80_ms": cuts[-1] * 1e3,
            "rounds": len(values),
        }
    return result


def describe(
    case: Case, threads: int, result: dict[str, dict[str, float]], peak: float | None, copy: float
) -> list[str]:
    """The table's lines of one case."""
    ours = result["hdrops"]["median_ms"]
    lines = [f"{case.name}, {threads} thread{'s' if threads > 1 else ''}"]
    for name, times in result.items():
        ratio = times["median_ms"] / result[case.partners.get(name, "hdrops")]["median_ms"]
        goal = case.goals.get(name) if threads == 1 else None
        verdict = "" if goal is None else f"  goal {goal:.2f}x {'reached' if ratio >= goal else 'NOT reached'}"
        spread = f"[{times['p20_ms']:.2f} .. {times['p80_ms']:.2f}]"
        lines.append(f"    {name:26s} {times['median_ms']:10.2f} ms {spread:24s} {ratio:8.2f}x{verdict}")
    notes = []
    if case.flops and peak:
        rate = case.flops / (ours * 1e-3)
        notes.append(f"{rate / 1e9:.0f} GFLOP/s, {100 * rate / (peak * threads):.0f} % of the multiply-add peak")
    if case.bytes:
        rate = case.bytes / (ours * 1e-3)
        notes.append(f"{rate / 1e9:.1f} GB/s, {100 * rate / copy:.0f} % of one core's copy bandwidth")
    return lines + [f"    hdrops: {'; '.join(notes)}" for _ in notes[:1]]


def ratio(record: dict, peer: str) -> float:
    """Peer time / hdrops time, in the peer's layout."""
    partner = record["partners"].get(peer, "hdrops")
    return record["times"][peer]["median_ms"] / record["times"][partner]["median_ms"]


def plot(records: list[dict], path: Path, title: str) -> None:
    """Bars of peer time / hdrops time, with the goal as a mark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{r['case']}\nvs {peer}", ratio(r, peer), r["goals"].get(peer))
        for r in records
        if r["threads"] == 1
        for peer in r["times"]
        if not peer.startswith("hdrops")
    ]
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(bars) + 1.2))
    axes.barh([b[0] for b in bars], [b[1] for b in bars], color="#4477aa")
    for row, (_, _, goal) in enumerate(bars):
        if goal:
            axes.plot([goal, goal], [row - 0.4, row + 0.4], color="#cc3311", linewidth=2)
    for row, (_, reached, _) in enumerate(bars):
        axes.text(reached, row, f" {reached:.1f}x", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel("peer time / hdrops time, one thread (higher is better); red: the ratio to reach")
    axes.set_title("\n".join(textwrap.wrap(title, 100)), fontsize=8)
    axes.margins(x=0.1, y=0.01)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches", description="Compare hdrops with its peers.")
    parser.add_argument("--filter", default="", help="only cases whose name contains this text")
    parser.add_argument("--threads", default="", help="comma-separated thread counts; default: what each case asks for")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time for the rounds of one case")
    parser.add_argument("--save", action="store_true", help="write benches/results/<processor>-<date>.json and .png")
    options = parser.parse_args()
    wanted = tuple(int(t) for t in options.threads.split(",")) if options.threads else None

    torch.set_num_threads(1)
    peak, copy = limits.fma_peak(), limits.copy_bandwidth()
    header = f"{processor()}, {hdrops._load.simd_level()}, " + ", ".join(f"{k} {v}" for k, v in versions().items())
    print(header)
    print(f"one core: copy {copy / 1e9:.1f} GB/s" + (f", multiply-add {peak / 1e9:.0f} GFLOP/s" if peak else ""))
    records = []
    for case in cases():
        if options.filter not in case.name:
            continue
        for threads in wanted or case.threads:
            result = run(case, threads, options.seconds)
            print("\n".join(describe(case, threads, result, peak, copy)), flush=True)
            records.append(
                {
                    "case": case.name,
                    "threads": threads,
                    "times": result,
                    "goals": case.goals,
                    "partners": case.partners,
                    "flops": case.flops,
                    "bytes": case.bytes,
                }
            )
    for record in records:
        single = next((r for r in records if r["case"] == record["case"] and r["threads"] == 1), None)
        if record["threads"] > 1 and single:
            gain = single["times"]["hdrops"]["median_ms"] / record["times"]["hdrops"]["median_ms"]
            record["scaling"] = gain
            print(f"scaling to {record['threads']} threads: {gain:.2f}x  {record['case']}")
    if options.save:
        stem = "-".join(processor().lower().replace("(r)", "").replace("(tm)", "").split()) + f"-{date.today()}"
        document = {
            "machine": processor(),
            "simd": hdrops._load.simd_level(),
            "versions": versions(),
            "date": str(date.today()),
            "copy_bytes_per_s": copy,
            "fma_flops_per_s": peak,
            "records": records,
        }
        path = RESULTS / f"{stem}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        plot(records, path.with_suffix(".png"), header)
        print(f"wrote {path.name} and {path.with_suffix('.png').name} in benches/results")


if __name__ == "__main__":
    main()
