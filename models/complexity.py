"""The complexity of the systems beside what their papers print: `python -m hdrops.models.complexity [NAME ...]`.

The rules of counting are in :mod:`hdrops.models.operations`.
"""

import argparse

from hdrops import models
from hdrops.models.operations import PaperRow as PaperRow


def _difference(found: float, printed: float | None) -> str:
    return "" if printed is None else f"{printed:10.4f} {100 * (found / printed - 1):+7.2f} %"


def table(name: str) -> list[str]:
    """The lines of one system: what is found beside what its paper prints."""
    system = models.system(name)
    lines = []
    for row in system.paper_rows:
        model = system.build(**row.config)
        report = model.complexity(*row.size, row.part)
        millions, giga = report.trained / 1e6, report.operations[row.rule] / 1e9
        lines.append(
            f"{name:8s} {row.label:34s} {millions:9.4f} {_difference(millions, row.parameters):21s} "
            f"{report.operations['fixed'] / 1e9:10.3f}  {row.rule:10s} {giga:10.3f} {_difference(giga, row.giga)}"
        )
    return lines


def main() -> None:
    """Prints the table of the systems named on the command line, or of all."""
    parser = argparse.ArgumentParser(prog="python -m hdrops.models.complexity", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"of {', '.join(models.names())}; default: all")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(models.names()))
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(models.names())}")
    titles = ("model", "line", "params/M", "paper", "", "fixed/G", "rule", "G", "paper")
    print("{:8s} {:34s} {:>9s} {:>10s} {:10s} {:>10s}  {:10s} {:>10s} {:>10s}".format(*titles))
    for name in arguments.names or models.names():
        print("\n".join(table(name)), flush=True)


if __name__ == "__main__":
    main()
