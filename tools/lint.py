#!/usr/bin/env python3
"""Check what a machine can check of the style of this project.

usage: lint.py [--object FILE.o] [--sections] [--root DIR]

The two headers: contents list and banners agree; rooms in their order, no section and no room over
its budget, none without one; a section uses only what stands before it (forward declarations
are the few that are listed here) and speaks of nothing that its room must not know; the share of
comments; function length and number of parameters; no preprocessor conditions inside functions of
the portable sections; intrinsics only in the kernel sections; every public function is named in
tests/ or examples/.  With --object (the implementation, compiled without -fPIC): external symbols
start with q3n_, static ones with q3n__, and there are no writable globals.  All source files:
columns, tabs, trailing blanks, words that mark unfinished work, words that the field does not
use, paths of one machine.  --sections lists rooms and sections, their lines and comments beside
their budgets."""
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

# The rooms of each header in their order: name, lines that it may have (little more than it has:
# who needs more says why where it is raised), its sections, and what no code of it may name.  A
# section may have MAX_SECTION_LINES.
ROOMS = (
    ("manual", 280, (), None),
    ("api", 1060, ("api", "api-chat"), None),
    ("ground", 2115, ("platform", "memory", "errors", "files", "parallel"),
     r"q3n_model\b|q3n_session|q3n__layer|q3n_config\b|Q3N_TYPE_"),
    ("formats", 3050, ("types", "tensors", "config", "model-files", "loader",
                       "state", "session-files"),
     r"q3n__engine|q3n__pass\b|q3n__pool\b"),
    # Constraints and generating are to come.  Chat templates take 3,900 lines: a third is what
    # filters, tests and methods mean in Python, a third the language, a third values and JSON.
    ("words", 5600, ("unicode", "vocabulary", "tokenizer", "values", "json", "filters", "lexer",
                     "template", "render", "chat"),
     r"q3n_session|q3n__engine|q3n__pass\b|q3n__layer|Q3N_TYPE_"),
    ("model", 1700, ("ops", "pass", "attention", "deltanet", "model"),
     r"q3n_session\b|q3n__engine|q3n__file|q3n__input|q3n__output|Q3N_TYPE_|Q3N_ISA_"),
    ("engine", 3950, ("cache", "engine", "sampler", "session", "mtp", "checkpoints", "evaluation",
                      "reuse", "speculation"),
     r"Q3N_ISA_(?!AUTO|SCALAR)|q3n__tokenizer"),
    ("public", 700, ("public",), None),
    ("kernels", 3400, ("kernels-scalar", "kernels-avx2", "kernels-avx512", "kernels-avx512vnni",
                       "kernels-neon", "dispatch"), r"q3n_session|q3n__engine|q3n__layer\b"),
)
MAKE_ROOMS = (
    ("manual", 150, (), None),
    ("api", 250, ("api",), None),
    ("making", 1700, ("geometry", "quantise", "writer", "random"), r"q3n_session|q3n__engine"),
)
# What users include: rooms, and the share of comments: of the lines of the implementation that are
# not blank, those that are nothing but one.
HEADERS = {"qwen3next.h": (ROOMS, (0.18, 0.24)), "tools/q3n_make.h": (MAKE_ROOMS, (0.08, 0.24))}
MAX_LINES = 21400

# Functions that are used before their bodies: why that cannot be otherwise.
FORWARD = {"q3n__expression": "expressions stand in brackets of expressions",
           "q3n__sampler_weight": "kernels close the file, the sampler asks for single numbers",
           "q3n__kernels_init": "kernels close the file, the engine asks for their table"}

# What nobody in the field says, and what we say instead: names and sentences of the library and
# of the programs.
OTHER_WORDS = ((r"\b(?<!left )(?<!leaves )behind\b", "after"),
               (r"(\b|_)trail(s|ed|ing)?(\b|_)", "pending"),
               (r"(\b|_)feeds?(\b|_)(?!-forward)", "prefill"),
               (r"(\b|_)settles?(\b|_)", "flush"), (r"(\b|_)speaks\b", "has_output"),
               (r"\b(?<!at )(least|most)\b(?= *(?:[-=<>+;,)\]]|\*/|$| and | or ))", "min, max"),
               (r"\b(stands?|stood) (once|twice)\b", "appears"),
               (r"\b(?:q3n__run(?!_value|_op)\w*|lazy runs?)\b", "pass"),
               (r"\bq3n__weight\b", "sampler_weight"))
ANY_OTHER = re.compile("behind|trail|feed|settle|speaks|least|most|stand|stood|run|weight")
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


def room_of(tag, rooms):
    return next((i for i, (_, _, tags, _) in enumerate(rooms) if tag in tags), None)


