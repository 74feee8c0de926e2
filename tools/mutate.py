#!/usr/bin/env python3
"""Which faults would the tests not notice?  Plants one at a time in a section of the headers.

usage: mutate.py TAG SUITE... [--cc CC] [--build DIR] [--function NAME] [--list]

All mutants of the section are compiled into one object, each chosen by Q3N_MUTANT=number: a
comparison or sum turned round, a number one higher, a condition always or never met, a value 0, a
call left out.  The suites (parallel: tests/test_parallel.c) run with each; a mutant that all of
them pass is printed with its line: either a test is missing, or the line makes no difference that
can be seen.  Needs what the suites read: make models."""
import argparse
import os
import pathlib
import re
import subprocess
import sys
import time

import lint

ROOT = pathlib.Path(__file__).resolve().parent.parent
SWAPS = {"<": ("<=", ">"), "<=": ("<",), ">": (">=", "<"), ">=": (">",), "==": ("!=",),
         "!=": ("==",), "&&": ("||",), "||": ("&&",), "+": ("-",), "-": ("+",), "%": ("/",)}
OPERATOR = re.compile(r"(?<= )(<=|>=|==|!=|&&|\|\||<|>|\+|-|%)(?= )")
NUMBER = re.compile(r"(?<![\w.\"'])\d+(?![\w.\"'])")
CONDITION = re.compile(r"^(\s*(?:\} )?(?:else )?(?:if|while) \()(.*)$")
LOOP = re.compile(r"^(\s*for \([^;]*; )([^;]+)(;.*)$")
VALUE = re.compile(r"^(\s+(?:return |[^=(]*[^=!<>(] = ))([^={][^;{]*)(;.*)$")
CALL = re.compile(r"^\s+(?:\(void\))?[a-z_]\w*\(.*\);\s*(/\*.*)?$")
# After qwen3next.h, if that is mutated.
MAKE = '\n#include "q3n_make.h"\n'
MAIN = """
#include <stdlib.h>
int q3n__mutant;
__attribute__((constructor)) static void q3n__choose_mutant(void)
{
    const char *number = getenv("Q3N_MUTANT");
    if (number) q3n__mutant = atoi(number);
}
"""


def closing(text):
    """Where the bracket that is open at the start of text closes; None if on another line."""
    depth = 1
    for i, ch in enumerate(text):
        depth += (ch == "(") - (ch == ")")
        if depth == 0:
            return i
    return None


def span(line):
    """(before, expression, after) of a line's condition or value, and whether it is a condition."""
    m = CONDITION.match(line)
    if m:
        end = closing(m.group(2))
        return (m.group(1), m.group(2)[:end], m.group(2)[end:], True) if end else None
    m = LOOP.match(line)
    if m:
        return m.groups() + (True,)
    m = VALUE.match(line)
    if m and not re.match(r"\s*(static|typedef)\b", line) and closing(m.group(2) + ")") is not None:
        return m.groups() + (False,)
    return None


def variants(expression, is_condition):
    for m in OPERATOR.finditer(expression):
        for other in SWAPS[m.group(1)]:
            yield expression[:m.start()] + other + expression[m.end():]
    for m in NUMBER.finditer(expression):
        yield expression[:m.start()] + str(int(m.group()) + 1) + expression[m.end():]
    for constant in ("0", "1") if is_condition else ("0",):
        if expression.strip() not in (constant, "Q3N_OK"):
            yield constant


def plant(lines, places, skip):
    """The lines with every mutant, and [(line number, what stands there instead)]."""
    out, mutants = list(lines), []
    for n in places:
        line = lines[n]
        found = span(line)
        if n in skip or line.endswith("\\") or "q3n__fail(" in line:
            continue
        if found:
            before, expression, after, is_condition = found
            text = "(%s)" % expression
            for variant in variants(expression, is_condition):
                mutants.append((n, (before + variant + after).strip()))
                text = "(q3n__mutant == %d ? (%s) : %s)" % (len(mutants), variant, text)
            out[n] = before + text + after
        elif CALL.match(line):
            mutants.append((n, "/* left out */"))
            out[n] = "if (q3n__mutant != %d) %s" % (len(mutants), line)
    return out, mutants


def compile_mutants(args, name, lines, places):
    """Lines on which some mutant does not compile keep what they say."""
    source, skip = args.build / "mutants.c", set()
    rest = MAKE if name == "qwen3next.h" else ""
    while True:
        out, mutants = plant(lines, places, skip)
        source.write_text("extern int q3n__mutant;\n" + "\n".join(out) + rest + MAIN,
                          encoding="utf-8")
        done = subprocess.run(
            [args.cc, "-std=gnu11", "-O1", "-w", "-ffp-contract=off", "-DQ3N_IMPLEMENTATION",
             "-DQ3N_MAKE_IMPLEMENTATION", "-I", str(args.build / "obj/bodies"), "-c", str(source),
             "-o", str(args.build / "mutants.o")], stderr=subprocess.PIPE, check=False,
            universal_newlines=True)
        error = r"\b%s:(\d+):\d+: error" % re.escape(name)
        bad = {int(n) - 1 for n in re.findall(error, done.stderr)}
        if not done.returncode:
            return mutants
        if not bad - skip:
            sys.exit(done.stderr)
        skip |= bad


def link(args, suite):
    program = args.build / ("mutants_" + suite)
    subprocess.run([args.cc, "-std=c11", "-O1", "-w", "-I", str(args.build / "obj/names"),
                    str(ROOT / ("tests/test_%s.c" % suite)), str(args.build / "mutants.o"),
                    "-lcmocka", "-lm", "-lpthread", "-o", str(program)], check=True)
    return program


def passes(program, number, limit):
    """A mutant that waits for ever is noticed too."""
    try:
        return subprocess.run([str(program)], env=dict(os.environ, Q3N_MUTANT=str(number)),
                              cwd=str(ROOT), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=limit, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tag")
    parser.add_argument("suite", nargs="+")
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--function", default="", help="a regular expression: only these")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    args = parser.parse_args()

    for path in lint.HEADERS:
        header = (ROOT / path).read_text(encoding="utf-8").split("\n")
        parts = [(a, b) for tag, a, b in lint.sections(header) if tag == args.tag]
        if parts:
            break
    else:
        sys.exit("mutate.py: no section >>%s" % args.tag)
    first, last = parts[0]
    name = os.path.basename(path)
    lines = (args.build / "obj/bodies" / name).read_text(encoding="utf-8").split("\n")
    lines[0] += "\n"                                    # the #line directive stands before line 1
    lines[:2] = [lines[0] + lines[1]]
    places = [n for f in lint.functions(header) if first <= f.first <= last
              and re.search(args.function, f.head) for n in range(f.first - 1, f.last)]
    mutants = compile_mutants(args, name, lines, places)
    if args.list:
        for i, (n, text) in enumerate(mutants, 1):
            print("%4d  %d: %s\n      %s" % (i, n + 1, header[n].strip(), text))
        return
    programs = []
    for suite in args.suite:
        program, start = link(args, suite), time.monotonic()
        if not passes(program, 0, None):
            sys.exit("test_%s fails without any mutant" % suite)
        programs.append((program, 20 * (time.monotonic() - start) + 20))
    survived = 0
    for i, (n, text) in enumerate(mutants, 1):
        if all(passes(program, i, limit) for program, limit in programs):
            survived += 1
            print("%d: %s\n    %s" % (n + 1, header[n].strip(), text), flush=True)
    print("%d of %d mutants survived" % (survived, len(mutants)))


if __name__ == "__main__":
    main()
