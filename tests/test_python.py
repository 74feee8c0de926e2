"""examples/python/qwen3next: golden numbers, tokens, text and errors as Python sees them."""
import array
import ctypes
import inspect
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import typing
import unicodedata
import unittest
import unittest.mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "models"
sys.path.insert(0, str(ROOT / "examples" / "python"))

import qwen3next  # noqa: E402


def golden(*path):
    return json.loads(ROOT.joinpath(*path).read_text(encoding="utf-8"))


class Layout(unittest.TestCase):
    """The structs that Python mirrors have the header's sizes and offsets."""

    def c_output(self, lines):
        """The numbers that a C program with the header prints."""
        source = '#include <stdio.h>\n#include "qwen3next.h"\nint main(void)\n{\n'
        with tempfile.TemporaryDirectory() as folder:
            c_file, program = os.path.join(folder, "layout.c"), os.path.join(folder, "layout")
            pathlib.Path(c_file).write_text(source + lines + "    return 0;\n}\n",
                                            encoding="utf-8")
            subprocess.run([os.environ.get("CC", "cc"), "-std=c11", "-I", str(ROOT), c_file, "-o",
                            program], check=True)
            out = subprocess.run([program], stdout=subprocess.PIPE, check=True).stdout
        return [int(line) for line in out.split()]

    def header_structs(self):
        """Names of the fields of every public struct, in the header's order."""
        text = (ROOT / "qwen3next.h").read_text(encoding="utf-8")
        text = text.split("#endif /* QWEN3NEXT_H */")[0]
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        structs = {}
        for name, body in re.findall(r"typedef struct (q3n_\w+) \{(.*?)\} \1;", text, flags=re.S):
            structs[name] = []
            for line in body.split(";"):
                function = re.search(r"\(\*(\w+)\)\(", line)
                words = re.findall(r"(\w+)\s*(?:\[\w+\]\s*)*(?:,|$)", line.strip())
                structs[name] += [function.group(1)] if function else words
        return structs

    def test_structs(self):
        """Sizes, and names, places and sizes of all fields."""
        lines, want, structs = "", [], self.header_structs()
        for name, struct in qwen3next.STRUCTS.items():
            self.assertEqual([field for field, _ in struct._fields_], structs[name], name)
            lines += '    printf("%%zu\\n", sizeof(%s));\n' % name
            want.append(ctypes.sizeof(struct))
            for field, _ in struct._fields_:
                lines += '    printf("%%zu %%zu\\n", offsetof(%s, %s), sizeof ((%s *)0)->%s);\n' % (
                    name, field, name, field)
                want += [getattr(struct, field).offset, getattr(struct, field).size]
        self.assertEqual(want, self.c_output(lines))

    def test_padding(self):
        """Structs that may grow have none: a new field would lie in it, where nobody set it."""
        lines, n = "", 0
        for name, fields in self.header_structs().items():
            if fields[0] != "size":
                continue
            n += 1
            lines += '    printf("%%zu %%zu\\n", sizeof(%s), %s);\n' % (
                name, " + ".join("sizeof ((%s *)0)->%s" % (name, field) for field in fields))
        self.assertGreater(n, 9)
        sizes = self.c_output(lines)
        self.assertEqual(sizes[::2], sizes[1::2])

    def test_constants(self):
        """Enum values and macros, by the names that the header has for them."""
        want = {"Q3N_OK": qwen3next._OK, "Q3N_ERR_FULL": qwen3next._ERR_FULL,
                "Q3N_TOKENIZE_NO_SPECIAL": qwen3next.NO_SPECIAL,
                "Q3N_MAX_DRAFT": qwen3next.MAX_DRAFT,
                "Q3N_SPECULATE_COUNT": len(qwen3next.SPECULATE), "Q3N_ABI": qwen3next.ABI,
                "Q3N_ISA_AUTO": 0}
        for i, name in enumerate(qwen3next.SPECULATE):
            want["Q3N_SPECULATE_" + name.upper()] = i
        lines = "".join('    printf("%%d\\n", (int)(%s));\n' % name for name in want)
        self.assertEqual(self.c_output(lines), list(want.values()))

    def test_signatures(self):
        """Every function has the header's number of arguments, each of its kind."""
        text = (ROOT / "qwen3next.h").read_text(encoding="utf-8")
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        kinds = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "size_t": ctypes.c_size_t,
                 "uint64_t": ctypes.c_uint64, "float": ctypes.c_float, "void": None}

        def kind(declaration):
            if "*" in declaration or "[" in declaration:
                return "pointer"
            words = [w for w in declaration.split() if w != "const"]
            return kinds.get(words[0], ctypes.c_int)         # an enum is an int

        def mirrored(c_type):
            if c_type in (None, *qwen3next._C_INTEGERS, ctypes.c_float):
                return c_type
            return "pointer"

        for name, (result, *arguments) in qwen3next._FUNCTIONS.items():
            found = re.search(r"Q3N_DEF\s+([^;()]*?)\b%s\(([^)]*)\);" % name, text)
            self.assertTrue(found, name)
            declared = [] if found.group(2).strip() == "void" else found.group(2).split(",")
            self.assertEqual(mirrored(result), kind(found.group(1)), name)
            self.assertEqual([mirrored(a) for a in arguments], [kind(d) for d in declared], name)


