#!/usr/bin/env python3
"""Check what a machine can check of the style of this project.

usage: lint.py [--object FILE.o] [--sections] [--root DIR]

The two headers: contents list and banners agree; function length and number of parameters; no
preprocessor conditions inside functions of the portable sections; intrinsics only in the
kernel sections; every public function is named in tests/ or examples/.  With --object (the
implementation, compiled without -fPIC): external symbols start with q3n_, static ones with
q3n__, and there are no writable globals.  All source files: columns, tabs, trailing blanks,
words that mark unfinished work, paths of one machine.  --sections lists each section's lines
beside its budget."""
import argparse
import pathlib
import re
import subprocess
import sys

# Seven operands, as tokenize functions have everywhere: text, length, flags, ids, room, count.
CONVENTIONAL = re.compile(r"\bq3n_tokenize\(")
MAX_COLUMNS, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_SECTION_LINES = 100, 100, 6, 1000

BANNED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK|for n" r"ow|tempor" r"ary"
                    r"|obvi" r"ously|simp" r"ly)\b", re.I)
MACHINE_PATH = re.compile(r"(?<![\w.}])/(wo" r"rk|ho" r"me|ro" r"ot|fa" r"rm)/")
INTRINSIC = re.compile(r"\b(_mm\d*_|__m(128|256|512)|vld1|vst1|float32x4_t)")
CONDITION = re.compile(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif)\b")
TAG_LINE = re.compile(r" \*\s+(?:(\[\d+\])\s+|-\s+)?(\S.*?)\s+>>([\w-]+)\s*$")
PUBLIC = re.compile(r"^Q3N_DEF\s[^;{]*?\b(q3n_[a-z0-9]\w*)\s*\(", re.M)
HEAD = re.compile(r"^(?:static|extern|Q3N_DEF|Q3N__\w+|[A-Za-z_]\w*[\s*]).*\(")

# Lines that a section may have; a section without a row here may have MAX_SECTION_LINES.
BUDGETS = {"api": 700, "platform": 350, "memory": 200, "errors": 120, "parallel": 250, "types": 500,
           "config": 500, "loader": 650, "tokenizer": 650, "ops": 400, "model": 900, "session": 450,
           "sampler": 450, "speculate": 300, "public": 300, "kernels-scalar": 400,
           "kernels-avx2": 600, "kernels-avx512": 600, "kernels-neon": 550, "dispatch": 100}
MAKE_BUDGETS = {"api": 150, "geometry": 300, "quantise": 400, "writer": 700, "random": 400}
# What users include: sections, functions and names of these are checked.
HEADERS = {"qwen3next.h": BUDGETS, "tools/q3n_make.h": MAKE_BUDGETS}
KERNELS_SIMD = ("kernels-avx2", "kernels-avx512", "kernels-avx512vnni", "kernels-neon")
# Where a condition inside a function is the section's job.
CONDITIONAL = ("platform", None) + KERNELS_SIMD

SOURCES = ("qwen3next.h", "Makefile", ".ci/run", "examples/**/*.c", "examples/**/*.cpp",
           "examples/**/*.h", "examples/**/*.py", "tests/*.[ch]", "tests/*.py",
           "tests/*.sh", "tests/*.awk", "tools/*.h", "tools/*.py", "tools/*.sh", "tools/*.in",
           "tools/*.map", "tools/cmake/*")


class Function:
    """A function with a body: lines first .. last (1-based) of the file, from brace to brace."""

    def __init__(self, head, first, last):
        self.head, self.first, self.last = head, first, last

    def parameters(self):
        """How many; None if the text is no function, such as an initialiser."""
        m = re.search(r"\b[A-Za-z_]\w*\s*(\(.*)", self.head)
        if not m:
            return None
        depth, count = 0, 0
        for i, ch in enumerate(m.group(1)):
            depth += (ch == "(") - (ch == ")")
            count += ch == "," and depth == 1
            if depth == 0:
                inner = m.group(1)[1:i].strip()
                return 0 if inner in ("", "void") else count + 1
        return None


def functions(lines):
    """Every function of a C file: its braces stand in column 0, or all is on one line."""
    i = 0
    while i < len(lines):
        line = lines[i]
        if line == "{":
            end = next((j for j in range(i, len(lines)) if lines[j] == "}"), len(lines) - 1)
            start = i
            while start > 0 and lines[start - 1].strip() and "*/" not in lines[start - 1] \
                    and not lines[start - 1].startswith(("#", "}")) \
                    and not lines[start - 1].rstrip().endswith((";", "\\")):
                start -= 1
            head = " ".join(lines[start:i])
            if "(" not in head:                 # a comment ends on the line of the name
                head = " ".join(l.split("*/")[-1] for l in lines[max(start - 1, 0):i])
            yield Function(re.sub(r"/\*.*?\*/", "", head), i + 1, end + 1)
            i = end
        elif HEAD.match(line) and re.search(r"\)\s*\{.*\}\s*(/\*.*\*/)?$", line):
            yield Function(line.split("{")[0], i + 1, i + 1)
        i += 1


def tag_lines(lines):
    """(number, title, tag, line) of every contents entry and banner, in the file's order."""
    for n, line in enumerate(lines, 1):
        m = TAG_LINE.match(line)
        if m:
            title = re.sub(r"\s+", " ", m.group(2))
            yield m.group(1) or "-", title, m.group(3), n


def split_contents(lines):
    """Contents entries and banners: a banner stands below a rule of equals signs."""
    contents, banners = [], []
    for entry in tag_lines(lines):
        (banners if "=" * 40 in lines[entry[3] - 2] else contents).append(entry)
    return contents, banners


