#!/usr/bin/env python3
"""What the tests reach of qwen3next.h, by section: sums the gcov data of every program.

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


def line_counts(data_file):
    """{line: times run} of qwen3next.h in one program."""
    done = subprocess.run(["gcov", "--json-format", "--stdout", str(data_file)], check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=str(ROOT))
    counts = {}
    for text in done.stdout.decode("utf-8").splitlines():
        for source in json.loads(text)["files"]:
            if os.path.basename(source["file"]) == "qwen3next.h":
                for line in source["lines"]:
                    n = line["line_number"]
                    counts[n] = counts.get(n, 0) + line["count"]
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build_dir", type=pathlib.Path)
    parser.add_argument("--missed", action="store_true")
    args = parser.parse_args()
    data_files = sorted(args.build_dir.resolve().rglob("*.gcda"))
    total = {}
    for data_file in data_files:
        for n, count in line_counts(data_file).items():
            total[n] = total.get(n, 0) + count
    if not total:
        sys.exit("coverage.py: no data of qwen3next.h under %s" % args.build_dir)

    lines = (ROOT / "qwen3next.h").read_text(encoding="utf-8").split("\n")
    print("%-16s %7s %7s" % ("section", "lines", "reached"))
    for tag, first, last in lint.sections(lines):
        mine = [count for n, count in total.items() if first <= n <= last]
        if mine:
            print("%-16s %7d %6.1f%%" % (tag, len(mine), 100.0 * sum(map(bool, mine)) / len(mine)))
    reached = sum(map(bool, total.values()))
    print("%-16s %7d %6.1f%%" % ("all", len(total), 100.0 * reached / len(total)))
    if args.missed:
        for n in sorted(n for n, count in total.items() if not count):
            print("%5d: %s" % (n, lines[n - 1]))


if __name__ == "__main__":
    main()
