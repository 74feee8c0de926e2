"""The example programs, run as their first comment says."""
import json
import os
import pathlib
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STORIES = "build/models/stories.q3n"


PYTHON = [sys.executable, "-m", "qwen3next"]


def run(*command):
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "examples" / "python"))
    return subprocess.run(command, cwd=str(ROOT), env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)


class Examples(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        text = (ROOT / "examples/stories/golden.json").read_text(encoding="utf-8")
        cls.case = json.loads(text)["greedy"][0]

    def test_greedy_text(self):
        prompt = "<|endoftext|>" + self.case["prompt"]
        for program in ("build/embed", "build/embed_cpp"):
            with self.subTest(program):
                done = run(program, STORIES, prompt, "0")
                self.assertEqual((done.returncode, done.stderr), (0, b""))
                text = prompt + done.stdout.decode("utf-8")
                self.assertTrue(text.startswith(self.case["text"]), text)

    def test_sampled_text(self):
        programs = (["build/embed"], ["build/embed_cpp"], PYTHON)
        texts = []
        for program in programs:
            done = run(*program, STORIES, "Once upon a time")
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            texts.append(done.stdout)
        self.assertGreater(len(texts[0]), 100)
        self.assertEqual(texts[1:], texts[:1] * 2)      # the same seed tells the same story

    def test_errors(self):
        programs = (["build/embed"], ["build/embed_cpp"], PYTHON)
        for program in programs:
            for arguments in (["no-such-file", "text"], ["LICENSE", "text"], []):
                with self.subTest((program, arguments)):
                    done = run(*program, *arguments)
                    self.assertIn(done.returncode, (1, 2))
                    self.assertEqual(done.stdout, b"")
                    self.assertEqual(len(done.stderr.splitlines()), 1)


if __name__ == "__main__":
    unittest.main()
