#!/usr/bin/env python3
"""The command line q3n: exit codes, output formats, and every golden case through it.

Environment: Q3N is the command (build/q3n; it may have words before it, such as an emulator),
Q3N_MODELS the folder with the converted golden checkpoints (build/models).
"""
import array
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree
import zlib

try:
    import fcntl
    import pty
    import termios
except ImportError:             # no POSIX system: what needs them is skipped
    pass

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
GOLDEN = os.path.join(TESTS, "golden")
STORIES = os.path.join(ROOT, "examples", "stories", "golden.json")
COMMAND = shlex.split(os.environ.get("Q3N", os.path.join(ROOT, "build", "q3n")))
MODELS = os.environ.get("Q3N_MODELS", os.path.join(ROOT, "build", "models"))

FAMILIES = ["qwen3_next", "qwen3_next_mtp", "qwen3_next_mixed", "qwen3_next_fp8", "qwen3_moe",
            "qwen3_moe_nonorm", "qwen3_dense", "qwen3_dense_yarn", "qwen3_5", "qwen3_5_moe",
            "qwen3_5_moe_vl"]
# Ways to evaluate a text: one call, token by token, uneven pieces across chunk borders.
WAYS = [[], ["--pieces", "1"], ["--pieces", "7,64,1,30"]]

LOGIT_ERROR = 5e-5          # of the largest absolute logit
LOGPROB_ERROR = 1e-3


def model(name):
    return os.path.join(MODELS, name + ".q3n")


def load(*parts):
    with open(os.path.join(*parts), encoding="utf-8") as f:
        return json.load(f)


def id_list(ids):
    return ",".join(map(str, ids))


class CliTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def file(self, name, content):
        path = os.path.join(self.folder, name)
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    def run_cli(self, *args, stdin=b"", status=0, quiet=True):
        """stdout; checks the exit status and that errors are one line.  self.notes is stderr."""
        done = subprocess.run(COMMAND + list(args), input=stdin, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        shown = done.stderr[-2000:].decode("utf-8", "replace")
        self.notes = shown
        self.assertEqual(done.returncode, status, "%s: %s" % (args, shown))
        if status:
            lines = shown.splitlines()
            self.assertTrue(lines[-1].startswith("q3n: error: "), shown)
            errors = [line for line in lines if line.startswith("q3n: error: ")]
            self.assertEqual(len(errors), 1, shown)
            self.error = lines[-1]
        elif quiet:
            self.assertNotIn("error", shown)
        return done.stdout

    def json_lines(self, *args, **kwargs):
        def refuse(word):
            raise AssertionError("%s is no JSON" % word)
        text = self.run_cli(*args, **kwargs).decode("utf-8")
        return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]

    def isas(self):
        return self.json_lines("info", model("qwen3_dense"), "--json")[0]["isas"]

    def check_reals(self, got, want, bound, what):
        self.assertEqual(len(got), len(want), what)
        if want:
            error = max(abs(a - b) for a, b in zip(got, want))
            self.assertLessEqual(error, bound, what)


