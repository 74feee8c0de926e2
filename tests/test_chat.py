#!/usr/bin/env python3
"""q3n render: what it takes and prints, and published chat templates where they are at hand.

Environment: Q3N is the command (build/q3n), Q3N_MODELS the folder with converted models,
Q3N_CHAT the folder with published templates and what transformers makes of them (../shared/chat).
"""
import json
import os
import shlex
import subprocess
import tempfile
import unittest

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
COMMAND = shlex.split(os.environ.get("Q3N", os.path.join(ROOT, "build", "q3n")))
MODELS = os.environ.get("Q3N_MODELS", os.path.join(ROOT, "build", "models"))
PUBLISHED = os.environ.get("Q3N_CHAT", os.path.join(ROOT, os.pardir, "shared", "chat"))
TOKENIZER = os.path.join(MODELS, "tokenizer_qwen3.q3n")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HI = {"messages": [{"role": "user", "content": "Hi"}]}
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


class RenderTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def template(self, text):
        path = os.path.join(self.folder.name, "template.jinja")
        with open(path, "w", encoding="utf-8", newline="") as f:
            f.write(text)
        return path

    def call(self, *args, requests=(HI,), status=0):
        lines = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in requests)
        done = subprocess.run(COMMAND + ["render"] + list(args), input=lines.encode(), check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, status, done.stderr.decode())
        return (done.stdout if status == 0 else done.stderr).decode()

    def lines(self, *args, **kwargs):
        return [json.loads(line) for line in self.call("--jsonl", *args, **kwargs).split("\n")[:-1]]

    def test_prompt(self):
        self.assertEqual(self.call("--template", self.template(CHATML)), PROMPT)

    def test_lines(self):
        bare = {"messages": [], "options": {"add_generation_prompt": False}}
        requests = [HI, bare, "[]\n", "\n", HI]
        got = self.lines("--template", self.template(CHATML), requests=requests)
        self.assertEqual([g.get("prompt") for g in got], [PROMPT, "", None, None, PROMPT])
        self.assertIn("list of messages", got[2]["error"])
        self.assertIn("byte 0", got[3]["error"])

    def test_ids(self):
        request = {"messages": [{"role": "user", "content": "a<|im_end|>"}]}
        args = [TOKENIZER, "--template", self.template(CHATML)]
        safe, = self.lines(*args, requests=[request])
        trusted, = self.lines(*args, "--trust-messages", requests=[request])
        self.assertEqual((safe["ids"].count(151645), trusted["ids"].count(151645)), (1, 2))
        self.assertEqual(safe["prompt"], trusted["prompt"])

    def test_spans(self):
        got, = self.lines("--spans", "--template", self.template("<{{ messages[0].content }}>"))
        self.assertEqual((got["prompt"], got["spans"]), ("<Hi>", [[0, 1, 0], [1, 3, 1], [3, 4, 0]]))

    def test_tokens_and_clock(self):
        path = self.template("{{ bos_token }}{{ eos_token }} {{ strftime_now('%d %b %Y') }}")
        got = self.call("--template", path, "--bos", "<s>", "--eos", "</s>", "--now", "86400")
        self.assertEqual(got, "<s></s> 02 Jan 1970")

    def test_errors(self):
        self.assertIn("line 2: unknown filter 'nosuch'",
                      self.call("--template", self.template("\n{{ x | nosuch }}"), status=1))
        self.assertIn("no tools", self.call("--template", self.template(
            "{{ raise_exception('no tools') }}"), status=1))
        self.assertIn("--template", self.call(status=2))
        self.call("--template", os.path.join(self.folder.name, "nothing"), status=1)

    def test_published(self):
        """Templates as they are published: every text, and errors where transformers errs."""
        golden = os.path.join(PUBLISHED, "golden.json")
        if not os.path.exists(golden):
            self.skipTest("there is no " + golden)
        with open(golden, encoding="utf-8") as f:
            cases = json.load(f)
        by_template = {}
        for case in cases:
            by_template.setdefault(case["template"], []).append(case)
        for name, group in by_template.items():
            requests = [{"messages": c["messages"], "options": c["options"]} for c in group]
            got = self.lines("--template", os.path.join(PUBLISHED, "templates", name),
                             requests=requests)
            self.assertEqual(len(got), len(group))
            for case, made in zip(group, got):
                with self.subTest(template=name, case=case["name"]):
                    self.assertEqual("prompt" in made, case.get("prompt") is not None)
                    self.assertEqual("error" in made, case.get("prompt") is None)
                    self.assertEqual(made.get("prompt"), case.get("prompt"), made.get("error"))
        self.assertEqual(len(cases), 180)


if __name__ == "__main__":
    unittest.main()
