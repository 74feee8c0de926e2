#!/usr/bin/env python3
"""What including the implementation costs: CPU seconds and peak memory of the compiler, and the
size of the object, as it is and with each macro that leaves something out.

usage: compile_cost.py [--cc CC] [--flags FLAGS] [HEADER]

The figures of the compiler depend on the machine: compare two headers in one run each, by turns."""
import argparse
import os
import pathlib
import re
import shlex
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def variants(header):
    """Nothing, and each macro of the header that leaves something out."""
    text = pathlib.Path(header).read_text(encoding="utf-8")
    return ["", *sorted(set(re.findall(r"\bQ3N_NO_[A-Z0-9]+\b", text)))]


def measure(command, out):
    """(CPU seconds, peak megabytes, kilobytes of code and constants) of one compilation."""
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, used = os.wait4(child, 0)
    if status != 0:
        raise SystemExit("compile_cost.py: failed: %s" % shlex.join(command))
    sizes = subprocess.run(["size", out], stdout=subprocess.PIPE, check=True,
                           universal_newlines=True).stdout.split("\n")[1].split()
    kilobytes = (int(sizes[0]) + int(sizes[1])) / 1000
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, kilobytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("header", nargs="?", default=str(ROOT / "qwen3next.h"))
    parser.add_argument("--cc", default=os.environ.get("CC", "cc"))
    parser.add_argument("--flags", default="-std=c11 -O2 -ffp-contract=off")
    args = parser.parse_args()
    print("%-16s %8s %9s %8s" % ("left out", "CPU s", "peak MB", "KB"))
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "qwen3next.o")
        for macro in variants(args.header):
            command = shlex.split(args.cc) + shlex.split(args.flags) + ["-DQ3N_IMPLEMENTATION"]
            command += ["-D" + macro] if macro else []
            print("%-16s %8.1f %9.0f %8.0f" % ((macro or "nothing",) + measure(
                command + ["-x", "c", "-c", args.header, "-o", out], out)), flush=True)


if __name__ == "__main__":
    main()
