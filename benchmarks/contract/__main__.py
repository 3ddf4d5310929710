"""Checks the static performance contract; needs triton, and no GPU. Exits with 1 when something got worse.

python -m benchmarks.contract             compile, count, compare with what is recorded
python -m benchmarks.contract --show      and print all figures
python -m benchmarks.contract --accept    record the figures of the installed triton, and the counts
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.contract import check


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--accept", action="store_true", help="record the present figures, if no rule is broken")
    parser.add_argument("--show", action="store_true", help="print all figures")
    options = parser.parse_args(arguments)

    measured = check.measure()
    comparison = ["--comparison"] if options.accept or options.show else []
    counted = check.measure(*comparison, module="counts", environment=check.INTERPRET)
    path = check.record_path(measured["triton"])
    if options.show:
        print(check.table(measured), check.count_table(counted), sep="\n\n", end="\n\n")

    broken = check.broken_rules(measured) + check.broken_count_rules(counted)
    _say("Rules that no record can lift:", broken)
    if options.accept:
        if broken:
            print("Nothing was recorded.")
            return 1
        path.write_text(check.record(measured))
        check.COUNTS.write_text(check.count_record(counted))
        print(f"Recorded in {path.relative_to(check.ROOT)} and {check.COUNTS.relative_to(check.ROOT)}.")
        return 0

    worse, better = [], []
    for where, now, compare in ((path, measured, check.changes), (check.COUNTS, counted, check.count_changes)):
        recorded = check.load(where)
        if recorded is None:
            print(f"There is no {where.name}: only the rules were checked. To record it: {check.ACCEPT}")
            continue
        up, down = compare(recorded, now)
        worse, better = worse + up, better + down
    _say("Better than recorded:", better)
    _say("Worse than recorded:", worse)
    if worse:
        print(f"If that is justified: {check.ACCEPT}")
    if not broken and not worse:
        print(f"{len(measured['kernels'])} kernels and {len(counted['engine'])} rounds are within the contract.")
    return 1 if broken or worse else 0


def _say(title: str, lines: list[str]) -> None:
    if lines:
        print(title, *(f"  {line}" for line in lines), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
