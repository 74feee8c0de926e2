"""examples/python/qwen3next.py: golden numbers, tokens, text and errors as Python sees them."""
import array
import ctypes
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "models"
sys.path.insert(0, str(ROOT / "examples" / "python"))

import qwen3next  # noqa: E402


def golden(*path):
    return json.loads(ROOT.joinpath(*path).read_text(encoding="utf-8"))


class Layout(unittest.TestCase):
    """The structs that Python mirrors have the header's sizes and offsets."""

    def test_structs(self):
        source = '#include <stdio.h>\n#include "qwen3next.h"\nint main(void)\n{\n'
        want = []
        for name, struct in qwen3next.STRUCTS.items():
            source += '    printf("%%zu\\n", sizeof(%s));\n' % name
            want.append(ctypes.sizeof(struct))
            for field, _ in struct._fields_:
                source += '    printf("%%zu\\n", offsetof(%s, %s));\n' % (name, field)
                want.append(getattr(struct, field).offset)
        with tempfile.TemporaryDirectory() as folder:
            c_file, program = os.path.join(folder, "layout.c"), os.path.join(folder, "layout")
            pathlib.Path(c_file).write_text(source + "    return 0;\n}\n", encoding="utf-8")
            subprocess.run([os.environ.get("CC", "cc"), "-std=c11", "-I", str(ROOT), c_file, "-o",
                            program], check=True)
            out = subprocess.run([program], stdout=subprocess.PIPE, check=True).stdout
        self.assertEqual(want, [int(line) for line in out.split()])

    def test_config_has_every_field(self):
        text = (ROOT / "qwen3next.h").read_text(encoding="utf-8")
        listed = text.split("#define Q3N_CONFIG_LIST(X)")[1].split("\n\n")[0]
        names = [line.split("(")[1].split(",")[1].strip() for line in listed.splitlines()
                 if "X(" in line]
        mirrored = [name for name, _ in qwen3next._Config._fields_]
        self.assertGreater(len(names), 30)
        self.assertEqual(sorted(names + ["layer_types", "layer_experts"]), sorted(mirrored))


class Golden(unittest.TestCase):
    """qwen3_next: a hybrid with experts, against the reference implementation."""

    @classmethod
    def setUpClass(cls):
        cls.golden = golden("tests", "golden", "qwen3_next", "golden.json")
        cls.model = qwen3next.Model(MODELS / "qwen3_next.q3n")

    @classmethod
    def tearDownClass(cls):
        cls.model.close()

    def assert_logits(self, got, want):
        self.assertEqual(len(got), len(want))
        bound = 5e-5 * max(abs(w) for w in want)
        self.assertLessEqual(max(abs(g - w) for g, w in zip(got, want)), bound)

    def test_last_logits(self):
        with self.model.session(capacity=256) as session:
            for case in self.golden["cases"]:
                session.reset()
                self.assert_logits(session.logits(case["input_ids"]), case["last_logits"])
                self.assertEqual(len(session), len(case["input_ids"]))

    def test_pieces_on_every_thread_count(self):
        case = self.golden["cases"][-1]
        ids, want = case["input_ids"], case["last_logits"]
        for n_threads in (1, 2, 3):
            with self.model.session(capacity=256, batch=32, n_threads=n_threads) as session:
                session.logits(ids[:1])
                session.logits(ids[1:50])
                self.assert_logits(session.logits(ids[50:]), want)

    def test_all_logits(self):
        case = self.golden["cases"][2]
        with self.model.session(capacity=256) as session:
            rows = session.all_logits(case["input_ids"])
        self.assertEqual(len(rows), len(case["input_ids"]))
        self.assertEqual([max(range(len(r)), key=r.__getitem__) for r in rows], case["argmax"])
        self.assert_logits(rows[-1], case["last_logits"])

    def test_greedy(self):
        case = self.golden["greedy"]
        with self.model.session(capacity=256) as session:
            ids = list(session.generate_ids(case["prompt_ids"], len(case["output_ids"]),
                                            stop_at_eos=False))
        self.assertEqual(ids, case["output_ids"])

    def test_config_and_memory(self):
        want = golden("tests", "golden", "qwen3_next", "config.json")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "head_dim"):
            self.assertEqual(self.model.config[name], want[name])
        kinds = [int(k == "linear_attention") for k in want["layer_types"]]
        self.assertEqual(self.model.config["layer_types"], kinds)
        with self.model.session(capacity=64) as small, self.model.session(capacity=128) as large:
            self.assertEqual((small.capacity, large.capacity), (64, 128))
            self.assertEqual(small.memory["delta_state"], large.memory["delta_state"])
            self.assertLess(small.memory["total"], large.memory["total"])
            self.assertEqual(sum(v for k, v in small.memory.items() if k != "total"),
                             small.memory["total"])

    def test_expert_counts(self):
        ids = self.golden["cases"][2]["input_ids"]
        with self.model.session(capacity=256, count_experts=True) as session:
            session.logits(ids)
            counts = session.expert_counts(0)
        self.assertEqual(sum(counts), len(ids) * self.model.config["num_experts_per_tok"])
        with self.model.session(capacity=256) as session:
            self.assertIsNone(session.expert_counts(0))

    def test_scalar_kernels(self):
        case = self.golden["cases"][1]
        with self.model.session(capacity=256, isa="scalar") as session:
            self.assert_logits(session.logits(case["input_ids"]), case["last_logits"])


