#!/usr/bin/env python3
"""Tokenizers and heads from a checkpoint's folder to the library.

What a folder means was measured with Hugging Face tokenizers 0.23.3 and transformers 5.17: ids in
these tests are theirs.  Files are opened with the library, through Python and the command line.
"""
import contextlib
import copy
import ctypes
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [HERE, os.path.join(ROOT, "tools"), os.path.join(ROOT, "examples", "python")]

import convert                   # noqa: E402
import make_fuzz_corpus          # noqa: E402
import matrix                    # noqa: E402
import q3n_file                  # noqa: E402
import qwen3next                 # noqa: E402
import synthetic                 # noqa: E402
import tokenizer_file            # noqa: E402

Q3N = shlex.split(os.environ.get("Q3N", os.path.join(ROOT, "build", "q3n")))
N_WORDS, THINK, END = 262, 262, 263      # of make_fuzz_corpus.tokenizer()
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
VOCAB = 300


def special(name):
    return {"SpecialToken": {"id": name, "type_id": 0}}


def template(single, **ids):
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {
        name: {"id": name, "ids": value, "tokens": [name] * len(value)}
        for name, value in ids.items()}}


def added(content, i, **flags):
    return dict({"id": i, "content": content, "special": False, "single_word": False,
                 "lstrip": False, "rstrip": False, "normalized": False}, **flags)


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="q3n_")
        self.addCleanup(shutil.rmtree, self.dir)
        self.out = os.path.join(self.dir, "out.q3n")
        self.config = synthetic.qwen3_config(vocab_size=VOCAB)
        self.tensors = synthetic.qwen3_tensors(self.config)

    def run_main(self, files, *args):
        """(status, stderr) of a conversion of the checkpoint with these files beside it."""
        folder = os.path.join(self.dir, "model")
        shutil.rmtree(folder, ignore_errors=True)
        synthetic.write_checkpoint(folder, self.config, self.tensors)
        for name, value in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                f.write(value if isinstance(value, str) else json.dumps(value))
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            status = convert.main([folder, self.out] + list(args))
        return status, err.getvalue()

    def open(self, files, *args):
        status, self.messages = self.run_main(files, *args)
        self.assertEqual(status, 0, self.messages)
        model = qwen3next.Model(self.out)
        self.addCleanup(model.close)
        return model

    def fails(self, expected, files, *args):
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.out)
        status, err = self.run_main(files, *args)
        self.assertEqual(status, 1, err)
        lines = [line for line in err.splitlines() if "error:" in line]
        self.assertEqual(len(lines), 1, err)
        for text in (expected,) if isinstance(expected, str) else expected:
            self.assertIn(text, lines[0])
        self.assertFalse(os.path.exists(self.out))

    def program(self, *args):
        run = subprocess.run(Q3N + list(args), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(run.returncode, 0, run.stderr.decode("utf-8", "replace"))
        return run.stdout.decode("utf-8")

    def json(self, **changes):
        value = make_fuzz_corpus.tokenizer()
        value["model"].update(changes.pop("model", {}))
        return {"tokenizer.json": dict(value, **changes)}


class Components(Case):
    """Every component of tokenizer.json is followed, refused in one line, or said."""

    def test_refused(self):
        steps = make_fuzz_corpus.tokenizer()["pre_tokenizer"]["pretokenizers"]
        sequence = {"type": "Sequence", "pretokenizers": steps}
        cases = (
            (dict(extra={"a": 1}), "extra: found"),
            (dict(model={"new_option": 2}), "new_option: found 2, expected none"),
            (dict(model={"type": "WordPiece"}), "type: found 'WordPiece'"),
            (dict(model={"dropout": 0.1}), "dropout: found 0.1"),
            (dict(model={"ignore_merges": True}), "ignore_merges"),
            (dict(model={"byte_fallback": True}), "byte_fallback"),
            (dict(model={"continuing_subword_prefix": "##"}), "continuing_subword_prefix"),
            (dict(model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix"),
            (dict(normalizer={"type": "Lowercase"}), "normalizer"),
            (dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"},
                                                                  {"type": "Strip"}]}), "NFC"),
            (dict(pre_tokenizer=None), "pre_tokenizer"),
            (dict(pre_tokenizer=steps[1]), "pre_tokenizer"),
            (dict(pre_tokenizer=dict(sequence, pretokenizers=steps[::-1])), "pre_tokenizer"),
            (dict(pre_tokenizer=dict(sequence, pretokenizers=[
                dict(steps[0], behavior="Removed"), steps[1]])), "Isolated"),
            (dict(pre_tokenizer=dict(sequence, pretokenizers=[
                steps[0], dict(steps[1], add_prefix_space=True)])), "pre_tokenizer"),
            (dict(decoder={"type": "Metaspace"}), "decoder"),
            (dict(post_processor={"type": "Other"}), "post_processor"),
            (dict(post_processor={"type": "Sequence", "processors": [
                template([TEXT]), template([TEXT])]}), "one step"),
            (dict(post_processor=template([special("e")], e=[1])), "the text A"),
            (dict(post_processor=template([TEXT, TEXT])), "the text A once"),
            (dict(post_processor=template([TEXT, special("e")])), "special_tokens: e: found None"),
            (dict(post_processor=template([TEXT, special("e")], e=[VOCAB])),
             ("tokenizer_suffix", "less than vocab_size")),
            (dict(post_processor=template([TEXT, special("e")], e=[1] * 17)),
             ("tokenizer_suffix", "at most 16")),
            (dict(post_processor={"type": "BertProcessing", "sep": ["a"], "cls": ["b", 1]}),
             "sep: found ['a']"),
        )
        for changes, expected in cases:
            with self.subTest(expected):
                self.fails(expected, self.json(**changes))

    def test_without_effect(self):
        """What changes no id of a text is taken."""
        want = self.open(self.json()).tokenize("hello there, caf\u00e9")
        level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                 "use_regex": True}
        for changes in (dict(model={"unk_token": "<unk>", "fuse_unk": True}), dict(decoder=None),
                        dict(model={"dropout": 0.0, "continuing_subword_prefix": ""}),
                        dict(post_processor=None), dict(post_processor=level),
                        dict(decoder={"type": "Sequence", "decoders": [level]}),
                        dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})):
            with self.subTest(changes):
                model = self.open(self.json(**changes))
                self.assertEqual(model.tokenize("hello there, caf\u00e9", prefix=True,
                                                suffix=True), want)
                self.assertEqual(self.messages.count("warning"), 0)

    def test_said(self):
        for key, value in (("truncation", {"max_length": 2}), ("padding", {"pad_id": 0})):
            model = self.open(self.json(**{key: value}))
            self.assertIn("warning: ", self.messages)
            self.assertIn("%s is not applied" % key, self.messages)
            self.assertEqual(len(model.tokenize("a b c")), 5)

    def test_post_processor(self):
        """Ids before and after a text, as tokenizers' encode(text) has them."""
        level = make_fuzz_corpus.tokenizer()["post_processor"]
        suffix = template([TEXT, special("e")], e=[END])
        bert = {"type": "BertProcessing", "sep": ["s", 5], "cls": ["c", 6]}
        cases = ((suffix, [], [END]), (template([special("e"), TEXT, special("e")], e=[END, THINK]),
                                       [END, THINK], [END, THINK]),
                 (template([TEXT, special("e")], e=[]), [], []), (bert, [6], [5]),
                 (dict(bert, type="RobertaProcessing"), [6], [5]),
                 ({"type": "Sequence", "processors": [level, suffix]}, [], [END]))
        for processor, before, after in cases:
            with self.subTest(processor):
                model = self.open(self.json(post_processor=processor))
                hello = model.tokenize("hello")
                self.assertEqual(hello, [260])
                for prefix in (False, True):
                    for end in (False, True):
                        around = [before if prefix else [], after if end else []]
                        self.assertEqual(model.tokenize("hello", prefix=prefix, suffix=end),
                                         around[0] + hello + around[1])
                        self.assertEqual(model.tokenize("", prefix=prefix, suffix=end), sum(
                            around, []))

    def test_command_line(self):
        """tokenize gives a whole text, run and logits a text that goes on."""
        self.open(self.json(post_processor=template(
            [special("b"), TEXT, special("e")], b=[7], e=[END])))
        self.assertEqual(self.program("tokenize", self.out, "hello").split(), ["7", "260", "263"])
        self.assertEqual(self.program("tokenize", self.out, "--no-add-special", "hello").split(),
                         ["260"])
        for args in (("logits", self.out, "--json"), ("run", self.out, "--json", "--greedy", "-n",
                                                      "3", "-q")):
            for ids, text in (("7,260", ("-p", "hello")),
                              ("260", ("-p", "hello", "--no-add-special"))):
                want = json.loads(self.program(*args + ("--ids", ids)))
                got = json.loads(self.program(*args + text))
                self.assertEqual({key: got[key] for key in want}, want)
        info = self.program("info", self.out)
        self.assertRegex(info, "put before a text +7 ")
        self.assertRegex(info, r"put after a text +263 <\|end\|>")

    def test_append(self):
        """What goes behind a session's text has nothing before it."""
        self.open(self.json(post_processor=template([special("b"), TEXT], b=[7])))
        session = os.path.join(self.dir, "s.q3s")
        run = ("run", self.out, "-q", "--greedy", "-n", "0", "--session", session, "--append")
        self.program(*run + ("-p", "hello"))
        self.program(*run + ("-p", "hello"))
        with qwen3next.Model(self.out) as model, model.session() as s:
            s.load(session)
            self.assertEqual(s.tokens(), [7, 260, 260])


