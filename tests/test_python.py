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
        with self.model.session(capacity=64) as small, self.model.session(capacity=600) as large:
            self.assertEqual((small.capacity, large.capacity), (64, 600))
            self.assertEqual(small.memory["delta_state"], large.memory["delta_state"])
            self.assertLess(small.memory["total"], large.memory["total"])
            parts = ("kv_cache", "delta_state", "conv_state", "scratch", "other")
            self.assertEqual(sum(small.memory[part] for part in parts), small.memory["total"])
            self.assertLess(large.memory["initial"], large.memory["total"])
            self.assertGreater(large.memory["snapshot"], 0)
        with self.model.session() as session:
            self.assertEqual(session.capacity, self.model.config["max_position_embeddings"])

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


class Sessions(unittest.TestCase):
    """stories: going back, copies, files, caches, batches and drafts give what evaluation gives."""

    @classmethod
    def setUpClass(cls):
        text = golden("examples", "stories", "golden.json")
        cls.ids, cls.greedy = text["valid_ids"][:330], text["greedy"]
        cls.model = qwen3next.Model(MODELS / "stories.q3n")
        cls.want = {n: cls.evaluate(n) for n in (1, 100, 280, 330)}

    @classmethod
    def tearDownClass(cls):
        cls.model.close()

    @classmethod
    def evaluate(cls, n):
        with cls.model.session() as session:
            return session.logits(cls.ids[:n])

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def check(self, session, n):
        self.assertEqual((len(session), session.tokens()), (n, self.ids[:n]))
        self.assertEqual(session.logits(), self.want[n])

    def test_feed_and_rewind(self):
        for options in ({}, {"snapshot_bytes": 1 << 24}):
            with self.subTest(options), self.model.session(**options) as session:
                self.assertEqual(session.feed(self.ids[:280]), 0)
                self.check(session, 280)
                self.assertEqual(session.feed(self.ids), 280)
                self.check(session, 330)
                session.rewind(280)
                self.check(session, 280)
                session.rewind(1)
                self.check(session, 1)
                session.rewind(0)
                self.assertEqual((len(session), session.tokens()), (0, []))
                with self.assertRaises(qwen3next.Error):
                    session.logits()
                with self.assertRaises(qwen3next.Error):
                    session.rewind(1)

    def test_snapshot_and_fork(self):
        with self.model.session() as session, self.model.session() as other:
            session.logits(self.ids[:280])
            snapshot = session.snapshot()
            self.assertEqual(len(snapshot), 280)
            self.assertGreater(snapshot.bytes, 0)
            session.logits(self.ids[280:])
            fork = session.fork()
            session.restore(snapshot)
            self.check(session, 280)
            self.check(fork, 330)
            session.close()
            other.restore(snapshot)
            other.logits(self.ids[280:])
            self.check(other, 330)
            snapshot.close()
            fork.close()

    def test_save_and_load(self):
        path = self.folder / "session"
        with self.model.session(snapshot_type="bf16") as session:
            session.logits(self.ids[:280])
            session.save(path)
        size = path.stat().st_size
        with self.model.session() as session:
            session.load(path)
            rounded = session.logits(self.ids[280:])
            self.assertLess(max(abs(a - b) for a, b in zip(rounded, self.want[330])), 0.1)
            session.rewind(0)
            session.logits(self.ids[:280])
            session.save(path)
        self.assertEqual(path.stat().st_size, size)      # files are exact, whatever snapshots are
        with self.model.session() as session:
            session.load(path)
            self.check(session, 280)
            self.assertEqual(session.feed(self.ids), 280)
            self.check(session, 330)
            path.write_bytes(path.read_bytes()[:-1])
            with self.assertRaises(qwen3next.Error):
                session.load(path)
            self.check(session, 330)
        with qwen3next.Model(MODELS / "qwen3_next.q3n") as model, model.session() as session:
            with self.assertRaises(qwen3next.Error) as caught:
                session.load(self.folder / "none")
            self.assertEqual(caught.exception.code, -3)

    def test_cancel(self):
        with self.model.session() as session:
            session.logits(self.ids[:100])
            session.cancel()
            with self.assertRaises(qwen3next.Error) as caught:
                session.logits(self.ids[100:])
            self.assertEqual(caught.exception.code, -9)
            session.cancel()
            session.cancel(False)
            self.check(session, 100)
            session.logits(self.ids[100:])
            self.check(session, 330)

    def test_cache(self):
        with self.model.cache(1 << 26, directory=self.folder) as cache:
            with self.model.session(cache=cache) as session:
                self.assertEqual(session.feed(self.ids[:280]), 0)
            with self.model.session(cache=cache) as session:
                self.assertEqual(session.reuse(self.ids), 280)
                self.assertEqual(session.feed(self.ids), 280)
                self.check(session, 330)
                session.keep()
            stats = cache.stats()
            self.assertGreater(stats["n_hits"], 0)
            self.assertTrue(0 < stats["bytes"] <= 1 << 26)
            orphan = self.model.session(cache=cache)
        with self.assertRaises(ValueError):
            len(orphan)
        self.assertTrue(list(self.folder.iterdir()))
        with self.model.cache(1 << 26, directory=self.folder) as cache:
            self.assertGreater(cache.stats()["n_files"], 0)
            with self.model.session(cache=cache) as session:
                self.assertEqual(session.feed(self.ids), 330)
                self.check(session, 330)
            cache.clear()
            self.assertEqual(cache.stats()["bytes"], 0)

    def test_batch(self):
        with self.model.batch(n_threads=2) as batch:
            sessions = [self.model.session(shared=batch) for _ in range(3)]
            items = batch.eval(zip(sessions, (self.ids[:100], self.ids[:280], self.ids)))
            for item, n in zip(items, (100, 280, 330)):
                self.check(item.session, n)
                self.assertEqual(item.logits, self.want[n])
            for session in sessions:
                session.reset()
            items = [qwen3next.BatchItem(sessions[0], self.ids[:280]),
                     qwen3next.BatchItem(sessions[1], self.ids[:1], logits=False)]
            batch.eval(items, max_tokens=20)
            self.assertEqual(sum(item.done for item in items), 20)
            self.assertIsNone(items[0].logits)
            batch.eval(items)
            self.check(sessions[0], 280)
            self.assertIsNone(items[1].logits)
            with self.assertRaises(qwen3next.Error) as caught:
                batch.eval([(sessions[0], [1]), (sessions[0], [2])])
            self.assertEqual(caught.exception.code, -1)
            batch.cancel()
            with self.assertRaises(qwen3next.Error) as caught:
                batch.eval([(sessions[0], self.ids[280:])])
            self.assertEqual(caught.exception.code, -9)
            self.check(sessions[0], 280)

    def test_drafts(self):
        prompt, want = self.greedy[0]["prompt_ids"], self.greedy[0]["output_ids"]
        for how in qwen3next.SPECULATE:
            with self.subTest(how), self.model.session(speculate=how) as session:
                ids = list(session.generate_ids(prompt, len(want), stop_at_eos=False))
                self.assertEqual(ids, want)
                self.assertEqual(session.tokens(), prompt + want[:-1])
                counts = session.speculation()
                self.assertEqual(counts["n_tokens"], len(want) - 1)
                self.assertTrue(0 <= counts["n_accepted"] <= counts["n_drafted"])
                if how == "off":
                    self.assertEqual(counts["n_drafted"], 0)
        with self.model.session(speculate="mtp", draft=2) as session:
            session.logits(prompt)
            self.assertEqual(len(session.draft(want[0], 3)), 3)
            self.assertEqual(session.tokens(), prompt)
        with self.assertRaises(ValueError):
            self.model.session(speculate="none such")


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
