#!/usr/bin/env python3
"""tools/lint.py finds what it is there to find: every rule fails on a header with a fault of its
kind."""
import collections
import importlib.util
import pathlib
import re
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADER = "qwen3next.h"

spec = importlib.util.spec_from_file_location("lint", str(ROOT / "tools" / "lint.py"))
lint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lint)


class Faults(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.text = (ROOT / HEADER).read_text(encoding="utf-8")
        cls.known = collections.Counter(cls.problems(cls.text))

    @staticmethod
    def problems(text):
        """What lint says of a header of this text."""
        found = []
        lint.check_file(ROOT / HEADER, text.split("\n"),
                        lambda line, message: found.append(message))
        return found

    def new_problems(self, text):
        return list((collections.Counter(self.problems(text)) - self.known).elements())

    def expect(self, text, *words):
        found = self.new_problems(text)
        for word in words:
            self.assertTrue(any(word in message for message in found), (word, found[:5]))

    def change(self, pattern, new):
        """The header with the first match of pattern replaced."""
        text, n = re.subn(pattern, new, self.text, count=1, flags=re.M)
        self.assertEqual(n, 1, pattern)
        return text

    def after_banner(self, tag, code):
        """The header with code at the head of a section."""
        lines = self.text.split("\n")
        parts = lint.sections(lines)
        first = next(first for t, first, _ in parts if t == tag)
        end = next(i for i in range(first, len(lines)) if lines[i].endswith("*/"))
        return "\n".join(lines[:end + 1] + code.split("\n") + lines[end + 1:])

    def test_as_it_is(self):
        """So that what the others find is what they planted; the whole tree is lint's own suite."""
        self.assertEqual(self.known, collections.Counter())

    def test_budgets(self):
        long = "\n".join("int q3n__filler_%d;" % i for i in range(lint.MAX_SECTION_LINES))
        self.expect(self.after_banner("dispatch", long), "section dispatch has", "room kernels has")
        whole = "\n".join("int q3n__filler_%d;" % i for i in range(lint.MAX_LINES))
        self.expect(self.after_banner("dispatch", whole), "lines, at most %d" % lint.MAX_LINES)

    def test_section_without_a_room(self):
        text = self.text.replace(">>deltanet", ">>deltanets")
        self.expect(text, "section deltanets is in no room", "there is no section deltanet")

    def test_order_of_rooms(self):
        lines = self.text.split("\n")
        parts = lint.sections(lines)
        at = {tag: (first - 1, last) for tag, first, last in parts}
        types, dispatch = at["types"], at["dispatch"]
        moved = lines[types[0]:types[1]]
        text = "\n".join(lines[:types[0]] + lines[types[1]:dispatch[0]] + moved
                         + lines[dispatch[0]:])
        self.expect(text, "section types of room formats stands after room")

    def test_comments(self):
        bare = re.sub(r"^ *(/\*| \*).*\n", "", self.text[self.text.index("[3] PLATFORM"):],
                      flags=re.M)
        self.expect(self.text[:self.text.index("[3] PLATFORM")] + "\n */\n" + bare,
                    "of the implementation's lines are comments")
        chatter = "\n".join(["/* Says nothing. */"] * 900)
        text = self.text
        for tag in ("dispatch", "ops", "pass", "memory", "errors", "types", "attention"):
            lines = text.split("\n")
            first = next(f for t, f, _ in lint.sections(lines) if t == tag)
            end = next(i for i in range(first, len(lines)) if lines[i].endswith("*/"))
            text = "\n".join(lines[:end + 1] + chatter.split("\n") + lines[end + 1:])
        self.expect(text, "of the implementation's lines are comments")

    def test_knowledge(self):
        self.expect(self.after_banner("memory", "static int q3n__early(int x);"),
                    "q3n__early is declared before its body")
        self.expect(self.after_banner("attention", "static q3n__file *q3n__peek;"),
                    "q3n__file in section attention: room model must not know it")
        self.expect(self.after_banner("errors", "static q3n_session *q3n__peek;"),
                    "room ground must not know it")

    def test_words(self):
        for text, instead in (("/* the state beh" "ind a token */", "after"),
                              ("static int n_tr" "ail;", "pending"),
                              ("static int q3n__session_fe" "ed;", "prefill"),
                              ("static int mo" "st = 1;", "min, max"),
                              ("/* a name that st" "ands twice */", "appears"),
                              ("static q3n__r" "un *r;", "pass")):
            self.expect(self.after_banner("dispatch", text), "the field says " + instead)
        same = self.after_banner(
            "dispatch", "/* a feed-forward network, at most 4 of them, one left beh" "ind */")
        self.assertEqual(self.new_problems(same), [])

    def test_contents(self):
        self.expect(self.change(r"^ \*    \[\d+\] OPS .*\n", ""), "is not in the contents list")
        self.expect(self.change(r"^(.*)\[3\] PLATFORM(.*>>platform)$", r"\1[3] PLATFORMS\2"),
                    "no such banner")

    def test_functions(self):
        body = "static void q3n__long(void)\n{\n" + "    q3n__x();\n" * 100 + "}"
        wide = "static void q3n__wide(int a, int b, int c, int d, int e, int f, int g)\n{\n}"
        self.expect(self.after_banner("dispatch", "\n" + body + "\n\n" + wide),
                    "function of 102 lines", "7 parameters")
        torn = "static void q3n__torn(void)\n{\n#ifdef X\n#endif\n}\nstatic __m256 q3n__v;"
        self.expect(self.after_banner("memory", torn), "preprocessor condition inside a function",
                    "intrinsic outside")
        found = []
        lint.check_public_names("Q3N_DEF int q3n_nobody_" "calls(void);", ROOT,
                                lambda line, message: found.append(message))
        self.assertEqual(found, ["q3n_nobody_" "calls is in no test and no example"])

    def test_text(self):
        faults = "\n".join(["int x;" + " " * 95 + "/* */", "int x; ", "\tint x;", "/* TO" "DO */",
                            'static const char *q3n__p = "/ho' 'me/me";'])
        self.expect(self.after_banner("dispatch", faults), "columns", "trailing blank", "tab",
                    "'TO" "DO'", "'/ho" "me/'")


if __name__ == "__main__":
    unittest.main()
