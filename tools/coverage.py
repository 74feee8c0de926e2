#!/usr/bin/env python3
"""What the tests reach of the two headers, by section: sums the gcov data of every program.

usage: coverage.py BUILD_DIR [--missed]

Tests share one object, programs have their own: a line counts as reached if any reached it.
--missed lists the lines that none did."""
import argparse
import json
import os
import pathlib
import subprocess
import sys

import lint

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = [os.path.basename(header) for header in lint.HEADERS]


def line_counts(data_file):
    """{(header's name, line): times run} in one program."""
    done = subprocess.run(["gcov", "--json-format", "--stdout", str(data_file)], check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=str(ROOT))
    counts = {}
    for text in done.stdout.decode("utf-8").splitlines():
        for source in json.loads(text)["files"]:
            name = os.path.basename(source["file"])
            for line in source["lines"] if name in NAMES else ():
                place = name, line["line_number"]
                counts[place] = counts.get(place, 0) + line["count"]
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build_dir", type=pathlib.Path)
    parser.add_argument("--missed", action="store_true")
    args = parser.parse_args()
    data_files = sorted(args.build_dir.resolve().rglob("*.gcda"))
    total = {}
    for data_file in data_files:
        for place, count in line_counts(data_file).items():
            total[place] = total.get(place, 0) + count
    if not total:
        sys.exit("coverage.py: no data of the headers under %s" % args.build_dir)

    lines = {name: (ROOT / header).read_text(encoding="utf-8").split("\n")
             for name, header in zip(NAMES, lint.HEADERS)}
    print("%-16s %7s %7s" % ("section", "lines", "reached"))
    for name in NAMES:
        for tag, first, last in lint.sections(lines[name]):
            mine = [count for (where, n), count in total.items()
                    if where == name and first <= n <= last]
            if mine:
                print("%-16s %7d %6.1f%%"
                      % (tag, len(mine), 100.0 * sum(map(bool, mine)) / len(mine)))
    reached = sum(map(bool, total.values()))
    print("%-16s %7d %6.1f%%" % ("all", len(total), 100.0 * reached / len(total)))
    if args.missed:
        for name, n in sorted(place for place, count in total.items() if not count):
            print("%s:%5d: %s" % (name, n, lines[name][n - 1]))


if __name__ == "__main__":
    main()