def check_contents(lines, report):
    contents, banners = split_contents(lines)
    if not contents:
        report(1, "no contents list")
    want, have = [c[:3] for c in contents], [b[:3] for b in banners]
    for entry in want:
        if entry not in have:
            report(1, "contents name %s %s >>%s: no such banner" % entry)
    for entry, line in zip(have, (b[3] for b in banners)):
        if entry not in want:
            report(line, "banner %s %s >>%s is not in the contents list" % entry)
    if sorted(want) == sorted(have) and want != have:
        report(1, "the contents list has another order than the file")


def sections(lines):
    """(tag, first line, last line) of every section."""
    _, banners = split_contents(lines)
    starts = [(tag, n - 1) for _, _, tag, n in banners]
    ends = [first - 1 for _, first in starts[1:]] + [len(lines)]
    return [(tag, first, last) for (tag, first), last in zip(starts, ends)]


def section_of(parts, line):
    return next((tag for tag, first, last in parts if first <= line <= last), None)


def check_functions(lines, report):
    count = 0
    for f in functions(lines):
        n_parameters = f.parameters()
        if n_parameters is None:
            continue
        count += 1
        if f.last - f.first + 1 > MAX_FUNCTION_LINES:
            report(f.first, "function of %d lines" % (f.last - f.first + 1))
        if n_parameters > MAX_PARAMETERS and not CONVENTIONAL.search(f.head):
            report(f.first, "%d parameters" % n_parameters)
    return count


def check_portability(lines, parts, report):
    for f in functions(lines):
        if section_of(parts, f.first) in CONDITIONAL:
            continue
        for n in range(f.first, f.last + 1):
            if CONDITION.match(lines[n - 1]):
                report(n, "preprocessor condition inside a function")
    for n, line in enumerate(lines, 1):
        if INTRINSIC.search(line) and section_of(parts, n) not in KERNELS_SIMD:
            report(n, "intrinsic outside the kernel sections")


def check_budgets(parts, budgets, report, show):
    for tag, first, last in parts:
        size, budget = last - first + 1, budgets.get(tag, MAX_SECTION_LINES)
        if show:
            print("%-16s %5d lines, budget %5d%s" % (tag, size, budget, "  over" * (size > budget)))
        if size > MAX_SECTION_LINES:
            report(first, "section %s has %d lines, at most %d" % (tag, size, MAX_SECTION_LINES))


def check_public_names(text, root, report):
    """Every function of the API must be used by a test or an example."""
    names = sorted(set(PUBLIC.findall(text)))
    users = ""
    for pattern in ("tests/*.[ch]", "tests/*.py", "examples/**/*.c", "examples/**/*.cpp",
                    "examples/**/*.py"):
        users += "".join(p.read_text(encoding="utf-8") for p in sorted(root.glob(pattern)))
    for name in names:
        if not re.search(r"\b%s\b" % name, users):
            report(1, "%s is in no test and no example" % name)
    return len(names)


def check_text(path, lines, report):
    for n, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            report(n, "%d columns" % len(line))
        if line != line.rstrip():
            report(n, "trailing blank")
        if "\t" in line and path.name != "Makefile":
            report(n, "tab")
        m = BANNED.search(line) or MACHINE_PATH.search(line)
        if m:
            report(n, "'%s'" % m.group(0))


def check_symbols(path, report):
    out = subprocess.run(["nm", path], stdout=subprocess.PIPE, check=True, universal_newlines=True)
    for line in out.stdout.splitlines():
        fields = line.split()
        if len(fields) != 3:
            continue
        kind, name = fields[1], fields[2]
        if name.startswith((".", "__")):
            continue
        if kind.isupper() and kind not in "UWV" and not re.match(r"q3n_(?!_)", name):
            report(0, "external symbol %s" % name)
        # Constants inside a function are called name.N.
        local = kind == "r" and re.search(r"\.\d+$", name)
        if kind.islower() and kind not in "wv" and not local and not name.startswith("q3n__"):
            report(0, "static symbol %s" % name)
        if kind in "dDbBcC":
            report(0, "writable global %s" % name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--object", help="object file of the implementation")
    parser.add_argument("--sections", action="store_true", help="list sections and budgets")
    parser.add_argument("--root", default=pathlib.Path(__file__).resolve().parent.parent,
                        type=pathlib.Path)
    args = parser.parse_args()

    problems, n_functions, n_public, n_sections = [], 0, 0, 0
    files = sorted({p for pattern in SOURCES for p in args.root.glob(pattern)})
    for path in files:
        name = path.relative_to(args.root)
        lines = path.read_text(encoding="utf-8").split("\n")

        def report(line, message, name=name):
            problems.append("%s:%d: %s" % (name, line, message))

        check_text(path, lines, report)
        if path.suffix in (".h", ".c"):
            n_functions += check_functions(lines, report)
        if str(name) in HEADERS:
            parts = sections(lines)
            check_contents(lines, report)
            check_portability(lines, parts, report)
            check_budgets(parts, HEADERS[str(name)], report, args.sections)
            n_public += check_public_names("\n".join(lines), args.root, report)
            n_sections += len(parts)
    if args.object:
        check_symbols(args.object, lambda line, message: problems.append(
            "%s: %s" % (args.object, message)))
    for problem in problems:
        print(problem)
    print("lint: %d files, %d functions, %d of them public, %d sections: %s"
          % (len(files), n_functions, n_public, n_sections,
             "%d problems" % len(problems) if problems else "clean"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