class Types(unittest.TestCase):
    """Every public function says what it takes and gives, as py.typed promises."""

    def public_functions(self):
        yield "load", qwen3next.load
        for name, c in inspect.getmembers(qwen3next, inspect.isclass):
            if c.__module__ != "qwen3next" or name.startswith("_"):
                continue
            for method, f in inspect.getmembers(c):
                f = f.fget if isinstance(f, property) else f
                if inspect.isfunction(f) and (method in ("__init__", "__len__", "__enter__")
                                              or not method.startswith("_")):
                    yield "%s.%s" % (name, method), f

    def test_every_public_function(self):
        self.assertTrue((ROOT / "examples" / "python" / "qwen3next" / "py.typed").exists())
        n = 0
        for name, f in self.public_functions():
            hints = typing.get_type_hints(f)             # every name in them exists
            want = set(inspect.signature(f).parameters) - {"self"} | {"return"}
            self.assertEqual(set(hints) - {"self"}, want, name)
            n += 1
        self.assertGreater(n, 50)


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
            with self.model.session(capacity=256, batch_size=32, n_threads=n_threads) as session:
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

    def test_score(self):
        case = self.golden["cases"][2]
        ids, want = case["input_ids"], [0.0] + case["token_logprobs"]
        with self.model.session(capacity=256) as session:
            got = session.score(ids[:2]) + session.score(ids[2:])
            self.assertEqual(session.tokens(), ids)
        self.assertEqual(len(got), len(ids))
        for x, y in zip(got, want):
            self.assertAlmostEqual(x, y, delta=1e-3)

    def test_embed(self):
        ids = self.golden["cases"][1]["input_ids"]
        want = self.golden["cases"][1]["hidden_last_token"][-1]
        with self.model.session(capacity=256) as session:
            raw = session.embed(ids, raw=True)
            for x, y in zip(raw, want):
                self.assertAlmostEqual(x, y, delta=1e-4)
            length = math.sqrt(math.fsum(x * x for x in raw))
            for x, y in zip(session.embed(ids), raw):
                self.assertAlmostEqual(x, y / length, delta=1e-6)
            self.assertEqual(session.tokens(), ids)
            self.assertEqual(len(session.embed(ids, pooling="mean")), len(raw))
            self.assertNotEqual(session.embed(ids, pooling="first"), session.embed(ids))
            with self.assertRaises(ValueError):
                session.embed(ids, pooling="none such")

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
        self.assertEqual(self.model.config["layer_experts"], [1] * len(kinds))
        text = (ROOT / "qwen3next.h").read_text(encoding="utf-8")
        rows = re.findall(r"    X\(([IBEF]), +(\w+),", text.split("Q3N_CONFIG_LIST(X)")[1])
        self.assertGreater(len(rows), 30)
        for kind, name in rows:
            self.assertIs(type(self.model.config[name]), float if kind == "F" else int, name)
        self.assertEqual(len(self.model.config), len(rows) + 2)
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
        notes = 50 * "\U0001D160"            # NFC makes three characters of each
        ids = self.model.tokenize(notes)
        self.assertGreater(len(ids), len(notes.encode()) + 32)
        self.assertEqual(self.model.detokenize(ids), unicodedata.normalize("NFC", notes))

    def test_generate(self):
        case = self.greedy[0]
        with self.model.session(capacity=512) as session:
            pieces = list(session.generate("<|endoftext|>" + case["prompt"], 48,
                                           stop_at_eos=False))
        self.assertGreater(len(pieces), 10)
        text = "<|endoftext|>" + case["prompt"] + "".join(pieces)
        self.assertTrue(case["text"].startswith(text), text)
        with self.model.session(capacity=64) as session:
            want = list(session.generate("Once upon", 4))
            for prompt in (b"Once upon", bytearray(b"Once upon"), self.model.tokenize("Once upon")):
                session.reset()
                self.assertEqual(list(session.generate(prompt, 4)), want)
            session.reset()
            for prompt in ("Once upon", b"Once upon", [1.0]):
                with self.assertRaises(TypeError):
                    list(session.generate_ids(prompt, 4))

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

    def test_prefill_and_rewind(self):
        for options in ({}, {"snapshot_bytes": 1 << 24}):
            with self.subTest(options), self.model.session(**options) as session:
                self.assertEqual(session.prefill(self.ids[:280]), 0)
                self.check(session, 280)
                self.assertEqual(session.prefill(self.ids), 280)
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
            self.assertEqual(session.prefill(self.ids), 280)
            self.check(session, 330)
            path.write_bytes(path.read_bytes()[:-1])
            with self.assertRaises(qwen3next.Error):
                session.load(path)
            self.check(session, 330)
        with qwen3next.Model(MODELS / "qwen3_next.q3n") as model, model.session() as session:
            with self.assertRaises(qwen3next.Error) as caught:
                session.load(self.folder / "none")
            self.assertEqual(caught.exception.code, -10)

    def cancel_from_a_thread(self, what, evaluate, again):
        """Evaluate until a request of another thread comes in time; a late one does nothing."""
        def requests():
            while not what.cancel():
                pass

        self.assertFalse(what.cancel())
        thread = threading.Thread(target=requests)
        with self.assertRaises(qwen3next.Error) as caught:
            thread.start()
            while True:
                evaluate()
                again()
        thread.join()
        self.assertEqual(caught.exception.code, -9)
        self.assertFalse(what.cancel())
        again()

    def test_cancel(self):
        with self.model.session() as session:
            session.logits(self.ids[:100])
            self.cancel_from_a_thread(session, lambda: session.logits(self.ids[100:]),
                                      lambda: session.rewind(100))
            self.check(session, 100)
            session.logits(self.ids[100:])
            self.check(session, 330)

    def test_cache(self):
        with self.model.cache(1 << 26, directory=self.folder) as cache:
            with self.model.session(cache=cache) as session:
                self.assertEqual(session.prefill(self.ids[:280]), 0)
            with self.model.session(cache=cache) as session:
                self.assertEqual(session.reuse(self.ids), 280)
                self.assertEqual(session.prefill(self.ids), 280)
                self.check(session, 330)
                session.checkpoint()
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
                self.assertEqual(session.prefill(self.ids), 330)
                self.check(session, 330)
            cache.clear()
            self.assertEqual(cache.stats()["bytes"], 0)

    def test_engine(self):
        with self.model.engine(n_threads=2) as engine:
            with self.assertRaises(qwen3next.Error):           # an engine, and options of another
                self.model.session(engine=engine, n_threads=2)
            sessions = [self.model.session(engine=engine) for _ in range(3)]
            items = engine.eval(zip(sessions, (self.ids[:100], self.ids[:280], self.ids)))
            for item, n in zip(items, (100, 280, 330)):
                self.check(item.session, n)
                self.assertEqual(item.logits, self.want[n])
            for session in sessions:
                session.reset()
            items = [qwen3next.EngineItem(sessions[0], self.ids[:280]),
                     qwen3next.EngineItem(sessions[1], self.ids[:1], logits=False)]
            engine.eval(items, max_tokens=20)
            self.assertEqual(sum(item.done for item in items), 20)
            self.assertIsNone(items[0].logits)
            engine.eval(items)
            self.check(sessions[0], 280)
            self.assertIsNone(items[1].logits)
            with self.assertRaises(qwen3next.Error) as caught:
                engine.eval([(sessions[0], [1]), (sessions[0], [2])])
            self.assertEqual(caught.exception.code, -1)
            self.cancel_from_a_thread(engine, lambda: engine.eval([(sessions[0], self.ids[280:])]),
                                      lambda: sessions[0].rewind(280))
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

    def test_sampler(self):
        prompt = self.greedy[0]["prompt_ids"]
        with self.model.session() as session:
            with self.assertRaises(qwen3next.Error):
                session.decode(1)
            session.set_sampler(temperature=1.0, seed=3)
            first = session.sampler
            a = [first.sample(session.logits(prompt)) for _ in range(20)]
            first.reset()
            self.assertEqual([first.sample(session.logits()) for _ in range(20)], a)
            first.seed(3)
            self.assertEqual([first.sample(session.logits()) for _ in range(20)], a)
            first.seed(4)
            self.assertNotEqual([first.sample(session.logits()) for _ in range(20)], a)
            session.set_sampler()
            with self.assertRaises(ValueError):
                first.sample(session.logits())
            self.assertEqual(session.sampler.sample(session.logits()),
                             self.greedy[0]["output_ids"][0])

    def test_sampler_goes_on(self):
        """Saved, kept and forked: the text that would have been."""
        prompt = self.greedy[0]["prompt_ids"]
        sampling = dict(temperature=1.0, seed=3, repetition_penalty=1.2, penalty_window=20)

        def go_on(session, token, n=20):
            ids = [token]
            while len(ids) <= n:
                ids += session.decode(ids[-1], 1)
            return ids[1:]
        with tempfile.TemporaryDirectory() as folder, self.model.session() as session:
            path = os.path.join(folder, "state")
            token = list(session.generate_ids(prompt, 10, stop_at_eos=False, **sampling))[-1]
            session.save(path)
            snapshot = session.snapshot()
            forks = [session.fork() for _ in range(2)]
            want = go_on(session, token)
            session.restore(snapshot)
            self.assertEqual(go_on(session, token), want)
            self.assertEqual(go_on(forks[0], token), want)
            forks[1].sampler.seed(4)
            self.assertNotEqual(go_on(forks[1], token), want)
            with self.model.session() as other:
                other.set_sampler(**dict(sampling, seed=9))
                other.load(path)
                self.assertEqual(go_on(other, token), want)

    def test_forks_share_a_hook(self):
        class Stop(Exception):
            pass

        def edit(logits, tokens):
            calls.append(threading.get_ident())
            if stop:
                raise Stop()
            logits[7] = math.inf
        calls, stop = [], False
        with self.model.session() as session:
            session.set_sampler(logits_hook=edit)
            session.logits([1, 2])
            fork = session.fork()
            self.assertEqual([session.decode(3, 1), fork.decode(4, 1)], [[7], [7]])
            self.assertEqual(len(calls), 2)
            stop = True
            with self.assertRaises(Stop):
                fork.decode(7, 1)
            stop = False
            self.assertEqual(session.decode(7, 1), [7])
            self.assertEqual((session.tokens(), fork.tokens()), ([1, 2, 3, 7], [1, 2, 4]))

    def test_logits_hook(self):
        """Masks what follows an even token to the odd ones, and the other way round."""
        prompt = self.greedy[0]["prompt_ids"]

        def steer(logits, tokens):
            self.assertEqual(len(logits), self.model.vocab_size)
            last = (session.tokens() + tokens)[-1]
            for i in range(last % 2, len(logits), 2):
                logits[i] = -math.inf
        texts = []
        for how in qwen3next.SPECULATE:
            with self.subTest(how), self.model.session(speculate=how, draft=3) as session:
                ids = list(session.generate_ids(prompt, 30, stop_at_eos=False, logits_hook=steer))
                self.assertEqual(len(ids), 30)
                for last, token in zip(prompt[-1:] + ids, ids):
                    self.assertNotEqual(last % 2, token % 2)
                texts.append(ids)
        self.assertEqual(texts, texts[:1] * len(qwen3next.SPECULATE))
        with self.model.sampler(logits_hook=lambda logits, tokens: logits.__setitem__(5, 1e9)) as s:
            self.assertEqual(s.sample(array.array("f", bytes(4 * self.model.vocab_size))), 5)

    def test_logits_hook_that_raises(self):
        prompt = self.greedy[0]["prompt_ids"]

        class Stop(Exception):
            pass

        def edit(logits, tokens):
            calls.append(tokens)
            if len(calls) == stop:
                raise Stop()
        for how in qwen3next.SPECULATE:
            for stop in range(1, 9):
                calls = []
                with self.subTest(how, stop=stop), \
                        self.model.session(speculate=how, draft=3) as session:
                    session.set_sampler(logits_hook=edit)
                    ids, logits = [], session.logits(prompt)
                    with self.assertRaises(Stop):
                        ids.append(session.sampler.sample(logits))
                        while len(ids) < 30:
                            ids += session.decode(ids[-1])
                    self.assertEqual(session.tokens(), prompt + ids[:-1])
                    ids += session.decode(ids[-1]) if ids else [session.sampler.sample(logits)]
                    self.assertEqual(ids, self.greedy[0]["output_ids"][:len(ids)])