def check_rooms(lines, rooms, report, show):
    """Budgets of sections, rooms and the whole; every section in a room, rooms in their order."""
    last_room, parts = 0, sections(lines)
    for tag, first, last in parts:
        room, size = room_of(tag, rooms), last - first + 1
        if room is None:
            report(first, "section %s is in no room: see ROOMS in tools/lint.py" % tag)
            continue
        if room < last_room:
            report(first, "section %s of room %s stands after room %s"
                   % (tag, rooms[room][0], rooms[last_room][0]))
        last_room = max(room, last_room)
        if size > MAX_SECTION_LINES:
            report(first, "section %s has %d lines, at most %d" % (tag, size, MAX_SECTION_LINES))
    for name, budget, tags, _ in rooms:
        for tag in sorted(set(tags) - {tag for tag, _, _ in parts}):
            report(1, "room %s: there is no section %s" % (name, tag))
        own = [p for p in parts if p[0] in tags]
        size = sum(last - first + 1 for _, first, last in own)
        if not tags:
            size = parts[0][1] - 1 if parts else 0
        if show:
            print("%-19s %6d lines of %d" % (name, size, budget))
        for tag, first, last in own if show else ():
            print("    %-15s %6d lines, %4.1f %% comments"
                  % (tag, last - first + 1, 100 * comment_share(lines[first - 1:last])))
        if size > budget:
            report(own[0][1] if own else 1, "room %s has %d lines, at most %d"
                   % (name, size, budget))
    if len(lines) > MAX_LINES:
        report(1, "%d lines, at most %d" % (len(lines), MAX_LINES))


def comment_lines(lines):
    """For each line: 'blank', 'comment' (nothing but one) or 'code'."""
    kinds, inside = [], False
    for line in lines:
        text = line.strip()
        if not text:
            kinds.append("blank")
        elif inside or text.startswith("/*"):
            kinds.append("comment")
        else:
            kinds.append("code")
        opened = line.rfind("/*")
        inside = (inside or opened >= 0) and line.rfind("*/") <= max(opened, -1)
    return kinds


def comment_share(lines):
    kinds = comment_lines(lines)
    comments, code = kinds.count("comment"), kinds.count("code")
    return comments / (comments + code) if comments + code else 0.0


def check_comments(lines, wanted, report, show):
    first = next((first for tag, first, _ in sections(lines) if not tag.startswith("api")), None)
    share = comment_share(lines[first - 1:]) if first else 0.0
    low, high = wanted
    if show:
        print("implementation: %.1f %% comments, between %.0f and %.0f"
              % (100 * share, 100 * low, 100 * high))
    if not low <= share <= high:
        report(first or 1, "%.1f %% of the implementation's lines are comments: %.0f to %.0f wanted"
               % (100 * share, 100 * low, 100 * high))


def check_knowledge(lines, rooms, report):
    """Forward declarations are those of FORWARD; no room names what it must not know."""
    for n, line in enumerate(lines, 1):
        m = re.match(r"(?:static|Q3N__INLINE)\s[^;={]*?\b(q3n__\w+)\s*\([^{]*\)\s*;", line)
        if m and m.group(1) not in FORWARD:
            report(n, "%s is declared before its body: a section uses what stands before it"
                   % m.group(1))
    kinds = comment_lines(lines)
    for tag, first, last in sections(lines):
        room = room_of(tag, rooms)
        unknown = room is not None and rooms[room][3]
        for n in range(first, last + 1) if unknown else ():
            text = re.sub(r'"(\\.|[^"\\])*"', '""', lines[n - 1].split("/*")[0])
            m = kinds[n - 1] == "code" and re.search(unknown, text)
            if m:
                report(n, "%s in section %s: room %s must not know it"
                       % (m.group(0), tag, rooms[room][0]))


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
        if path.suffix in (".h", ".c") and path.parent.name != "tests":
            for pattern, instead in OTHER_WORDS if ANY_OTHER.search(line) else ():
                m = re.search(pattern, line)
                if m:
                    report(n, "'%s': the field says %s" % (m.group(0), instead))


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


def check_file(path, lines, report, show=False):
    """What one file can say alone; returns the number of its functions."""
    check_text(path, lines, report)
    rooms, comments = next((row for name, row in HEADERS.items() if path.match(name)), (None, None))
    if rooms:
        check_contents(lines, report)
        check_portability(lines, sections(lines), report)
        check_rooms(lines, rooms, report, show)
        check_knowledge(lines, rooms, report)
        check_comments(lines, comments, report, show)
    return check_functions(lines, report) if path.suffix in (".h", ".c") else 0


def check_tree(root, obj=None, show=False):
    """Check all sources under root: the problems as lines of text, and a line that sums up."""
    problems, n_functions, n_public, n_sections = [], 0, 0, 0
    files = sorted({p for pattern in SOURCES for p in root.glob(pattern)})
    for path in files:
        name = path.relative_to(root)
        lines = path.read_text(encoding="utf-8").split("\n")

        def report(line, message, name=name):
            problems.append("%s:%d: %s" % (name, line, message))

        n_functions += check_file(path, lines, report, show)
        if str(name) in HEADERS:
            n_sections += len(sections(lines))
            n_public += check_public_names("\n".join(lines), root, report)
    if obj:
        check_symbols(obj, lambda line, message: problems.append("%s: %s" % (obj, message)))
    return problems, ("lint: %d files, %d functions, %d of them public, %d sections: %s"
                      % (len(files), n_functions, n_public, n_sections,
                         "%d problems" % len(problems) if problems else "clean"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--object", help="object file of the implementation")
    parser.add_argument("--sections", action="store_true",
                        help="list rooms, sections, their lines and comments")
    parser.add_argument("--root", default=pathlib.Path(__file__).resolve().parent.parent,
                        type=pathlib.Path)
    args = parser.parse_args()
    problems, summary = check_tree(args.root, args.object, args.sections)
    print("\n".join(problems + [summary]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