class Added(Case):
    """Added tokens and special ones."""

    def files(self, **others):
        """vocab.json and merges.txt, with others: name_json=value."""
        model = make_fuzz_corpus.tokenizer()["model"]
        merges = "#version: 0.2\n" + "".join("%s %s\n" % tuple(m) for m in model["merges"])
        out = {"vocab.json": model["vocab"], "merges.txt": merges}
        out.update({name[:-5] + ".json": value for name, value in others.items()})
        return out

    def test_ids(self):
        """The id of its text, else the next one; nothing else."""
        tokens = make_fuzz_corpus.tokenizer()["added_tokens"]
        for more, found, expected in (
                (added("<|x|>", 268), "id 268", 264), (added("<|x|>", 5), "id 5", 264),
                (added("hel", 264), "id 264", 257), (added("<|end|>", 264), "id 264", 263),
                (added("<|x|>", True), "added token", None), (added("<|x|>", "264"), "added", None),
                (added("<|x|>", -1), "id -1", 264), (added("<|x|>", 264.0), "added token", None)):
            with self.subTest(found):
                words = ("expected %d," % expected,) if expected is not None else ()
                self.fails((found,) + words, self.json(added_tokens=tokens + [more]))
        model = self.open(self.json(added_tokens=tokens + [added("hel", 257)]))
        self.assertEqual(model.tokenize("hello"), [257, 258])        # it is cut out before merges
        self.fails("'<|b|>': found id 263, expected 262",
                   self.json(added_tokens=[added("<|b|>", 263), added("<|a|>", 262)]))

    def test_refused(self):
        cases = (
            (added("", 262), "0 bytes, expected 1 to 4096"),
            (added("x" * 4097, 262), "4097 bytes, expected 1 to 4096"),
            (added("\u00e9" * 2049, 262), "4098 bytes"),
            (added("\ud800", 262), "expected valid Unicode"),
            (added("<|x|>", 262, lstrip=1), "lstrip: found 1, expected true or false"),
            ({"id": 262}, "id and content"), ({"content": "x"}, "id and content"))
        for token, expected in cases:
            with self.subTest(expected):
                self.fails(expected, self.json(added_tokens=[token]))
        self.open(self.json(added_tokens=[added("x" * 4096, 262)]))
        vocab = make_fuzz_corpus.tokenizer()["model"]["vocab"]
        del vocab["!"]
        vocab["!!"] = 33
        self.fails("no token for the byte 0x21", self.json(model={"vocab": vocab}))

    def test_flags(self):
        """normalized is true unless it is said or the token is special."""
        for token, flags in ((added("caf\u00e9", 262), 0), ({"id": 262, "content": "caf\u00e9"}, 8),
                             ({"id": 262, "content": "caf\u00e9", "special": True}, 1),
                             ({"id": 262, "content": "caf\u00e9", "rstrip": True,
                               "normalized": None}, 8 | 4),
                             (added("caf\u00e9", 262, single_word=True, lstrip=True), 16 | 2)):
            self.open(self.json(added_tokens=[token]))
            with q3n_file.File(self.out) as f:
                self.assertEqual(f.tokenizer.added, [(262, flags)])
        # tokenizer_config.json goes before tokenizer.json
        self.open(dict(self.json(added_tokens=[added("<x>", 262)]), **{
            "tokenizer_config.json": {"added_tokens_decoder": {"262": added("<x>", 0, rstrip=True),
                                                               "263": added("<y>", 0)}}}))
        with q3n_file.File(self.out) as f:
            self.assertEqual(f.tokenizer.added, [(262, 4), (263, 0)])

    def test_last_merge_wins(self):
        """A pair that stands twice has the rank of its last place."""
        vocab = {c: i for c, i in make_fuzz_corpus.tokenizer()["model"]["vocab"].items()
                 if i < 256}
        vocab.update(he=256, el=257)
        model = self.open(self.json(added_tokens=[], model={
            "vocab": vocab, "merges": [["h", "e"], ["e", "l"], ["h", "e"]]}))
        self.assertEqual(model.tokenize("hel"), [104, 257])

    def test_beside_vocab(self):
        """Specials and end of text of vocab.json and merges.txt, as transformers has them."""
        end = "<|endoftext|>"
        three = {end: 262, "<|im_start|>": 263, "<|im_end|>": 264}
        cases = (                        # files, end-of-text ids, special ids
            ({}, [262], [262]),
            (dict(added_tokens_json=three), [262], [262]),
            (dict(added_tokens_json=three, special_tokens_map_json={
                "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}),
             [264], [262, 263, 264]),
            (dict(added_tokens_json={"<|im_start|>": 262, "<|im_end|>": 263},
                  tokenizer_config_json={"eos_token": "<|im_end|>"}), [263], [263, 264]),
            (dict(special_tokens_map_json={"eos_token": added("<|end|>", 0, lstrip=True),
                                           "pad_token": "<|pad|>"}), [262], [262, 263, 264]),
            (dict(special_tokens_map_json={"eos_token": "<|end|>"}, tokenizer_config_json={
                "eos_token": "<|im_end|>", "unk_token": None, "pad_token": None,
                "added_tokens_decoder": {"262": {"content": "<|im_end|>", "special": True}}}),
             [262], [262]),
            (dict(tokenizer_config_json={"eos_token": "<|im_end|>", "added_tokens_decoder": {
                "262": {"content": "<|im_end|>"}, "263": {"content": "<think>"}}}),
             [262], [262, 264]),
            (dict(tokenizer_config_json={
                "image_token": "<|a|>", "extra_special_tokens": ["<|b|>"], "eos_token": None,
                "unk_token": None, "pad_token": None}), [], [262, 263]),
        )
        for files, eos, specials in cases:
            with self.subTest(files):
                model = self.open(self.files(**files))
                with q3n_file.File(self.out) as f:
                    tokenizer = f.tokenizer
                self.assertEqual(model.eos_ids, eos)
                self.assertEqual([i for i, flags in tokenizer.added if flags & 1], specials)
                for i, _ in tokenizer.added:
                    text = tokenizer.tokens[i].decode()
                    self.assertEqual(model.tokenize("a%sb" % text), [97, i, 98])
        model = self.open(self.files(tokenizer_config_json={
            "add_bos_token": True, "add_eos_token": True, "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>"}))
        self.assertEqual(model.tokenize("hello", prefix=True, suffix=True), [262, 260, 263])
        for files, expected in (
                (dict(added_tokens_json={"<|x|>": 270}), "id 270, expected 262"),
                (dict(added_tokens_json={"<|x|>": "262"}), "expected {token: id}"),
                (dict(tokenizer_config_json={"added_tokens_decoder": {"\u00b2": {}}}), "ids as"),
                (dict(tokenizer_config_json={"eos_token": 5}), "the text of a token"),
                (dict(tokenizer_config_json={"split_special_tokens": True}), "split_special"),
                (dict(tokenizer_config_json={"add_prefix_space": True}), "add_prefix_space")):
            self.fails(expected, self.files(**files))

    def test_no_room(self):
        """A named token that the model has no row for is left out; said if the folder has it."""
        self.config = synthetic.qwen3_config(vocab_size=N_WORDS)
        self.tensors = synthetic.qwen3_tensors(self.config)
        self.assertEqual(self.open(self.files()).eos_ids, [])
        self.assertNotIn("warning", self.messages)
        self.open(self.files(special_tokens_map_json={"eos_token": "<|end|>"}))
        self.assertIn("eos_token '<|end|>' is not in the vocabulary", self.messages)

    def test_many(self):
        """Work grows with the number of added tokens, not with its square."""
        def lines(n):
            value = self.json(added_tokens=[added("<%d>" % i, N_WORDS + i) for i in range(n)])
            folder = os.path.join(self.dir, "many")
            os.makedirs(folder, exist_ok=True)
            synthetic.write_json(folder, "tokenizer.json", value["tokenizer.json"])
            definitions, count = q3n_file.Definitions(), [0]

            def trace(frame, event, _):
                count[0] += event == "line"
                return trace

            sys.settrace(trace)
            try:
                tokenizer_file.load(folder, "qwen3", 1 << 20).pack(1 << 20, definitions)
            finally:
                sys.settrace(None)
            return count[0]

        few, more, most = lines(0), lines(500), lines(2000)
        self.assertLess(most - few, 4.5 * (more - few))


class Heads(Case):
    def head(self, n, **config):
        self.config = synthetic.qwen3_config(
            vocab_size=VOCAB, architectures=["Qwen3ForSequenceClassification"], **config)
        self.tensors = dict(synthetic.qwen3_tensors(self.config))
        self.tensors["score.weight"] = ("F32", (n, 32), struct.pack("<%df" % (32 * n), *(
            random.Random(n).uniform(-1, 1) for _ in range(32 * n))))

    def probabilities(self):
        """(scores, probabilities) of the library, which the command line prints too."""
        with qwen3next.Model(self.out) as model, model.session() as s:
            scores = s.classify([1, 2, 3])
            out = model.probabilities(scores)
        printed = json.loads(self.program("classify", self.out, "--ids", "1,2,3", "--json"))
        for got, want in zip(printed["probabilities"], out):
            self.assertAlmostEqual(got, want, places=6)
        return list(scores), list(out)

    def test_problems(self):
        def softmax(x):
            e = [math.exp(v - max(x)) for v in x]
            return [v / sum(e) for v in e]

        def sigmoid(x):
            return [1 / (1 + math.exp(-v)) for v in x]

        cases = ((1, None, sigmoid), (1, "regression", list), (3, None, softmax),
                 (1, "single_label_classification", sigmoid), (3, "regression", list),
                 (3, "single_label_classification", softmax),
                 (3, "multi_label_classification", sigmoid))
        for n, problem, want in cases:
            with self.subTest("%d %s" % (n, problem)):
                self.head(n, problem_type=problem)
                model = self.open({})
                self.assertEqual(model.problem_type, problem or "none")
                self.assertIsNone(model.labels)
                scores, got = self.probabilities()
                for a, b in zip(got, want(scores)):
                    self.assertAlmostEqual(a, b, places=6)
                text = self.program("classify", self.out, "--ids", "1,2,3")
                self.assertEqual(text.count("%"), 0 if problem == "regression" else n)
        self.head(2, problem_type="other")
        self.fails(("problem_type", "'other'"), {})

    def test_labels(self):
        names = ["no", "yes", "caf\u00e9 \U0001f600\n"]
        self.head(3, id2label={str(i): name for i, name in enumerate(names)})
        self.assertEqual(self.open({}).labels, names)
        text = self.program("classify", self.out, "--ids", "1,2,3").splitlines()
        self.assertEqual([line.split()[-1] for line in text], ["no", "yes", "\U0001f600\\n"])
        best = json.loads(self.program("classify", self.out, "--ids", "1,2,3", "--json"))
        self.assertEqual(best["name"], names[best["label"]])
        self.assertEqual(json.loads(self.program("info", self.out, "--json"))["labels"], names)
        self.assertIn("yes", self.program("info", self.out))
        for id2label in ({"0": "a", "1": "b"}, {"0": "a", "1": "b", "3": "c"},
                         {"0": "a", "1": "b", "2": None}):
            self.head(3, id2label=id2label)
            self.assertIsNone(self.open({}).labels)
            self.assertIn("the labels have numbers", self.messages)
        self.head(3, id2label={"0": "a", "1": "b\0", "2": "c"})
        self.fails("a byte 0 in a name", {})

    def test_padding(self):
        """The last token that is not config.json's pad_token_id; other files do not count."""
        other = {"generation_config.json": {"pad_token_id": 3}}
        for pad, last in ((3, 2), (None, 3), (-1, 3), (2, 3)):
            self.head(2, pad_token_id=pad)
            with self.open(other) as model, model.session() as s:
                with self.subTest(pad):
                    whole, cut = s.classify([1, 2, 3, 3]), s.classify([1, 2, 3, 3][:last + 1])
                    part = s.classify([1, 2])
                    self.assertEqual(whole == part, last == 2)
                    self.assertEqual(s.classify([1, 2, 3, 3]), whole)
                    if last == 3:
                        self.assertEqual(whole, cut)
        with qwen3next.Model(self.out) as model, model.session() as s:
            self.assertEqual(s.classify([2, 2, 2]), s.classify([2]))     # nothing but padding

    def test_text(self):
        """classify takes a whole text."""
        self.head(2)
        self.open(self.json(post_processor=template([TEXT, special("e")], e=[END])))
        args = ("classify", self.out, "--json")
        self.assertEqual(self.program(*args + ("-p", "hello")),
                         self.program(*args + ("--ids", "260,263")))
        with qwen3next.Model(self.out) as model, model.session() as s:
            self.assertEqual(s.classify("hello"), s.classify([260, END]))


class NotFinite(Case):
    """NaN and infinity are found in every type, with numpy and without it."""

    ROW = 5 * 32 + 7                     # of the embedding, where the first one is put

    def spoil(self, name, pattern, *places):
        dtype, shape, data = self.tensors[name]
        for i in places:
            data = data[:2 * i] + pattern + data[2 * i + 2:]
        self.tensors[name] = (dtype, shape, data)

    def test_refused(self):
        sound = copy.deepcopy(self.tensors)
        for use_numpy in (True, False):
            numpy, matrix.numpy = matrix.numpy, matrix.numpy if use_numpy else None
            self.addCleanup(setattr, matrix, "numpy", numpy)
            for pattern in (b"\xc0\x7f", b"\x80\xff", b"\x80\x7f"):
                for type_ in ("bf16", "f32", "f16", "q8"):
                    with self.subTest("%s %s %s" % (use_numpy, pattern, type_)):
                        self.tensors = dict(sound)
                        self.spoil("model.embed_tokens.weight", pattern, self.ROW, 9000)
                        self.fails(("model.embed_tokens.weight", "in 2 of 9600 values",
                                    "row 5, column 7"), {}, "--type", type_)
            self.tensors = dict(sound)
            self.spoil("model.norm.weight", b"\xc0\x7f", 3)
            self.fails(("model.norm.weight", "1 of 32 values", "index 3"), {})
            matrix.numpy = numpy

    def test_allowed(self):
        self.spoil("model.norm.weight", b"\xc0\x7f", 3)
        self.open({}, "--allow-nan")
        self.assertIn("warning: model.norm.weight: found NaN or infinity in 1 of 32 values",
                      self.messages)
        with q3n_file.File(self.out) as f:
            self.assertEqual(f.verify(), [])
            x = struct.unpack("<32f", f.data("norm.weight"))
            self.assertEqual([i for i, v in enumerate(x) if v != v], [3])
        run = subprocess.run(Q3N + ["quantize", self.out, self.out + "4"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
        self.assertNotEqual(run.returncode, 0)
        self.assertIn(b"norm.weight: row 0, column 3: nan cannot be quantised", run.stderr)

    def test_every_place(self):
        """The first place and the number, beside the largest numbers that are finite."""
        numpy = matrix.numpy
        self.addCleanup(setattr, matrix, "numpy", numpy)
        bad = {"f32": (0x7F800000, 0x7FC00001, 0x7F800001), "bf16": (0x7F80, 0x7FC1, 0x7FFF),
               "f16": (0x7C00, 0x7E01, 0x7FFF)}
        r = random.Random(5)
        for type_, patterns in bad.items():
            size = matrix.ELEMENT_BYTES[type_]
            largest, sign = patterns[0] - 1, 1 << (8 * size - 1)
            for _ in range(60):
                values = [r.choice((0, largest, r.randrange(largest))) for _ in range(100)]
                places = sorted(r.sample(range(100), r.randrange(4)))
                for i in places:
                    values[i] = r.choice(patterns)
                data = struct.pack("<100%s" % ("I" if size == 4 else "H"),
                                   *(v | r.choice((0, sign)) for v in values))
                for matrix.numpy in (numpy, None):
                    self.assertEqual(matrix.not_finite(data, type_),
                                     (places[0] if places else 0, len(places)))
        self.assertEqual(matrix.not_finite(b"", "f32"), (0, 0))


def config_struct():
    """q3n_config as the header declares it."""
    with open(os.path.join(ROOT, "qwen3next.h"), encoding="utf-8") as f:
        text = f.read()
    body = re.search(r"typedef struct q3n_config \{(.*?)\n\} q3n_config;", text, re.S).group(1)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    kinds = {"size_t": ctypes.c_size_t, "int": ctypes.c_int, "double": ctypes.c_double}
    fields = []
    for kind, name, room in re.findall(r"(size_t|int|double|unsigned char) +(\w+)(\[\w+\])?;",
                                       body):
        fields.append((name, ctypes.c_ubyte * 256 if room else kinds[kind]))
    return type("Config", (ctypes.Structure,), {"_fields_": fields})()


class Limits(Case):
    """Bounds of the header, and what fields demand of one another."""

    def test_names(self):
        for name, n in (("x" * 256, 256), ("\u00e9" * 128, 256), ("a\0b", 3)):
            self.fails("name: found %d bytes, expected at most 255, none of them 0" % n, {},
                       "--name", name)
        self.assertEqual(self.open({}, "--name", "x" * 255).name, "x" * 255)
        self.config["eos_token_id"] = list(range(17))
        self.fails("eos_ids: found 17 token ids, expected at most 16", {})

    def test_as_the_library(self):
        """Of random configurations the tools and q3n_config_check refuse the same ones."""
        d, lib = q3n_file.Definitions(), qwen3next.load()
        r, c = random.Random(11), config_struct()
        c.size = ctypes.sizeof(c)
        small = {"I": (0, 1, 2, 3, 4, 8, 16, 64), "B": (0, 1), "F": (0.0, 1.0, 2.0, 32.0, 1e4)}
        model = self.open({})            # where sound values are taken from
        check = lib.q3n_config_check
        check.restype, check.argtypes = qwen3next._C_INT, (qwen3next._P, qwen3next._P)
        outcomes = [0, 0]
        for _ in range(4000):
            config = {}
            for name, field in d.fields.items():
                value = model.config[name]
                if r.random() < 0.1:
                    value = r.choice(range(len(d.words[name])) if field.kind == "E"
                                     else small[field.kind])
                    if r.random() < 0.1 and field.kind != "E":
                        value = r.choice((field.least - 1, field.most, field.most + 1))
                setattr(c, name, value)
                config[name] = d.words[name][value] if field.kind == "E" else value
            layers = config["num_hidden_layers"]
            for name in ("layer_types", "layer_experts"):
                kinds = [r.choice((0, 0, 0, 1)) for _ in range(max(0, min(layers, 256)))]
                config[name] = kinds
                for l, kind in enumerate(kinds):
                    getattr(c, name)[l] = kind
            try:
                d.check_config(config)
                accepted = True
            except q3n_file.ConvertError:
                accepted = False
            record = qwen3next._Record()
            opens = check(ctypes.byref(c), ctypes.byref(record)) == 0
            if not opens and b"would be too large" in record.message:
                continue                 # beyond what a file can hold: the library's alone
            self.assertEqual(accepted, opens, (config, record.message))
            outcomes[opens] += 1
        self.assertGreater(min(outcomes), 200)


if __name__ == "__main__":
    unittest.main()
