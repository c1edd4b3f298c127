"""Writes a result file as the table of README.md: `python -m benches.table benches/results/NAME.json`.

The text between the two markers in README.md is replaced; everything in it comes from the file.
"""

import json
import os
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def rows(document: dict) -> list[str]:
    lines = ["| case | hdrops | peer | ratio | goal |", "|---|---|---|---|---|"]
    for record in document["records"]:
        if record["threads"] != 1:
            continue
        peers = {k: v["median_ms"] for k, v in record["times"].items() if not k.startswith("hdrops")}
        for peer, theirs in peers.items() or {"": None}.items():
            goal = record["goals"].get(peer)
            partner = record["partners"].get(peer, "hdrops")
            ours = record["times"][partner]["median_ms"]
            ratio = f"{theirs / ours:.2g}x" if theirs else ""
            told = f"{peer} {milliseconds(theirs)}" if theirs else ""
            name = record["case"] + partner.removeprefix("hdrops")
            reach = f"{goal:.2g}x" if goal else ""
            lines.append(f"| {name} | {milliseconds(ours)} | {told} | {ratio} | {reach} |")
    return lines


def scaling(document: dict) -> str:
    told = [f"{r['case']} {r['scaling']:.2f}x" for r in document["records"] if "scaling" in r]
    return "Two threads against one: " + "; ".join(told) + "." if told else ""


def text(path: Path) -> str:
    document = json.loads(path.read_text())
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items())
    copy, peak = document["copy_bytes_per_s"] / 1e9, document["fma_flops_per_s"] / 1e9
    head = (
        f"One thread of {document['machine']} ({document['simd']}), {document['date']}; {versions}. Median process "
        f"time, contenders interleaved in one process by `make bench`; one core copies {copy:.0f} GB/s and does "
        f"{peak:.0f} GFLOP/s of multiply-adds. Ratio: peer time / hdrops time."
    )
    picture = f"![ratios](benches/results/{path.stem}.png)"
    return "\n".join([BEGIN, head, "", *rows(document), "", scaling(document), "", picture, END])


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    readme = README.read_text()
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    temporary = README.with_suffix(".new")
    temporary.write_text(before + text(Path(sys.argv[1])) + after)
    os.replace(temporary, README)


if __name__ == "__main__":
    main()