class Arguments(unittest.TestCase):
    """What is not what it stands for is refused, before C sees it."""

    @classmethod
    def setUpClass(cls):
        cls.model = qwen3next.Model(MODELS / "stories.q3n")
        cls.vocab = cls.model.vocab_size

    @classmethod
    def tearDownClass(cls):
        cls.model.close()

    def test_options_that_do_not_exist(self):
        with self.model.session() as session:
            for make in (lambda: self.model.sampler(temprature=5.0),
                         lambda: self.model.session(capasity=8),
                         lambda: self.model.engine(n_thread=1),
                         lambda: self.model.cache(1 << 20, directori="x"),
                         lambda: next(session.generate("a", 2, temprature=1.0)),
                         lambda: next(session.generate_ids([1], 2, topk=1))):
                with self.assertRaises(TypeError):
                    make()

    def test_integers_are_whole_and_fit(self):
        with self.model.session(capacity=16) as session, self.model.sampler() as sampler, \
                self.model.engine() as engine:
            session.logits([1, 2])
            uses = [
                lambda i: self.model.session(capacity=i), lambda i: self.model.session(draft=i),
                lambda i: self.model.session(n_threads=i),
                lambda i: self.model.session(batch_size=i),
                lambda i: self.model.session(snapshot_every=i),
                lambda i: self.model.engine(batch_size=i),
                lambda i: self.model.session(snapshot_bytes=i << 32),
                lambda i: self.model.cache(i << 32),
                lambda i: self.model.cache(1, max_directory_bytes=i << 32),
                lambda i: self.model.sampler(top_k=i), lambda i: self.model.sampler(seed=i << 32),
                lambda i: self.model.sampler(penalty_window=i),
                sampler.accept, session.rewind, session.expert_counts,
                lambda i: session.set_sampler(top_k=i), lambda i: sampler.seed(i << 32),
                lambda i: session.decode(i), lambda i: session.draft(i),
                lambda i: session.decode(1, i), lambda i: session.draft(1, i),
                lambda i: session.logits([i]), lambda i: session.prefill([i]),
                lambda i: self.model.detokenize([i]), lambda i: session.all_logits([i]),
                lambda i: engine.eval([], max_tokens=i),
                lambda i: engine.eval([], max_microseconds=i << 32)]
            for i, use in enumerate(uses):
                with self.subTest(i):
                    for wrong in ((1 << 32) + 64, -(1 << 32) - 1):
                        with self.assertRaises(ValueError) as caught:
                            use(wrong)
                        self.assertIn("is not between", str(caught.exception))
            for use in uses[12:26] + uses[:6]:
                for wrong in (1.0, 1.9, "1", None, [1]):
                    with self.assertRaises(TypeError):
                        use(wrong)
            self.assertEqual(session.tokens(), [1, 2])

    def test_ids(self):
        numpy = None
        try:
            import numpy
        except ImportError:
            pass
        with self.model.session() as session:
            want = session.logits([1, 2, 3])
            good = [(1, 2, 3), array.array("i", [1, 2, 3]), array.array("q", [1, 2, 3]),
                    iter([1, 2, 3])]
            bad = ["abc", b"abc", 5, [1.0], [None], [1, "2"], [[1, 2]], array.array("d", [1.0])]
            if numpy:
                good += [numpy.array([1, 2, 3], t) for t in ("int32", "int64", "uint8")]
                good.append(numpy.array([3, 2, 1])[::-1])
                bad += [numpy.array([1.0]), numpy.array([[1, 2]])]
            for ids in good:
                session.reset()
                self.assertEqual(session.logits(ids), want)
            for ids in bad:
                with self.subTest(repr(ids)), self.assertRaises(TypeError):
                    session.logits(ids)
            self.assertEqual(session.tokens(), [1, 2, 3])

    def test_logits(self):
        numpy = None
        try:
            import numpy
        except ImportError:
            pass
        row = [0.25 * (i % 7) for i in range(self.vocab)]
        row[19] = 100.0
        good = [array.array("f", row), row, tuple(row), bytearray(array.array("f", row))]
        good[3] = memoryview(good[3]).cast("f")
        good.append(good[3].toreadonly())
        bad = [array.array("d", row), array.array("i", [1] * self.vocab), bytes(4 * self.vocab)]
        if numpy:
            good += [numpy.array(row, "float32"), numpy.array(row[::-1], "float32")[::-1]]
            bad += [numpy.array(row), numpy.array(row, "float16"), numpy.array([row], "float32"),
                    numpy.array(row, ">f4")]
        with self.model.sampler() as sampler:
            for logits in good:
                self.assertEqual(sampler.sample(logits), 19)
            for logits in bad:
                with self.subTest(type(logits)), self.assertRaises(TypeError):
                    sampler.sample(logits)
            for logits in (row[1:], row + [0.0], array.array("f", row[1:]), [], [1e300] + row[1:],
                           [10 ** 400] + row[1:]):
                with self.assertRaises(ValueError):
                    sampler.sample(logits)
            sampler.sample([float("-inf")] + row[1:])

    def test_texts_and_names(self):
        for text in (5, None, 1.5, ["a"], [1]):
            with self.subTest(text), self.assertRaises(TypeError):
                self.model.tokenize(text)
        self.assertEqual(self.model.tokenize(bytearray(b"Once")), self.model.tokenize("Once"))
        with self.model.session() as session:
            session.logits([1])
            for use in (session.save, session.load, qwen3next.Model,
                        lambda path: self.model.cache(1 << 20, directory=path)):
                with self.assertRaises(ValueError):
                    use("a\0b")
                with self.assertRaises(TypeError):
                    use(5)
        for name in (5, b"f32"):
            with self.assertRaises(TypeError):
                self.model.session(kv_type=name)
        with self.assertRaises(ValueError):
            self.model.session(kv_type="f32\0")
        with self.assertRaises(ValueError):
            self.model.sampler(temperature=1e300)
        for temperature in ("1", None, 1j):
            with self.assertRaises(TypeError):
                self.model.sampler(temperature=temperature)


