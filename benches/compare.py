"""Compares two result files of `python -m benches --save`: `python -m benches.compare before.json after.json`.

Prints, for every case in both, the time of hdrops in each and their ratio, beside the ratio of the peers' times: where
those moved too, the machine did.
"""

import json
import sys
from pathlib import Path


def load(path: str) -> dict[tuple[str, int], dict]:
    document = json.loads(Path(path).read_text())
    return {(record["case"], record["threads"]): record["times"] for record in document["records"]}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__.splitlines()[0])
    before, after = load(sys.argv[1]), load(sys.argv[2])
    for key in before.keys() & after.keys():
        print(f"{key[0]}, {key[1]} threads")
        for name in before[key].keys() & after[key].keys():
            old, new = before[key][name]["median_ms"], after[key][name]["median_ms"]
            print(f"    {name:26s} {old:10.2f} -> {new:10.2f} ms  {old / new:6.2f}x")


if __name__ == "__main__":
    main()