class Text(unittest.TestCase):
    """stories: tokens and text of a trained model."""

    @classmethod
    def setUpClass(cls):
        cls.greedy = golden("examples", "stories", "golden.json")["greedy"]
        cls.model = qwen3next.Model(MODELS / "stories.q3n")

    @classmethod
    def tearDownClass(cls):
        cls.model.close()

    def test_tokenize(self):
        for case in self.greedy:
            prompt = "<|endoftext|>" + case["prompt"]
            self.assertEqual(self.model.tokenize(prompt), case["prompt_ids"])
            self.assertEqual(self.model.detokenize(case["prompt_ids"]), prompt)
        self.assertEqual(self.model.tokenize(""), [])
        plain = self.model.tokenize("<|endoftext|>", special=False)
        self.assertGreater(len(plain), 1)
        self.assertEqual(self.model.detokenize(plain), "<|endoftext|>")

    def test_generate(self):
        case = self.greedy[0]
        with self.model.session(capacity=512) as session:
            pieces = list(session.generate("<|endoftext|>" + case["prompt"], 48,
                                           stop_at_eos=False))
        self.assertGreater(len(pieces), 10)
        text = "<|endoftext|>" + case["prompt"] + "".join(pieces)
        self.assertTrue(case["text"].startswith(text), text)

    def test_seed(self):
        def story(seed):
            with self.model.session(capacity=512) as session:
                return "".join(session.generate("Once upon a time", 40, temperature=1.0, top_p=0.95,
                                                seed=seed))
        self.assertEqual(story(3), story(3))
        self.assertNotEqual(story(3), story(4))


class Errors(unittest.TestCase):
    def test_bad_files(self):
        with self.assertRaises(qwen3next.Error) as caught:
            qwen3next.Model("no/such/model.q3n")
        self.assertEqual(caught.exception.code, -3)
        data = (MODELS / "qwen3_next.q3n").read_bytes()
        damaged = [(b"not a model at all", -4), (data[:200], -4),
                   (data[:70] + bytes([data[70] ^ 1]) + data[71:], -5)]
        with tempfile.TemporaryDirectory() as folder:
            for n, (content, code) in enumerate(damaged):
                path = pathlib.Path(folder, "%d.q3n" % n)
                path.write_bytes(content)
                with self.subTest(n), self.assertRaises(qwen3next.Error) as caught:
                    qwen3next.Model(path)
                self.assertEqual(caught.exception.code, code, str(caught.exception))
                self.assertGreater(len(str(caught.exception)), 10)

    def test_arguments(self):
        with qwen3next.Model(MODELS / "qwen3_next.q3n") as model:
            with model.session(capacity=8) as session:
                for ids in ([], [-1], [model.vocab_size]):
                    with self.subTest(ids), self.assertRaises(qwen3next.Error) as caught:
                        session.logits(ids)
                    self.assertEqual(caught.exception.code, -1)
                session.logits([1] * 8)
                with self.assertRaises(qwen3next.Error) as caught:
                    session.logits([1])
                self.assertEqual(caught.exception.code, -7)
                self.assertEqual(len(session), 8)
            with self.assertRaises(ValueError):
                model.session(isa="none such")
            with self.assertRaises(ValueError):
                model.sampler().sample(array.array("f", [0.0]))

    def test_closed(self):
        model = qwen3next.Model(MODELS / "qwen3_next.q3n")
        session = model.session(capacity=8)
        model.close()
        model.close()
        for use in (lambda: session.logits([1]), lambda: model.tokenize("a"),
                    lambda: len(session)):
            with self.assertRaises(ValueError):
                use()


if __name__ == "__main__":
    unittest.main()