HOOK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
                        ctypes.c_int)


@unittest.skipUnless(os.name == "posix", "sends SIGINT to itself")
class Interrupts(unittest.TestCase):
    """A signal that comes in the midst of an evaluation stops it."""

    @classmethod
    def setUpClass(cls):
        cls.ids = golden("examples", "stories", "golden.json")["valid_ids"][:300]
        cls.model = qwen3next.Model(MODELS / "stories.q3n")

    @classmethod
    def tearDownClass(cls):
        cls.model.close()

    def setUp(self):
        self.armed, self.cancelled, self.layers = False, threading.Event(), 0
        cancels = {name: getattr(qwen3next.load(), name)
                   for name in ("q3n_session_cancel", "q3n_engine_cancel")}

        def watched(name):
            def cancel(*args):
                result = cancels[name](*args)
                self.cancelled.set()
                return result
            return cancel
        for name in cancels:
            patch = unittest.mock.patch.object(qwen3next.load(), name, watched(name))
            patch.start()
            self.addCleanup(patch.stop)

        @HOOK
        def after_layer(user, layer, x, n, d):
            self.layers += 1
            if self.armed:
                self.armed = False
                os.kill(os.getpid(), signal.SIGINT)
                self.cancelled.wait(300)
        self.after_layer = after_layer
        hook = qwen3next._LayerHook(layer=ctypes.cast(after_layer, ctypes.c_void_p).value)
        self.options = {"layer_hook": hook, "n_threads": 1, "batch_size": 16}

    def interrupted(self, call, *args):
        self.armed, self.layers = True, 0
        self.cancelled.clear()
        with self.assertRaises(KeyboardInterrupt):
            call(*args)
        self.assertTrue(self.cancelled.is_set())
        self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)

    def test_every_call_that_evaluates(self):
        with self.model.session(**self.options) as session:
            for call in (session.logits, session.prefill, session.all_logits, session.score,
                         lambda ids: next(session.generate_ids(ids, 5))):
                session.reset()
                session._pace = qwen3next._Pace()
                self.interrupted(call, self.ids)
                self.assertEqual(len(session), 0)
                self.assertLess(self.layers, 20)         # of 19 passes through 8 layers
            want = session.logits(self.ids)              # nothing is left of it
            session._pace = qwen3next._Pace()
            self.interrupted(session.rewind, 299)
            self.assertEqual(session.tokens(), self.ids)
            self.assertEqual(session.logits(), want)

    def test_engine(self):
        with self.model.engine(**self.options) as engine, \
                self.model.session(engine=engine) as session:
            self.interrupted(engine.eval, [(session, self.ids)])
            self.assertEqual(len(session), 0)
            self.assertTrue(engine.eval([(session, self.ids)])[0].logits)

    def test_handlers_decide(self):
        """Only one that raises stops the call, with what it raises."""
        seen = []

        def note(number, frame):
            seen.append(number)
            self.cancelled.set()         # the evaluation need not wait any longer

        def refuse(number, frame):
            raise RuntimeError("enough")
        with self.model.session(**self.options) as session:
            want = session.logits(self.ids)
            for handler, error in ((note, None), (refuse, RuntimeError)):
                before = signal.signal(signal.SIGINT, handler)
                try:
                    session.reset()
                    session._pace = qwen3next._Pace()
                    self.cancelled.clear()
                    self.armed = True
                    if error:
                        self.assertRaises(error, session.logits, self.ids)
                        self.assertEqual(len(session), 0)
                    else:
                        self.assertEqual(session.logits(self.ids), want)
                        self.assertEqual(seen, [signal.SIGINT])
                    self.assertIs(signal.getsignal(signal.SIGINT), handler)
                finally:
                    signal.signal(signal.SIGINT, before)

    def test_other_threads(self):
        """They evaluate as they are; the main thread gets the signal."""
        with self.model.session(**self.options) as session:
            got = []
            thread = threading.Thread(target=lambda: got.append(session.logits(self.ids)))
            thread.start()
            thread.join()
            session.reset()
            self.assertEqual(got, [session.logits(self.ids)])

    def test_errors_of_the_call(self):
        with self.model.session(**self.options) as session:
            with self.assertRaises(qwen3next.Error):
                session.logits([])
            session._pace = qwen3next._Pace()
            with self.assertRaises(ValueError):
                session.rewind(1 << 40)