class UsageTest(CliTest):
    def test_help(self):
        text = self.run_cli("--help").decode()
        commands = ["run", "info", "logits", "tokenize", "detokenize", "render", "classify",
                    "perplexity", "experts", "init", "bench", "verify"]
        for name in commands:
            self.assertIn("\n  %s " % name, text)
            self.assertIn("Usage: q3n %s" % name, self.run_cli(name, "--help").decode())
            self.assertIn("Usage: q3n %s" % name, self.run_cli("help", name).decode())

    def test_version(self):
        self.assertRegex(self.run_cli("--version").decode(), r"^q3n \d+\.\d+\.\d+\n$")

    def test_no_command(self):
        done = subprocess.run(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        self.assertEqual((done.returncode, done.stdout), (2, b""))
        self.assertIn(b"Usage", done.stderr)

    def test_logits_without_numbers(self):
        """A NaN in the last norm makes every logit NaN: nothing is written, and it says why."""
        with open(model("qwen3_dense"), "rb") as f:
            data = bytearray(f.read())
        n_sections, = struct.unpack_from("<I", data, 12)
        sections = [struct.unpack_from("<IIQQQ", data, 64 + 32 * i) for i in range(n_sections)]
        offset = {kind: at for kind, _, at, _, _ in sections}
        for i in range(struct.unpack_from("<I", data, offset[2])[0]):
            record = offset[2] + 8 + 80 * i
            name, n_bytes = struct.unpack_from("<II", data, record)
            if data[offset[3] + name:][:n_bytes] == b"norm.weight":
                struct.pack_into("<f", data, *struct.unpack_from("<Q", data, record + 40),
                                 math.nan)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "nan.q3n")
            with open(path, "wb") as f:
                f.write(data)
            for how in ["--greedy"], ["--seed", "1"], ["--top-k", "0", "--top-p", "1"]:
                done = subprocess.run(COMMAND + ["run", path, "--ids", "1,2,3", "-n", "8"] + how,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
                self.assertEqual(done.returncode, 1, done.stderr)
                self.assertEqual(done.stdout.strip(), b"")
                for word in path.encode(), b"NaN", b"verify":
                    self.assertIn(word, done.stderr)

    def test_wrong_usage_is_status_2(self):
        m = model("qwen3_dense")
        for args in [
                ["bogus"], ["run"], ["run", m], ["run", m, "--ids", "1", "--bogus"],
                ["run", m, "--ids", "1", "-n"], ["run", m, "--ids", "1", "-n", "many"],
                ["run", m, "--ids", "1", "-n", "1e9"], ["run", m, "--ids", "1", "-n", "-2"],
                ["run", m, "--ids", "1", "-n", "99999999999999999999"],
                ["run", m, "--ids", "1", "--temp", "nan"], ["run", m, "--ids", "1", "--temp", ""],
                ["run", m, "--ids", "1", "--top-p", "1.5"],
                ["run", m, "--ids", "1", "--top-p", "0"],
                ["run", m, "--ids", "1", "-t", "-1"],
                ["run", m, "--ids", "1", "--seed", "-1"], ["run", m, "--ids", "1", "-p", "x"],
                ["run", m, "--ids", "1", "--isa", "mmx"], ["run", m, "--ids", "1", "--kv", "q1"],
                ["run", m, "--ids", "1", "--greedy=yes"], ["run", m, "extra", "--ids", "1"],
                ["run", m, "--ids", "1", "--speculate", "maybe"],
                ["run", m, "--ids", "1", "--draft", "9"],
                ["run", m, "--ids", "1", "--snapshot-type", "q8"],
                ["run", m, "--ids", "1", "--append"], ["run", m, "--ids", "1", "--cache-size", "0"],
                ["logits", m, "--ids", "1", "--pieces", "0"],
                ["logits", m, "--ids", "1", "--pieces", ","],
                ["perplexity", m, "--ids", "1,2", "--window", "1"],
                ["init"], ["init", "x.q3n"], ["init", "x.q3n", "--preset", "bogus"],
                ["init", "x.q3n", "--preset", "tiny", "--bogus", "1"],
                ["init", "x.q3n", "--preset", "tiny", "--type", "q99"],
                ["bench", m, "-t", "0"], ["bench", m, "-p", "x"], ["bench", m, "--layers", "2"],
                ["bench", m, "--preset", "tiny"], ["bench", "--preset", "bogus"],
                ["bench", "--preset", "tiny", "--type", "q99"], ["bench", m, "--type", "f32"],
                ["bench", "--preset", "tiny", "--bogus", "1"],
                ["bench", m, "--batch", "0"], ["bench", m, "--batch", "1", "--mtp"],
                ["bench", m, "--session", "-t", "1,2"], ["bench", m, "--mtp", "-n", "0"],
                ["info", m, "--snapshots", "-1"],
                ["tokenize", m, "a", "b"], ["detokenize", m, "1", "--ids", "2"]]:
            with self.subTest(args=args):
                self.assertEqual(self.run_cli(*args, status=2), b"")
                self.assertIn("--help", self.error)

    def test_failures_are_status_1(self):
        m = model("qwen3_dense")
        empty = self.file("empty", b"")
        binary = self.file("binary", bytes(range(256)) * 64)
        for args, word in [
                (["info", "/no/such/file.q3n"], "/no/such/file.q3n"), (["info", "/"], "/"),
                (["info", empty], "empty"), (["info", binary], "binary"),
                (["run", m, "--ids", ""], "empty"), (["run", m, "-p", "a"], "tokenizer"),
                (["run", m, "--ids", "320"], "320"), (["run", m, "--ids", "-1"], "-1"),
                (["run", m, "--ids", "99999999999999999999"], "9999"),
                (["run", m, "--ids", "1,x"], "x"), (["run", m, "--ids", "[1,2"], "]"),
                (["run", m, "--ids", "[1] 2"], "array"),
                (["run", m, "--ids", "1,2,3", "--ctx", "2"], "--ctx"),
                (["run", m, "--ids", id_list([1] * 513)], "512: shorten it, or give --ctx 513"),
                (["logits", m, "--ids", id_list([1] * 600)], "600 tokens"),
                (["logits", m, "--ids-file", empty], "empty"),
                (["logits", m, "--ids-file", binary], "binary line 1"),
                (["logits", m, "--ids-file", "/no/such/ids"], "/no/such/ids"),
                (["logits", m, "--ids-file", "/"], "/"),
                (["perplexity", m, "--ids", "1"], "two"),
                (["experts", m, "--ids", "1,2"], "no experts"),
                (["classify", m, "--ids", "1,2"], "classification"),
                (["tokenize", m, "a"], "tokenizer"), (["detokenize", m, "1"], "tokenizer"),
                (["run", m, "--ids", "1", "--session", binary], "binary"),
                (["run", m, "--ids", "1", "--session", empty], "empty"),
                (["run", m, "--ids", "1", "-n", "1", "--session", "/no/such/chat"],
                 "/no/such/chat"),
                (["init", "/no/such/folder/x.q3n", "--preset", "tiny"], "/no/such/folder")]:
            with self.subTest(args=args):
                self.run_cli(*args, status=1)
                self.assertIn(word, self.error)

    def test_unsupported_isa(self):
        missing = [isa for isa in ("avx2", "avx512", "neon") if isa not in self.isas()]
        for isa in missing:
            self.run_cli("logits", model("qwen3_dense"), "--ids", "1", "--isa", isa, status=1)
            self.assertIn(isa, self.error)

    def test_model_by_option_and_equals(self):
        m = model("qwen3_dense")
        first = self.run_cli("logits", m, "--ids", "5 6", "--json")
        self.assertEqual(first, self.run_cli("logits", "-m", m, "--ids=[5, 6]", "--json"))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_full_disk(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(COMMAND + ["info", model("qwen3_dense")], stdout=full,
                                  stderr=subprocess.PIPE, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"could not be written", done.stderr)


class ChoiceTest(CliTest):
    """Options whose value is a name: the table that parses it is the one that --help lists."""

    COMMANDS = ["run", "info", "logits", "tokenize", "detokenize", "render", "classify",
                "perplexity", "experts", "init", "quantize", "bench", "verify", "help"]

    def choices(self, command):
        """[option, names] of every option that refuses "no such name" by naming a table."""
        text = self.run_cli(command, "--help").decode()
        for line in text.split("Options:\n")[1].splitlines():
            found = re.match(r"  (-\S+)(?:, (--\S+))* [A-Z]", line)
            if not found:
                continue
            name = found.group(2) or found.group(1)
            done = subprocess.run(COMMAND + [command, name, "no such name"], check=False,
                                  stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            refused = re.search(r"'no such name' is none of (.*); see", done.stderr.decode())
            if refused:
                self.assertEqual(done.returncode, 2)
                self.assertIn(" %s\n" % refused.group(1), text.split(line)[1])
                yield name, refused.group(1).split(", ")

    def test_help_lists_what_is_parsed(self):
        found = {}
        for command in self.COMMANDS:
            for option, names in self.choices(command):
                found[option] = names
                for name in names:
                    done = subprocess.run(COMMAND + [command, option, name], check=False,
                                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
                    self.assertNotIn(b"is none of", done.stderr)
        with open(os.path.join(ROOT, "qwen3next.h"), encoding="utf-8") as f:
            header = f.read()
        isas = header.split("#define Q3N_ISA_LIST(X)")[1].split("\n\n")[0]
        self.assertEqual(found["--isa"], re.findall(r"X\(\w+, +(\w+), +\d+\)", isas))
        self.assertEqual(found["--speculate"], ["off", "auto", "mtp", "lookup"])
        self.assertEqual(found["--kv-type"], ["f32", "f16", "bf16", "q8"])
        self.assertEqual(found["--snapshot-type"], ["f32", "bf16"])
        self.assertGreater(len(found["--type"]), 6)

    def test_names_that_are_near(self):
        m = model("qwen3_dense")
        for args, meant in [
                (["run", m, "--gredy"], "--greedy"), (["run", m, "--tempreature", "1"],
                                                      "--temperature"),
                (["run", m, "--tokens_", "1"], "--tokens"), (["run", m, "--jsno"], "--json"),
                (["bench", "--preset", "tiny", "--set"], None), (["run", m, "--xyzzy"], None),
                (["run", m, "-x"], None), (["rnu", m], "run"), (["tokenise", m], "tokenize"),
                (["frobnicate", m], None)]:
            with self.subTest(args=args):
                self.run_cli(*args, status=2)
                if meant:
                    self.assertIn("(is it %s?)" % meant, self.error)
                else:
                    self.assertNotIn("is it", self.error)

    def test_exit_status_is_documented(self):
        for args in [["--help"]] + [[command, "--help"] for command in self.COMMANDS]:
            text = self.run_cli(*args).decode()
            for word in ("0 success", "1 failure", "2 wrong usage", "130 interrupted"):
                self.assertIn(word, text)


class ManualTest(CliTest):
    """The manual page and the completions have every command and option that --help has."""

    @classmethod
    def setUpClass(cls):
        def text(*args):
            return subprocess.run(COMMAND + list(args), check=True,
                                  stdout=subprocess.PIPE).stdout.decode("utf-8")
        cls.text = staticmethod(text)
        commands = re.findall(r"^  (\w+) +\S", text("--help"), re.M)
        cls.options = {}
        for command in commands:
            lines = text(command, "--help").split("Options:\n")[1].splitlines()
            names = [re.match(r"  (-[^\s,]+(?:, -[^\s,]+)*)", line) for line in lines]
            cls.options[command] = [n for m in names if m for n in m.group(1).split(", ")]

    def test_commands(self):
        self.assertIn("help", self.options)
        self.assertGreater(len(self.options), 12)
        self.assertGreater(sum(map(len, self.options.values())), 150)

    def test_man(self):
        page = self.text("help", "--man")
        self.assertTrue(page.split("\n")[1].startswith(".TH Q3N 1 "))
        parts = page.split('\n.SS "q3n ')[1:]
        self.assertEqual([part.split()[0] for part in parts], list(self.options))
        for part, (command, names) in zip(parts, self.options.items()):
            with self.subTest(command):
                bold = re.findall(r"\\fB(\S+?)\\fR", part)
                self.assertEqual([name.replace("\\-", "-") for name in bold
                                  if name.startswith("\\-")][:len(names)], names)
        for line in page.splitlines():       # the text has no macros but those that were meant
            self.assertRegex(line, r"^(\.(\\\"|TH|SH|SS|TP|PP|B|BR|br)\b|\.\\\" |[^.'])")

    def complete(self, *words):
        """What bash offers for the last of the words."""
        script = self.text("help", "--completion", "bash") + (
            'COMP_WORDS=("$@")\nCOMP_CWORD=$(($# - 1))\n_q3n\nprintf "%s\\n" "${COMPREPLY[@]}"\n')
        done = subprocess.run(["bash", "-c", script, "bash"] + list(words), check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.stderr, b"")
        return done.stdout.decode().split()

    def test_bash(self):
        self.assertEqual(self.complete("q3n", ""), ["--help", "--version"] + list(self.options))
        self.assertEqual(self.complete("q3n", "to"), ["tokenize"])
        for command, names in self.options.items():
            self.assertEqual(sorted(self.complete("q3n", command, "-")), sorted(names))
        snapshots = ["f32", "bf16"]
        self.assertEqual(self.complete("q3n", "run", "--snapshot-type", ""), snapshots)
        self.assertEqual(self.complete("q3n", "run", "m", "--snapshot-type", "="), snapshots)
        self.assertEqual(self.complete("q3n", "run", "--snapshot-type", "=", "b"), ["bf16"])
        self.assertEqual(self.complete("q3n", "help", "per"), ["perplexity"])
        self.assertEqual(self.complete("q3n", "help", "--completion", ""), ["bash", "zsh", "fish"])
        self.assertEqual(self.complete("q3n", "run", "name"), [])     # files: by the shell

    def test_zsh_and_fish(self):
        for shell in ("zsh", "fish"):
            text = self.text("help", "--completion", shell)
            for command, names in self.options.items():
                for n in names:
                    words = re.escape(n) if shell == "zsh" else \
                        "-%s %s" % ("l" if n[:2] == "--" else "s", re.escape(n.lstrip("-")))
                    self.assertTrue(re.search(r"[ '{,]%s[ ='},[]" % words, text),
                                    (command, n, shell))
            if shutil.which(shell):
                with tempfile.NamedTemporaryFile() as f:
                    f.write(text.encode())
                    f.flush()
                    done = subprocess.run([shell, "-n", f.name], stderr=subprocess.PIPE,
                                          check=False)
                self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_errors(self):
        for args in (["help", "frobnicate"], ["help", "--completion", "csh"],
                     ["help", "--man", "run"], ["help", "run", "bench"]):
            self.run_cli(*args, status=2)


class SourceTest(CliTest):
    """The text is one of: an option's, the word after the model, stdin."""

    TEXT = b"Once upon a time there"

    def test_all_give_the_same(self):
        m = model("stories")
        path = self.file("text", self.TEXT)
        ids = self.run_cli("tokenize", m, "-p", self.TEXT).decode().strip()
        commands = {"run": ["-n", "6", "--greedy", "--ignore-eos"], "logits": ["--json"],
                    "perplexity": ["--json"], "experts": ["--json"], "tokenize": []}
        for command, args in commands.items():
            with self.subTest(command):
                want = self.run_cli(command, m, "-p", self.TEXT, *args)
                forms = [[m, self.TEXT], ["-m", m, self.TEXT], [m, "-f", path], [m, "-f", "-"],
                         [m], ["-m", m]]
                if command != "tokenize":
                    forms.append([m, "--ids", ids])
                for form in forms:
                    got = self.run_cli(command, *form, *args,
                                       stdin=b"" if self.TEXT in form else self.TEXT)
                    self.assertEqual(got, want, form)

    def test_several_are_an_error_that_names_them(self):
        m = model("stories")
        given = {"the word after the model": ["a"], "--prompt": ["-p", "a"],
                 "--file": ["-f", "a"], "--ids": ["--ids", "1"], "--ids-file": ["--ids-file", "a"]}
        names = list(given)
        for i, first in enumerate(names):
            for second in names[i + 1:]:
                self.run_cli("run", m, *given[first], *given[second], status=2)
                self.assertIn("%s and by %s" % (first, second), self.error)
        self.run_cli("run", m, "two", "words", status=2)
        self.assertIn("'words'", self.error)
        self.assertIn("quotes", self.error)

    def test_none(self):
        for command in ("run", "logits", "perplexity", "experts"):
            self.run_cli(command, model("stories"), status=2)
            self.assertIn("stdin is empty", self.error)
        self.run_cli("run", model("qwen3_dense"), stdin=b"a text", status=1)
        for word in ("qwen3_dense", "tokenizer", "--ids"):
            self.assertIn(word, self.error)
        self.run_cli("run", model("stories"), "", status=1)
        self.assertIn("the word after the model is empty", self.error)


class HostileInputTest(CliTest):
    def test_prompts(self):
        for prompt in [b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"a" * 1500, b"\x01\x1b[2J",
                       "\ufffe\U0010ffff".encode()]:
            with self.subTest(prompt=prompt[:8]):
                lines = self.json_lines("run", model("stories"), "-p", prompt, "-n", "3",
                                        "--greedy", "--json", "--ignore-eos")
                self.assertEqual(len(lines[0]["output_ids"]), 3)

    def test_prompt_files(self):
        for content in [b"\0", b"a\0b", bytes(range(256)), b"\r\n\r\n"]:
            path = self.file("prompt", content)
            lines = self.json_lines("run", model("stories"), "-f", path, "-n", "2", "--greedy",
                                    "--json", "--ignore-eos")
            self.assertEqual(len(lines[0]["output_ids"]), 2)
        self.run_cli("run", model("stories"), "-f", self.file("empty", b""), status=1)

    def test_file_names_stay_on_one_line(self):
        self.run_cli("info", "no\nsuch\tfile\x1b[31m", status=1)
        self.assertNotIn("\x1b", self.error)
        self.run_cli("info", model("stories"), "--\x9b31m\u00e9", status=2)     # a C1 control
        self.assertNotIn("\x9b", self.error)
        self.assertIn("\u00e9", self.error)

    def test_json_strings(self):
        for bad in [b'"a', b'a"', b'"\\x"', b'"\\u12"', b'"a" b', b'["a"]', b'"a\x01"', b'{}', b'']:
            with self.subTest(line=bad):
                self.run_cli("tokenize", model("stories"), "--jsonl", stdin=b'"ok"\n' + bad + b"\n",
                             status=1)
                self.assertIn("stdin line 2", self.error)
        lines = self.json_lines("tokenize", model("stories"), "--jsonl",
                                stdin=b'"\\ud83d\\ude00"\n"\xf0\x9f\x98\x80"\r\n  "\\ud83d"  \n')
        self.assertEqual(lines[0], lines[1])
        self.assertEqual(len(lines), 3)

    def test_id_lines(self):
        for bad in [b"[1", b"1]", b"[1] 2", b"1.5", b"0x10", b"[[1]]", b"one"]:
            with self.subTest(line=bad):
                self.run_cli("detokenize", model("stories"), "--jsonl", stdin=b"[1]\n" + bad,
                             status=1)
                self.assertIn("stdin line 2", self.error)
        self.run_cli("detokenize", model("stories"), "4000000", status=1)

    def test_damaged_models(self):
        with open(model("qwen3_dense"), "rb") as f:
            good = f.read()
        meta_bytes = struct.unpack_from("<Q", good, 24)[0]
        for n in [0, 7, 63, 64, 200, meta_bytes - 1, len(good) - 1]:
            with self.subTest(bytes=n):
                self.run_cli("info", self.file("cut", good[:n]), status=1)
        flipped = bytearray(good)
        flipped[-70] ^= 1
        path = self.file("flipped", bytes(flipped))
        self.run_cli("info", path)
        self.run_cli("verify", path, status=1)
        self.assertIn("weight", self.error)
        self.assertIn(b"all checksums match", self.run_cli("verify", model("qwen3_dense")))


class GoldenTest(CliTest):
    def check_case(self, got, case, what):
        bound = LOGIT_ERROR * max(map(abs, case["last_logits"]))
        self.check_reals(got["logits"], case["last_logits"], bound, what)
        self.check_reals(got["logprobs"], case["token_logprobs"], LOGPROB_ERROR, what)
        self.assertEqual(got["argmax"], case["argmax"], what)

    def test_logits(self):
        for name in FAMILIES:
            cases = load(GOLDEN, name, "golden.json")["cases"]
            path = self.file("ids", "".join(json.dumps(c["input_ids"]) + "\n" for c in cases))
            # test_model.c has every family with every instruction set, in pieces of all sizes.
            first = name == FAMILIES[0]
            for isa in self.isas() if first else self.isas()[-1:]:
                for way in WAYS if first else WAYS[:1]:
                    what = "%s %s %s" % (name, isa, way)
                    with self.subTest(what):
                        lines = self.json_lines("logits", model(name), "--ids-file", path, "--json",
                                                "--isa", isa, *way)
                        self.assertEqual(len(lines), len(cases))
                        for got, case in zip(lines, cases):
                            self.check_case(got, case, what)

    def test_greedy(self):
        for name in FAMILIES:
            greedy = load(GOLDEN, name, "golden.json").get("greedy")
            if not greedy:
                continue
            for isa in self.isas() if name == FAMILIES[0] else self.isas()[-1:]:
                with self.subTest("%s %s" % (name, isa)):
                    got = self.json_lines("run", model(name), "--greedy", "--json", "--isa", isa,
                                          "--ids", id_list(greedy["prompt_ids"]),
                                          "-n", str(len(greedy["output_ids"])))
                    self.assertEqual(got, [{"output_ids": greedy["output_ids"]}])

    def test_classify(self):
        cases = load(GOLDEN, "qwen3_next_cls", "golden.json")["cases"]
        path = self.file("ids", "".join(id_list(c["input_ids"]) + "\n" for c in cases))
        for isa in self.isas():
            lines = self.json_lines("classify", model("qwen3_next_cls"), "--ids-file", path,
                                    "--json", "--isa", isa)
            for got, case in zip(lines, cases):
                want = case["class_logits"]
                self.check_reals(got["scores"], want, LOGIT_ERROR * max(map(abs, want)), isa)
                self.assertEqual(got["label"], want.index(max(want)))
            self.assertEqual(len(lines), len(cases))

    def check_keras(self, name, case, isa, way):
        path = self.file("ids", "".join(id_list(ids) + "\n" for ids in case["input_ids"]))
        lines = self.json_lines("logits", model(name), "--ids-file", path, "--json", "--all",
                                "--isa", isa, *way, quiet=False)
        self.assertEqual(len(lines), len(case["output"]))
        for got, want in zip(lines, case["output"]):
            self.assertEqual(len(got["all_logits"]), len(want))
            for row, row_want in zip(got["all_logits"], want):
                self.check_reals(row, row_want, LOGIT_ERROR * max(map(abs, row_want)), name)
            self.assertEqual(got["logits"], got["all_logits"][-1])

    def test_keras(self):
        cases = {
            "qwen3_head_all_moe": "nomask",
            "seed_patched_real_rope": "nomask_bidirectional",
            "seed_patched_zero_rope": "nomask_bidirectional",
        }
        for name, key in cases.items():
            case = load(GOLDEN, "keras", name + ".json")[key]
            for isa in self.isas():
                for way in WAYS if key == "nomask" else WAYS[:1]:
                    with self.subTest("%s %s %s" % (name, isa, way)):
                        self.check_keras(name, case, isa, way)

    def test_bidirectional_takes_a_text_whole(self):
        self.run_cli("logits", model("seed_patched_real_rope"), "--ids", "1,2,3", "--pieces", "1",
                     status=1)
        self.run_cli("run", model("seed_patched_real_rope"), "--ids", "1,2,3", status=1)
        self.assertIn("both ways", self.error)

    def test_threads_do_not_change_a_bit(self):
        ids = load(GOLDEN, "qwen3_next", "golden.json")["cases"][-1]["input_ids"]
        outputs = {self.run_cli("logits", model("qwen3_next"), "--ids", id_list(ids), "--json",
                                "-t", t) for t in ("1", "2", "3")}
        self.assertEqual(len(outputs), 1)


class StoriesTest(CliTest):
    def setUp(self):
        super().setUp()
        self.golden = load(STORIES)
        self.valid = self.file("valid", json.dumps(self.golden["valid_ids"]))

    def test_perplexity(self):
        want = self.golden["perplexity"]
        got = self.json_lines("perplexity", model("stories"), "--ids-file", self.valid, "--window",
                              "1024", "--json")[0]
        self.assertEqual((got["windows"], got["scored"]), (want["windows"], want["scored"]))
        self.assertAlmostEqual(got["perplexity"], want["ppl"], delta=0.0005)
        self.assertAlmostEqual(math.exp(got["nll"] / got["scored"]), got["perplexity"], places=4)
        self.assertTrue(0.1 < got["standard_error"] < 1.0)

    def test_perplexity_of_text_agrees_with_ids(self):
        ids = self.golden["valid_ids"][:300]
        text = self.run_cli("detokenize", model("stories"), "--ids", id_list(ids))
        path = self.file("text", text)
        retokenized = self.json_lines("tokenize", model("stories"), "-f", path, "--json")[0]
        by_text = self.run_cli("perplexity", model("stories"), "--file", path, "--json")
        by_ids = self.run_cli("perplexity", model("stories"), "--ids", id_list(retokenized),
                              "--json")
        self.assertEqual(by_text, by_ids)

    def test_kl_with_itself_is_zero(self):
        got = self.json_lines("perplexity", model("stories"), "--kl", model("stories"), "--ids",
                              id_list(self.golden["valid_ids"][:200]), "--window", "64", "--json")
        got = got[0]
        self.assertEqual((got["windows"], got["scored"]), (4, 196))
        for key in ("kl_mean", "kl_standard_error", "kl_median", "kl_p999", "kl_max",
                    "log_likelihood_difference", "log_likelihood_difference_error"):
            self.assertEqual(got[key], 0, key)
        self.assertEqual(got["top1_agreement"], 100)
        for key in ("nll", "perplexity", "standard_error"):
            self.assertEqual(got["base_" + key], got[key])

    def test_kl_refuses_another_vocabulary(self):
        m = model("stories")
        self.run_cli("perplexity", m, "--ids", "1,2", "--kl", model("qwen3_dense"), status=1)
        self.assertIn("vocabulary", self.error)
        with open(m, "rb") as f:
            content = bytearray(f.read())
        at = content.rindex(b"ing", 0, struct.unpack_from("<Q", content, 24)[0])
        content[at:at + 3] = b"XYZ"
        struct.pack_into("<I", content, 32, 0)
        meta_bytes = struct.unpack_from("<Q", content, 24)[0]
        struct.pack_into("<I", content, 32, zlib.crc32(content[:meta_bytes]))
        other = self.file("other.q3n", bytes(content))
        self.run_cli("perplexity", m, "--ids", "1,2", "--kl", other, status=1)
        self.assertIn("another vocabulary", self.error)
        self.run_cli("perplexity", m, "--ids", "1,2", "--kl", "/no/such/base", status=1)
        self.assertIn("/no/such/base", self.error)

    def test_experts(self):
        want = self.golden["router"]
        got = self.json_lines("experts", model("stories"), "--ids-file", self.valid, "--window",
                              "1024", "--json")[0]
        self.assertEqual(got["tokens"], want["tokens"])
        self.assertEqual([len(row) for row in got["counts_per_layer"]],
                         [len(row) for row in want["counts_per_layer"]])
        off = sum(abs(a - b) for row, row_want in zip(got["counts_per_layer"],
                                                      want["counts_per_layer"])
                  for a, b in zip(row, row_want))
        self.assertLessEqual(off, 20)

    def test_experts_chart(self):
        text = self.run_cli("experts", model("stories"), "-p", "Once upon a time").decode()
        self.assertEqual(text.count("layer "), 8)
        self.assertIn("█", text)
        self.assertIn("####", self.run_cli("experts", model("stories"), "-p", "Once", "--layer",
                                           "2", "--ascii").decode())

    def test_greedy_by_ids_and_text(self):
        for case in self.golden["greedy"]:
            n = str(len(case["output_ids"]))
            with self.subTest(case["prompt"]):
                by_ids = self.json_lines("run", model("stories"), "--ids",
                                         id_list(case["prompt_ids"]), "-n", n, "--greedy", "--json")
                self.assertEqual(by_ids[0]["output_ids"], case["output_ids"])
                text = self.run_cli("run", model("stories"), "-p",
                                    "<|endoftext|>" + case["prompt"], "-n", "120", "--greedy",
                                    "--echo", "--special").decode("utf-8")
                self.assertEqual(text, case["text"] + "\n")

    def test_stops_at_end_of_text(self):
        case = self.golden["greedy"][1]
        path = self.file("prompt", "<|endoftext|>" + case["prompt"] + "\n")
        got = self.json_lines("run", model("stories"), "-f", path, "-n", "200", "--greedy",
                              "--json")[0]
        self.assertEqual(got["output_ids"], case["output_ids"])
        self.assertEqual("<|endoftext|>" + case["prompt"] + got["text"] + "<|endoftext|>",
                         case["text"])
        longer = self.json_lines("run", model("stories"), "-f", path, "-n", "130", "--greedy",
                                 "--json", "--ignore-eos")[0]["output_ids"]
        self.assertEqual(longer[:114], case["output_ids"])
        self.assertEqual(len(longer), 130)

    def test_seed_decides_the_text(self):
        def sample(seed):
            return self.run_cli("run", model("stories"), "-p", "Once upon a time", "-n", "40",
                                "--temp", "1.2", "--top-k", "0", "--top-p", "1", "-s", seed)
        self.assertEqual(sample("7"), sample("7"))
        self.assertNotEqual(sample("7"), sample("8"))

    def test_context_ends_the_text(self):
        got = self.json_lines("run", model("stories"), "--ids", "4093,761", "-n", "-1", "--ctx",
                              "12", "--greedy", "--json", "--ignore-eos")[0]
        self.assertEqual(len(got["output_ids"]), 11)

    def test_many_prompts(self):
        path = self.file("ids", "4093 761\n\n4093 431\n")
        lines = self.json_lines("run", model("stories"), "--ids-file", path, "-n", "5", "--greedy",
                                "--json")
        alone = self.json_lines("run", model("stories"), "--ids", "4093,431", "-n", "5", "--greedy",
                                "--json")
        self.assertEqual(lines[1], alone[0])
        self.assertEqual(len(lines), 2)

    def test_kv_types(self):
        ids = id_list(self.golden["valid_ids"][:200])
        exact = self.json_lines("logits", model("stories"), "--ids", ids, "--json")[0]["logits"]
        for kv, bound in [("f16", 0.05), ("bf16", 0.3)]:
            got = self.json_lines("logits", model("stories"), "--ids", ids, "--json", "--kv", kv)[0]
            self.check_reals(got["logits"], exact, bound, kv)
            self.assertNotEqual(got["logits"], exact)


class ChatTest(CliTest):
    """A text of the built-in model, and where a session with it may be saved."""

    def setUp(self):
        super().setUp()
        golden = load(STORIES)
        self.ids, case = golden["valid_ids"], golden["greedy"][0]
        self.prompt, self.output = case["prompt_ids"], case["output_ids"]
        self.path = os.path.join(self.folder, "chat.q3s")


class StateTest(ChatTest):
    """States that outlive the program, and drafts: the text is what it is without them."""

    def greedy(self, ids, n, *args):
        return self.json_lines("run", model("stories"), "--ids", id_list(ids), "-n", str(n),
                               "--greedy", "--json", *args)[0]["output_ids"]

    def test_drafts(self):
        for args in (["off"], ["auto"], ["mtp"], ["lookup"], ["mtp", "--draft", "3"]):
            with self.subTest(args):
                got = self.greedy(self.prompt, len(self.output), "--speculate", *args)
                self.assertEqual(got, self.output)
                if "--draft" in args:
                    self.assertRegex(self.notes, r"\d+ of \d+ drafts accepted, \d\.\d\d tokens a")
                if "off" in args:
                    self.assertNotIn("drafts", self.notes)
        for n in (0, 1, 2):
            self.assertEqual(self.greedy(self.prompt, n), self.output[:n])

    def test_session_file(self):
        n = len(self.prompt)
        self.assertEqual(self.greedy(self.prompt, 10, "--session", self.path), self.output[:10])
        self.assertNotIn("reused", self.notes)
        got = self.greedy(self.prompt + self.output[:10], 20, "--session", self.path)
        self.assertEqual(got, self.output[10:30])
        self.assertIn("session of %d tokens; prompt %d tokens, %d reused;" % ((n + 10,) * 3),
                      self.notes)
        got = self.greedy(self.output[30:31], 5, "--session", self.path, "--append")
        self.assertEqual(got, self.output[31:36])
        self.assertIn("prompt %d tokens, %d reused," % (n + 31, n + 30), self.notes)
        other = self.ids[:50]
        self.assertEqual(self.greedy(other, 5, "--session", self.path), self.greedy(other, 5))
        self.assertEqual(os.listdir(self.folder), ["chat.q3s"])
        self.run_cli("run", model("qwen3_dense"), "--ids", "1", "--session", self.path, status=1)
        self.assertIn(self.path, self.error)

    def test_session_with_and_without_seed(self):
        """A seed turns drafts off: with it or without, what the other left is continued."""
        cache = os.path.join(self.folder, "cache")
        os.mkdir(cache)
        for first, then in (([], ["--seed", "5"]), (["--seed", "5"], [])):
            for keep in (["--session", self.path], ["--cache-dir", cache]):
                with self.subTest(first=first, keep=keep):
                    args = ["run", model("stories"), *keep, "--ids"]
                    prompt = self.ids[len(first):100]    # another text for each order
                    self.run_cli(*args, id_list(prompt), "-n", "0", *first)
                    self.run_cli(*args, id_list(prompt + [7, 8]), "-n", "3", *then)
                    self.assertIn("%d reused" % len(prompt), self.notes)

    def test_sampling_goes_on(self):
        """Two texts, one after another, in one run or in two: the sampler's state is kept."""
        lines = [id_list(self.ids[:9]), id_list(self.ids[40:45])]
        args = ["run", model("stories"), "-n", "12", "--json", "--append", "--speculate", "off",
                "--temp", "1.2", "--top-k", "0", "--top-p", "1", "--repeat-penalty", "1.3"]
        both = os.path.join(self.folder, "ids")
        with open(both, "w", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")

        def outputs(path, *more):
            text = self.run_cli(*args, "--session", os.path.join(self.folder, path), *more)
            return [json.loads(line)["output_ids"] for line in text.decode().splitlines()]
        want = outputs("one.q3s", "--seed", "5", "--ids-file", both)
        self.assertEqual(len(want), 2)
        got = outputs("two.q3s", "--seed", "5", "--ids", lines[0])
        got += outputs("two.q3s", "--ids", lines[1])
        self.assertEqual(got, want)
        self.assertNotIn("; seed", self.notes)
        outputs("three.q3s", "--seed", "5", "--ids", lines[0])
        self.assertNotEqual(outputs("three.q3s", "--seed", "6", "--ids", lines[1]), want[1:])

    def test_a_text_that_ended_goes_on(self):
        case = load(STORIES)["greedy"][1]
        text = self.run_cli("run", model("stories"), "-p", "<|endoftext|>" + case["prompt"],
                            "--greedy", "--session", self.path)
        self.assertIn("end of text", self.notes)
        self.run_cli("run", model("stories"), "-p", "<|endoftext|>The end", "-n", "1",
                     "--session", self.path, "--append")
        kept = len(case["prompt_ids"] + case["output_ids"]) - 1
        self.assertIn("session of %d tokens" % kept, self.notes)
        self.assertIn("%d reused" % kept, self.notes)
        self.assertTrue(case["text"].endswith(text.decode().strip("\n") + "<|endoftext|>"))

    def test_cache(self):
        folder = os.path.join(self.folder, "cache")
        os.mkdir(folder)
        args = ["--cache-dir", folder, "--cache-size", "64", "--snapshot-every", "100"]
        for n, reused in ((300, 0), (300, 300), (280, 200)):
            got = self.greedy(self.ids[:n], 4, *args)
            self.assertEqual(got, self.greedy(self.ids[:n], 4))
            got = self.greedy(self.ids[:n], 4, *args)
            self.assertGreaterEqual(int(self.notes.split(" reused")[0].split()[-1]), reused)
        self.assertTrue(os.listdir(folder))


INTERRUPTS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


def heed_interrupts():
    """Whatever a shell in the background, or nohup, made of them."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_DFL)


def catches_interrupt(pid):
    """The process has a handler for SIGTERM, which nobody ignores."""
    with open("/proc/%d/status" % pid, encoding="ascii") as f:
        caught = next(line for line in f if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1


def wait_until(condition):
    """A machine may be slow, so this only ends what would never end."""
    end = time.monotonic() + 3600
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("it never happened")
        time.sleep(0.01)


@unittest.skipIf(len(COMMAND) > 1 or not os.path.exists("/proc/self/status"),
                 "signals need the program itself, and /proc to see that they have come")
class InterruptTest(ChatTest):
    def start(self, *args, **other):
        """Unbuffered: what read() has taken in beyond its answer, communicate() would not see."""
        run = subprocess.Popen(COMMAND + list(args), stdin=subprocess.DEVNULL, bufsize=0,
                               **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                                  "preexec_fn": heed_interrupts, **other})
        self.addCleanup(run.stdout.close)
        self.addCleanup(run.wait)
        self.addCleanup(run.kill)
        return run

    def saved(self):
        """Tokens in the session file."""
        self.run_cli("run", model("stories"), "--ids", id_list(self.output[:1]), "-n", "1",
                     "--session", self.path, "--append")
        return int(re.search(r"session of (\d+) tokens", self.notes).group(1))

    def test_what_was_written_is_saved(self):
        run = self.start("run", model("stories"), "--ids", id_list(self.prompt), "-n", "1900",
                         "--greedy", "--session", self.path, "--special")
        text = self.read_at_least(run.stdout, 40)
        run.send_signal(signal.SIGINT)
        rest, notes = run.communicate()
        self.assertEqual(run.returncode, 130, notes)
        self.assertIn(b"interrupted", notes)
        self.assertEqual(os.listdir(self.folder), ["chat.q3s"])
        ids = self.json_lines("tokenize", model("stories"), "-p", text, "--json")[0]
        self.assertEqual(ids[:5], self.output[:5])
        written = self.json_lines("tokenize", model("stories"), "-p", (text + rest)[:-1],
                                  "--json")[0]
        self.assertEqual(self.saved(), len(self.prompt) + len(written))

    def read_at_least(self, stream, n):
        got = b""
        while len(got) < n:
            more = stream.read(n - len(got))
            self.assertTrue(more, got)
            got += more
        return got

    def read_until(self, fd, text):
        got = b""
        while text not in got:
            got += os.read(fd, 4096)
        return got

    def test_a_prompt_is_given_up(self):
        """The session stays as it was."""
        self.run_cli("run", model("stories"), "--ids", id_list(self.prompt), "-n", "3",
                     "--session", self.path)
        master, slave = pty.openpty()
        run = self.start("run", model("stories"), "--ids", id_list(self.ids[:1900]), "-t", "1",
                         "--session", self.path, stderr=slave)
        os.close(slave)
        self.read_until(master, b"prompt [")
        run.send_signal(signal.SIGINT)
        notes = self.read_until(master, b"interrupted")
        os.close(master)
        self.assertEqual(run.wait(), 130, notes)
        self.assertEqual(run.stdout.read(), b"\n")
        self.assertEqual(self.saved(), len(self.prompt) + 3)

    def test_the_second_ends_at_once(self):
        run = self.start("run", model("stories"), "--ids", id_list(self.prompt), "-n", "1900",
                         "--greedy", "--json", "--session", self.path, stderr=subprocess.DEVNULL)
        room = fcntl.fcntl(run.stdout.fileno(), 1031, 4096)      # F_SETPIPE_SZ
        if room > 4096:
            self.skipTest("pipes have %d bytes: the output does not fill one" % room)
        full = array.array("i", [0])

        def is_full():
            fcntl.ioctl(run.stdout.fileno(), termios.FIONREAD, full)
            return full[0] == room
        wait_until(is_full)              # the program waits for someone to read the rest
        run.send_signal(signal.SIGINT)
        wait_until(lambda: not catches_interrupt(run.pid))
        self.assertIsNone(run.poll())
        run.send_signal(signal.SIGINT)
        self.assertEqual(run.wait(), -signal.SIGINT)
        self.assertEqual(os.listdir(self.folder), [])

    def test_files_under_way_are_removed(self):
        path = os.path.join(self.folder, "big.q3n")
        for number in INTERRUPTS:
            run = self.start("init", path, "--preset", "g2", "--type", "f32")
            wait_until(lambda: catches_interrupt(run.pid) and os.listdir(self.folder))
            run.send_signal(number)
            out, notes = run.communicate()
            self.assertEqual((run.returncode, out, notes),
                             (128 + number, b"", b"q3n: interrupted\n"))
            self.assertEqual(os.listdir(self.folder), [])

    def test_a_copy_under_way_is_removed(self):
        source, path = (os.path.join(self.folder, n) for n in ("large.q3n", "copy.q3n"))
        self.run_cli("init", source, "--preset", "tiny", "--vocab", "150000", "--hidden-size",
                     "256")
        for number in INTERRUPTS:
            with open(path, "w", encoding="ascii") as f:
                f.write("older")
            run = self.start("quantize", source, path, "--type", "q4", "--threads", "1")
            wait_until(lambda: catches_interrupt(run.pid) and len(os.listdir(self.folder)) == 3)
            run.send_signal(number)
            out, notes = run.communicate()
            self.assertEqual((run.returncode, out, notes),
                             (128 + number, b"", b"q3n: interrupted\n"))
            self.assertEqual(sorted(os.listdir(self.folder)), ["copy.q3n", "large.q3n"])
            with open(path, encoding="ascii") as f:
                self.assertEqual(f.read(), "older")

    def test_what_is_ignored_stays_so(self):
        """As under nohup."""
        path = os.path.join(self.folder, "big.q3n")

        def ignore_hangup():
            heed_interrupts()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run = self.start("init", path, "--preset", "tiny", "--vocab", "150000", "--hidden-size",
                         "256", "--threads", "1", preexec_fn=ignore_hangup)
        wait_until(lambda: catches_interrupt(run.pid) and os.listdir(self.folder))
        run.send_signal(signal.SIGHUP)
        self.assertNotIn("big.q3n", os.listdir(self.folder), "it was done before the signal came")
        out, notes = run.communicate()
        self.assertEqual((run.returncode, notes), (0, b""))
        self.assertEqual(os.listdir(self.folder), ["big.q3n"])

    def test_scratch_files_are_removed(self):
        run = self.start("bench", model("stories"), "--session", "-p", "60", "-n", "10", "-t", "1",
                         "-r", "100", env=dict(os.environ, TMPDIR=self.folder))
        wait_until(lambda: os.listdir(self.folder))
        run.send_signal(signal.SIGINT)
        run.communicate()
        self.assertEqual((run.returncode, os.listdir(self.folder)), (130, []))


@unittest.skipIf(os.name != "posix", "needs pseudo-terminals")
class TerminalTest(CliTest):
    """What is shown only on a terminal."""

    def on_terminal(self, *args):
        """stdout, and what came to stderr, which is a terminal."""
        master, slave = pty.openpty()
        run = subprocess.Popen(COMMAND + list(args), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=slave)
        os.close(slave)
        shown = b""
        try:
            while True:
                part = os.read(master, 4096)
                if not part:
                    break
                shown += part
        except OSError:                  # Linux: the other side is closed
            pass
        os.close(master)
        out = run.stdout.read()
        run.stdout.close()
        self.assertEqual(run.wait(), 0, shown)
        return out, shown.decode()

    def test_progress_of_a_long_prompt(self):
        ids = load(STORIES)["valid_ids"]
        args = ["run", model("stories"), "-n", "2", "--greedy", "--json", "--ids"]
        want = self.run_cli(*args, id_list(ids[:600]))
        self.assertNotIn("[", self.notes)
        self.assertNotIn("\033", self.notes)
        out, shown = self.on_terminal(*args, id_list(ids[:600]))
        self.assertEqual(out, want)
        self.assertRegex(shown, r"prompt \[[#.]+\] +\d+ %  \d+(\.\d)? of 600 tokens  "
                                r"\d+(\.\d)? tokens/s")
        self.assertIn("600 of 600 tokens", shown)
        self.assertIn("\r\033[Kq3n: loaded", shown)      # the bar is gone before the summary
        out, shown = self.on_terminal(*args, id_list(ids[:600]), "-q")
        self.assertEqual((out, shown), (want, ""))
        out, shown = self.on_terminal(*args, id_list(ids[:100]))
        self.assertNotIn("prompt [", shown)

    def test_what_is_known_is_not_counted(self):
        ids, path = load(STORIES)["valid_ids"], os.path.join(self.folder, "chat.q3s")
        args = ["run", model("stories"), "-n", "1", "--greedy", "--session", path, "--ids"]
        chosen = self.json_lines(*args, id_list(ids[:300]), "--json")[0]["output_ids"]
        shown = self.on_terminal(*args, id_list(ids[:300] + chosen + ids[400:700]))[1]
        self.assertIn(" of 300 tokens", shown)
        self.assertIn("prompt 601 tokens, 301 reused", shown)

    def test_no_text_from_a_terminal(self):
        master, slave = pty.openpty()
        done = subprocess.run(COMMAND + ["run", model("stories")], stdin=slave, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.close(slave)
        os.close(master)
        self.assertEqual(done.returncode, 2)
        self.assertIn(b"no text: give it", done.stderr)


def log_softmax(row):
    top = max(row)
    norm = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - norm for x in row]


class KlTest(CliTest):
    """A model against itself rounded to bf16, from the logits of both."""

    def setUp(self):
        super().setUp()
        self.exact, self.rounded = (self.make(t) for t in ("f32", "bf16"))
        self.ids = [7 * i * i % 300 for i in range(150)]

    def make(self, weight_type):
        path = os.path.join(self.folder, weight_type + ".q3n")
        self.run_cli("init", path, "--preset", "tiny", "--vocab", "300", "--layers", "2",
                     "--hidden-size", "64", "--set", "moe_intermediate_size=32", "--type",
                     weight_type, "--seed", "3", "--stddev", "0.2")
        return path

    def rows(self, path, ids):
        got = self.json_lines("logits", path, "--ids", id_list(ids), "--json", "--all")[0]
        return [log_softmax(row) for row in got["all_logits"]]

    def measure(self, window):
        """KL, log-likelihood difference and agreement of every scored position."""
        kl, difference, agree = [], [], 0
        for at in range(0, len(self.ids) - 1, window):
            ids = self.ids[at:at + window]
            pairs = list(zip(self.rows(self.exact, ids), self.rows(self.rounded, ids)))
            for t, (p, q) in enumerate(pairs[:-1]):
                kl.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q)))
                difference.append(q[ids[t + 1]] - p[ids[t + 1]])
                agree += p.index(max(p)) == q.index(max(q))
        return kl, difference, agree

    def test_against_logits(self):
        got = self.json_lines("perplexity", self.rounded, "--kl", self.exact, "--ids",
                              id_list(self.ids), "--window", "64", "--json")[0]
        kl, difference, agree = self.measure(64)
        n = len(kl)
        ordered = sorted(kl)

        def quantile(share):
            i = min(int(share * (n - 1)), n - 2)
            return ordered[i] + (share * (n - 1) - i) * (ordered[i + 1] - ordered[i])
        self.assertEqual(got["scored"], n)
        self.assertTrue(0 < got["kl_mean"] < 0.1)
        # The logits are f32: printed with 9 digits they are exact.
        for key, want in [("kl_mean", statistics.mean(kl)), ("kl_median", quantile(0.5)),
                          ("kl_p999", quantile(0.999)), ("kl_max", max(kl)),
                          ("kl_standard_error", statistics.stdev(kl) / n ** 0.5),
                          ("log_likelihood_difference", statistics.mean(difference)),
                          ("log_likelihood_difference_error",
                           statistics.stdev(difference) / n ** 0.5)]:
            self.assertAlmostEqual(got[key], want, delta=1e-6 * abs(want) + 1e-12, msg=key)
        self.assertAlmostEqual(got["top1_agreement"], 100 * agree / n, places=6)
        self.assertAlmostEqual((got["base_nll"] - got["nll"]) / n,
                               got["log_likelihood_difference"], places=9)
        for prefix, path in (("", self.rounded), ("base_", self.exact)):
            alone = self.json_lines("perplexity", path, "--ids", id_list(self.ids), "--window",
                                    "64", "--json")[0]
            for key in ("nll", "perplexity", "standard_error"):
                self.assertEqual(got[prefix + key], alone[key], prefix + key)

    def test_text(self):
        text = self.run_cli("perplexity", self.rounded, "--kl", self.exact, "--ids",
                            id_list(self.ids[:20])).decode()
        for word in ("base perplexity", "KL(base || model)", "same first choice", "log-likelihood"):
            self.assertIn(word, text)


class TokenizerTest(CliTest):
    def test_golden(self):
        golden = load(GOLDEN, "tokenizer_qwen3.json")
        cases = golden["cases"]
        for ascii_only in (True, False):
            lines = "".join(json.dumps(c["text"], ensure_ascii=ascii_only) + "\n" for c in cases)
            got = self.json_lines("tokenize", model("tokenizer_qwen3"), "--jsonl",
                                  stdin=lines.encode("utf-8"))
            self.assertEqual(got, [c["ids"] for c in cases])
        lines = "".join(json.dumps(c["ids"]) + "\n" for c in cases)
        got = self.json_lines("detokenize", model("tokenizer_qwen3"), "--jsonl",
                              stdin=lines.encode("utf-8"))
        self.assertEqual(got, [c["decoded"] for c in cases])

    def test_forms(self):
        m = model("stories")
        ids = self.json_lines("tokenize", m, "<|endoftext|>Once upon", "--json")[0]
        self.assertEqual(ids[0], 4093)
        self.assertEqual(self.run_cli("tokenize", m, "-p", "<|endoftext|>Once upon").decode(),
                         " ".join(map(str, ids)) + "\n")
        self.assertEqual(self.run_cli("tokenize", m, stdin=b"<|endoftext|>Once upon").decode(),
                         " ".join(map(str, ids)) + "\n")
        plain = self.json_lines("tokenize", m, "<|endoftext|>Once upon", "--json",
                                "--no-special")[0]
        self.assertNotIn(4093, plain)
        for form in (plain, ids):
            words = list(map(str, form))
            self.assertEqual(self.run_cli("detokenize", m, *words), b"<|endoftext|>Once upon")
        self.assertEqual(self.json_lines("detokenize", m, "--ids", id_list(ids), "--json"),
                         ["<|endoftext|>Once upon"])
        shown = self.run_cli("tokenize", m, "Once\n", "--show").decode()
        self.assertIn("\\n", shown)
        shown = self.run_cli("tokenize", model("tokenizer_qwen3"), "\x92\u00e9", "--show").decode()
        self.assertEqual(shown.split("\t")[1:], ["\\xc2\\x92\n963", "\u00e9\n"])
        for stdin in (b"[1, 2", b"1 x"):
            self.run_cli("detokenize", m, stdin=stdin, status=1)
            self.assertIn("stdin: ", self.error)


class FileTest(CliTest):
    def make(self, *args):
        path = os.path.join(self.folder, "made.q3n")
        self.run_cli("init", path, "--preset", "tiny", "--vocab", "300", "--layers", "2",
                     "--hidden-size", "64", "--set", "moe_intermediate_size=32", *args)
        return path

    def test_init(self):
        with open(self.make("--seed", "5"), "rb") as f:
            first = f.read()
        path = self.make("--seed", "5")
        with open(path, "rb") as f:
            self.assertEqual(f.read(), first)
        self.run_cli("verify", path)
        info = self.json_lines("info", path, "--json")[0]
        config = info["config"]
        self.assertEqual((config["vocab_size"], config["num_hidden_layers"], config["hidden_size"],
                          config["moe_intermediate_size"]), (300, 2, 64, 32))
        self.assertEqual(info["file_bytes"], len(first))
        with open(self.make("--seed", "6"), "rb") as f:
            self.assertNotEqual(f.read(), first)
        logits = self.json_lines("logits", path, "--ids", "1,2,3", "--json")[0]["logits"]
        self.assertEqual(len(logits), 300)
        self.assertTrue(all(x is not None and abs(x) < 100 for x in logits))
        self.assertEqual(os.listdir(self.folder), ["made.q3n"])

    def test_strings_of_a_file_stay_on_their_line(self):
        path = self.make("--name", "a\x1b[31m\nb\u00e9")
        self.assertIn("made.q3n  a\\x1b[31m\\nb\u00e9\n", self.run_cli("info", path).decode())

    def test_init_types(self):
        """Every type; matrices that may not have it have the next finer one."""
        sizes = []
        for type_ in ("f32", "bf16", "q8", "q6", "q4", "q3"):
            path = self.make("--type", type_)
            self.run_cli("verify", path)
            info = self.json_lines("info", path, "--json")[0]
            self.assertEqual("bf16" in info["types"], type_ != "f32")
            sizes.append(info["file_bytes"])
        self.assertEqual(sizes, sorted(set(sizes), reverse=True))
        self.run_cli("init", path, "--preset", "tiny", "--type", "q5", status=2)
        self.assertIn("is none of f32, f16, bf16, q8, q6, q4, q3", self.error)

    def test_quantize(self):
        out = os.path.join(self.folder, "q.q3n")
        want = {"q8": {"f32", "q8"}, "q6": {"f32", "q6"}, "q4": {"f32", "q4", "q6"},
                "q4m": {"f32", "q4", "q6"}, "q4l": {"f32", "q4", "q8"}, "q3": {"f32", "q3", "q6"},
                "bf16": {"f32", "bf16"}, "f16": {"f32", "f16"}, "f32": {"f32"}}
        files = {}
        for recipe, types in want.items():
            text = self.run_cli("quantize", model("qwen3_next"), out, "--type", recipe).decode()
            self.assertIn("bits per weight", text)
            self.assertEqual({line.split()[0] for line in text.splitlines()[1:]}, types)
            self.run_cli("verify", out)
            self.assertEqual(set(self.json_lines("info", out, "--json")[0]["types"]), types)
            with open(out, "rb") as f:
                files[recipe] = f.read()
        with open(model("qwen3_next"), "rb") as f:
            self.assertEqual(files["f32"], f.read())
        self.run_cli("quantize", model("qwen3_next"), out, "--threads", "3")
        with open(out, "rb") as f:
            self.assertEqual(f.read(), files["q4"])
        self.assertEqual(os.listdir(self.folder), ["q.q3n"])

    def test_quantize_errors(self):
        q4, out = os.path.join(self.folder, "q4.q3n"), os.path.join(self.folder, "out.q3n")
        self.run_cli("quantize", model("qwen3_dense"), q4)
        self.run_cli("quantize", q4, out, "--type", "q6", status=1)
        self.assertIn("quantised already", self.error)
        self.assertIn("--allow-requantize", self.error)
        self.assertFalse(os.path.exists(out))
        self.run_cli("quantize", q4, out, "--type", "q6", "--allow-requantize")
        self.run_cli("quantize", q4, out, "--type", "q5", status=2)
        self.assertIn("'q5' is none of q8, q6, q4", self.error)
        self.run_cli("quantize", q4, status=2)
        self.run_cli("quantize", os.path.join(self.folder, "none.q3n"), out, status=1)
        self.run_cli("quantize", q4, os.path.join(self.folder, "no", "x.q3n"), status=1)
        self.assertEqual(sorted(os.listdir(self.folder)), ["out.q3n", "q4.q3n"])

    def test_presets(self):
        text = self.run_cli("init", "--list").decode()
        for name in ("tiny", "small", "80b", "80b_a3b", "qwen3-next-80b-a3b", "g1", "g2", "g3"):
            self.assertIn("\n%s " % name, "\n" + text)

    def test_info(self):
        for name in FAMILIES + ["stories", "qwen3_next_cls"]:
            info = self.json_lines("info", model(name), "--json", "--tensors", "--ctx", "100",
                                   "--snapshots", "3")[0]
            session, plan = info["session"], info["plan"]
            self.assertEqual(session["capacity"], 100)
            parts = ("kv_cache", "delta_state", "conv_state", "scratch", "other")
            self.assertEqual(sum(session[part] for part in parts), session["total"])
            self.assertTrue(0 < session["initial"] <= session["total"])
            self.assertEqual(plan["snapshot_bytes"], 3 * session["snapshot"])
            self.assertEqual((plan["weights"], plan["session"]),
                             (info["file_bytes"], session["total"]))
            self.assertEqual(plan["total"], sum(plan[part] for part in
                                                ("weights", "session", "snapshot_bytes")))
            self.assertEqual(info["file_bytes"], os.path.getsize(model(name)))
            self.assertEqual(sum(t["tensors"] for t in info["types"].values()),
                             len(info["tensors"]))
            self.assertGreaterEqual(info["parameters"], info["active_parameters"])
            text = self.run_cli("info", model(name), "--tensors").decode("utf-8")
            self.assertIn("embed_tokens.weight", text)
            self.assertIn("hidden_size", text)

    def test_plan(self):
        def total(*args):
            return self.json_lines("info", model("stories"), "--json", *args)[0]["plan"]["total"]
        self.assertLess(total("--ctx", "300"), total())
        self.assertLess(total("--kv", "q8"), total())
        self.assertLess(total("--batch", "64"), total())
        self.assertLess(total(), total("--speculate", "mtp"))
        self.assertLess(total("--snapshots", "2", "--snapshot-type", "bf16"),
                        total("--snapshots", "2"))
        text = self.run_cli("info", model("stories"), "--ctx", "1000", "--snapshots", "2").decode()
        for word in ("weights, mapped", "session of 1000 tokens", "2 snapshots", "total"):
            self.assertIn(word, text)

    def check_share(self, got, size, tok_s, gb_s):
        want = statistics.median(1e-9 * size * a / b for a, b in zip(tok_s, gb_s))
        self.assertAlmostEqual(got, want, delta=1e-3 * want)

    def check_bench(self, got, prefill, decode):
        self.assertGreater(got["read_gb_s"], 0)
        self.assertEqual([(x["n"], x["threads"]) for x in got["prefill"]], prefill)
        self.assertEqual([(x["depth"], x["threads"]) for x in got["decode"]], decode)
        for row in got["prefill"] + got["decode"]:
            self.assertTrue(0 < row["tok_s_min"] <= row["tok_s"] <= row["tok_s_max"])
            self.assertEqual(len(row["tok_s_samples"]), got["repeats"])
            self.assertAlmostEqual(statistics.median(row["tok_s_samples"]), row["tok_s"],
                                   delta=1e-4 * row["tok_s"])
        for row in got["prefill"]:
            self.assertGreater(row["gmac_s"], 0)
        for row in got["decode"]:
            self.assertAlmostEqual(row["gb_s"], 1e-9 * row["bytes"] * row["tok_s"],
                                   delta=1e-3 * row["gb_s"])
            read = next(x for x in got["read"] if x["threads"] == row["threads"])
            self.assertEqual(len(read["gb_s_samples"]), got["repeats"])
            before, after = (row["roof_gb_s_samples"][i::2] for i in (0, 1))
            self.check_share(row["roof_share"], row["bytes"], row["tok_s_samples"],
                             [(a + b) / 2 for a, b in zip(before, after)])
            self.assertRegex(row["roof_loop"], "^(stream|ahead|pages)(-avx2|-avx512)?$")
            if got["cache_bytes"]:
                self.assertTrue(0 <= row["memory_bytes"] <= row["bytes"])
                self.assertTrue(row["bytes"] <= row["memory_bytes"] + got["cache_bytes"])
                self.check_share(row["memory_share"], row["memory_bytes"], row["tok_s_samples"],
                                 read["gb_s_samples"])
            else:
                self.assertEqual((row["memory_bytes"], row["memory_share"]), (None, None))
        self.assertTrue(0 < got["open_s"] < got["first_token_s"])
        self.assertTrue(got["cpu"] and got["compiler"] and got["cpus"] > 0)
        self.assertIn(got["isa"], self.isas())

    def test_bench(self):
        path = self.make()
        got = self.json_lines("bench", path, "-p", "16,32", "-n", "4", "-t", "1,2",
                              "--depth", "0,20", "-r", "2", "--json")[0]
        self.check_bench(got, [(16, 1), (16, 2), (32, 1), (32, 2)],
                         [(0, 1), (0, 2), (20, 1), (20, 2)])
        info = self.json_lines("info", path, "--json", "--tensors")[0]
        self.assertEqual(got["file_bytes"], os.path.getsize(path))
        self.assertEqual((got["type"], got["repeats"]), ("bf16", 2))
        bits = 8 * sum(t["bytes"] for t in info["tensors"])
        weights = sum(t["elements"] for t in info["types"].values())
        self.assertAlmostEqual(got["bits_per_weight"], bits / weights, places=3)
        self.assertGreater(got["peak_rss_bytes"], got["file_bytes"] / 4)
        # States and half of the four tokens come to the weights, 16 more tokens to the caches.
        decode = {(x["depth"], x["threads"]): x["bytes"] for x in got["decode"]}
        self.assertGreater(decode[0, 1], info["decode_bytes"])
        self.assertGreater(decode[20, 1], decode[0, 1])
        self.assertEqual(decode[20, 1], decode[20, 2])

    def test_bench_preset(self):
        args = ["--preset", "tiny", "--vocab", "300", "--layers", "2", "--hidden-size", "64",
                "--set", "moe_intermediate_size=32"]
        got = self.json_lines("bench", *args, "--type", "f32", "-p", "8", "-n", "2", "-t", "1",
                              "-r", "1", "--json")[0]
        self.check_bench(got, [(8, 1)], [(0, 1)])
        path = self.make("--type", "f32", "--name", "tiny")
        self.assertEqual((got["model"], got["type"], got["file_bytes"]),
                         ("tiny", "f32", os.path.getsize(path)))

    def test_bench_parts(self):
        path = self.make()
        got = self.json_lines("bench", path, "-p", "0", "-n", "2", "-t", "1", "-r", "9",
                              "--limit", "0", "--json")[0]
        self.check_bench(got, [], [(0, 1)])
        self.assertEqual(got["repeats"], 1)
        got = self.json_lines("bench", path, "-p", "5", "-n", "0", "-t", "1", "-r", "1",
                              "--json")[0]
        self.check_bench(got, [(5, 1)], [])
        text = self.run_cli("bench", path, "-p", "8", "-n", "2", "-t", "1", "-r", "1").decode()
        for word in ("bits a weight", "resident", "from memory", "prefill", "GMAC/s",
                     "of the roof"):
            self.assertIn(word, text)

    def test_bench_read(self):
        got = self.json_lines("bench", "--read", "-t", "1,2", "-r", "1", "--json")[0]
        rows = got["bandwidth"]
        loops = {row["loop"] for row in rows}
        self.assertTrue({"stream", "stream-avx512"} & loops)
        self.assertEqual(len(rows), len({(r["threads"], r["bytes"], r["memory"], r["loop"])
                                         for r in rows}))
        self.assertEqual(len(rows), 2 * 8 * len(loops))
        for row in rows:
            self.check_samples(row, "gb_s", 1)
        memory = {row["bytes"] for row in rows if row["memory"]}
        self.assertEqual(len(memory), 1)
        self.assertGreaterEqual(max(memory), min(4 * (got["cache_bytes"] or 0), 1 << 28))
        text = self.run_cli("bench", "--read", "-t", "1", "-r", "1").decode()
        for word in ("1 threads, GB/s", "128 MB", "memory", "stream"):
            self.assertIn(word, text)
        self.run_cli("bench", "--read", model("stories"), status=2)
        self.run_cli("bench", "--read", "--mtp", status=2)

    def check_samples(self, row, key, n):
        samples = row[key + "_samples"]
        self.assertEqual(len(samples), n)
        self.assertTrue(0 < row[key + "_min"] <= row[key] <= row[key + "_max"])
        self.assertAlmostEqual(statistics.median(samples), row[key], delta=1e-4 * row[key])

    def test_bench_batch(self):
        args = ["bench", self.make(), "--batch", "3,2", "-n", "2", "-d", "0,5", "-t", "1,2",
                "--batch-size", "16"]
        got = self.json_lines(*args, "-r", "2", "--json")[0]
        self.assertEqual([(x["threads"], x["depth"], x["sessions"]) for x in got["batch"]],
                         [(t, d, n) for t in (1, 2) for d in (0, 5) for n in (1, 3, 2)])
        for row in got["batch"]:
            self.check_samples(row, "tok_s", 2)
            self.check_samples(row, "ratio", 2)
        self.assertEqual(got["batch"][0]["ratio"], 1)
        text = self.run_cli(*args, "-r", "1").decode()
        self.assertRegex(text, r"3 sessions .* tokens/s .* each .* x one")

    def test_bench_drafts(self):
        args = ["bench", model("stories"), "--mtp", "-n", "12", "-t", "1", "--draft", "2"]
        got = self.json_lines(*args, "-r", "2", "--json")[0]
        self.assertEqual([x["speculate"] for x in got["drafts"]], ["off", "mtp", "lookup", "auto"])
        self.assertEqual((got["equal"], got["texts"]), (True, 4))
        for row in got["drafts"]:
            self.check_samples(row, "tok_s", 2)
            self.check_samples(row, "ratio", 2)
            self.assertEqual(row["tokens"], 2 * 4 * 12)
            self.assertTrue(0 <= row["accepted"] <= row["drafted"])
            self.assertLessEqual(row["steps"], row["tokens"])
        self.assertEqual((got["drafts"][0]["ratio"], got["drafts"][0]["drafted"]), (1, 0))
        self.assertGreater(got["drafts"][1]["drafted"], 0)
        text = self.run_cli("bench", "--preset", "g2", "--layers", "2", "--vocab", "300",
                            "--hidden-size", "64", "--experts", "12", "--set",
                            "moe_intermediate_size=32", "--mtp", "-p", "5", "-n", "4", "-t", "1",
                            "-r", "1").decode()
        self.assertRegex(text, r"drafts mtp .* x off .* accepted")
        self.assertIn("the same 4 tokens after each of 1 texts", text)

    def test_bench_session(self):
        for path in (self.make(), model("stories")):
            args = ["bench", path, "--session", "-p", "40", "-n", "6", "-t", "1", "-r", "1"]
            got = self.json_lines(*args, "--json")[0]
            self.assertEqual(got["length"], 460)
            self.assertEqual([(t["tokens"], t["reused"]) for t in got["turns"]],
                             [(46 * i + 40, 46 * i) for i in range(10)])
            for turn in got["turns"]:
                for key in ("prefill_s", "read_s", "ratio"):
                    self.check_samples(turn, key, 1)
                # An allocation has a head, which the plan leaves to the allocator.
                self.assertAlmostEqual(turn["allocated"], turn["planned"],
                                       delta=0.02 * turn["planned"])
            states = {x["what"]: x for x in got["states"]}
            self.assertEqual(list(states), ["snapshot", "restore", "fork", "rewind 1", "rewind",
                                            "save", "load", "evaluate"])
            for what in ("snapshot", "restore", "fork", "save", "load"):
                self.assertGreater(states[what]["bytes"], 0)
            self.assertAlmostEqual(got["memory"]["snapshot"], got["memory"]["snapshot_planned"],
                                   delta=0.1 * got["memory"]["snapshot"])
        text = self.run_cli(*args, quiet=False).decode()
        for word in ("turn 10", "all again", "the same bits", "rewind 230", "GB/s", "planned"):
            self.assertIn(word, text)


# What a llama-bench program prints, here for any model; the speed is its first thread count.
PEER = """#!/usr/bin/env python3
import json, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--help" in sys.argv:
    sys.exit(print("-d, --n-depth"))
if "broken" in args["-m"]:
    sys.exit("cannot load it")
def row(n_prompt, n_gen):
    return {"n_prompt": n_prompt, "n_gen": n_gen, "n_threads": int(args["-t"]),
            "samples_ts": [float(args["-speed"])] * int(args["-r"])}
print(json.dumps([row(512, 0), row(0, 64)]))
"""


# Runs the command line: models that it makes are smaller than they were to be.
SMALLER = """if [ "$1" = init ]; then set -- "$@" --vocab 2000 --hidden-size 64; fi
exec %s "$@"
"""


class BenchToolsTest(CliTest):
    """tools/bench_table.py with peers that are scripts, tools/plot_bench.py on what it writes."""

    def tool(self, name, *args, status=0):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "tools", name)] + list(args),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                              universal_newlines=True)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stdout if status == 0 else done.stderr

    @unittest.skipIf(len(COMMAND) > 1, "too slow under an emulator")
    def test_table_and_plot(self):
        peer = self.file("llama-bench", PEER)
        os.chmod(peer, 0o755)
        for name in ("tiny-bf16.gguf", "tiny-bf16-broken.gguf", "tiny-f16.gguf"):
            self.file(name, b"")
        out = os.path.join(self.folder, "out")
        smaller = self.file("q3n", SMALLER % " ".join(COMMAND))
        text = self.tool("bench_table.py", "--q3n", "sh " + smaller, "--geometries", "tiny",
                         "--types", "q99 bf16", "--repeat", "2", "--rounds", "2", "--threads", "1",
                         "--models", self.folder, "--out", out, "--peer", "a=%s %s" % (peer, peer),
                         "--peer-models", self.folder, "--peer-args",
                         "a: -speed 0.5; %s: -speed 1e9" % os.path.basename(self.folder))
        self.assertIn("tiny q99", text)
        self.assertRegex(text, r"(?m)^tiny bf16 +1 .* %")
        self.assertRegex(text, r"(?m)^  a bf16 +1 .* \d\d+\.\d\dx")
        self.assertRegex(text, r"(?m)^  \S+ bf16 +1 .* 0\.00x 0\.00x")
        self.assertIn("failed: cannot load it", text)
        result = load(out, "tiny-bf16.json")
        self.assertEqual((len(result["decode"][0]["tok_s_samples"]), result["repeats"]), (2, 2))
        files = [os.path.join(out, name) for name in sorted(os.listdir(out))]
        self.assertEqual(len(files), 3)
        picture = os.path.join(self.folder, "bench.svg")
        self.tool("plot_bench.py", *files, "-o", picture, "--title", "a < b & c")
        root = xml.etree.ElementTree.parse(picture).getroot()
        lines = root.findall("{http://www.w3.org/2000/svg}polyline")
        self.assertEqual(len(lines), 3 * len(files))

    def test_errors(self):
        for tool, args, word in [
                ("plot_bench.py", [self.file("a.json", "{}")], "a.json"),
                ("plot_bench.py", ["/no/such.json"], "/no/such.json"),
                ("bench_table.py", ["--peer", "x=/no/such/program"], "/no/such/program"),
                ("bench_table.py", ["--peer", sys.executable], "PEER_MODELS")]:
            self.assertIn(word, self.tool(tool, *args, status=1))


if __name__ == "__main__":
    unittest.main()