class Loading(unittest.TestCase):
    """Which library is loaded, in programs of their own."""

    def load(self, code="qwen3next.load()", **environment):
        done = subprocess.run([sys.executable, "-c", "import qwen3next; " + code], check=False,
                              env=dict(os.environ, PYTHONPATH=str(ROOT / "examples" / "python"),
                                       **environment),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done.returncode, done.stderr.decode().strip().split("\n")[-1]

    def build(self, folder, text):
        c_file, library = os.path.join(folder, "other.c"), os.path.join(folder, "other.so")
        pathlib.Path(c_file).write_text(text, encoding="utf-8")
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", c_file, "-o", library],
                       check=True)
        return library

    def test_other_libraries(self):
        self.assertEqual(self.load()[0], 0)
        with tempfile.TemporaryDirectory() as folder:
            other = self.build(folder, "int another_function(void) { return 1; }\n")
            for path, words in ((other, "is another library"), ("/no/such.so", "/no/such.so")):
                status, error = self.load(QWEN3NEXT_LIB=path)
                self.assertNotEqual(status, 0)
                self.assertTrue(error.startswith("OSError: "), error)
                self.assertIn(words, error)

    def test_other_versions(self):
        abi = "int q3n_abi_version(void) { return %d; }\n"
        cases = (("", "has not the ABI"), (abi % (qwen3next.ABI + 1), "has not the ABI"),
                 (abi % qwen3next.ABI, "has no function q3n_"))
        with tempfile.TemporaryDirectory() as folder:
            for more, words in cases:
                text = "int q3n_version(void) { return 10203; }\n" + more
                status, error = self.load(QWEN3NEXT_LIB=self.build(folder, text))
                self.assertNotEqual(status, 0)
                self.assertTrue(error.startswith("OSError: "), error)
                self.assertIn(words, error)
                self.assertIn("1.2.3", error)
                self.assertIn("other.so", error)

    def test_a_second_one(self):
        status, error = self.load("qwen3next.load(); qwen3next.load('other.so')")
        self.assertNotEqual(status, 0)
        self.assertIn("is loaded already", error)


class Errors(unittest.TestCase):
    def test_bad_files(self):
        with self.assertRaises(qwen3next.Error) as caught:
            qwen3next.Model("no/such/model.q3n")
        self.assertEqual(caught.exception.code, -10)
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
