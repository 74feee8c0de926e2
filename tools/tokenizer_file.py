"""Tokenizer and chat template of a checkpoint folder, as the TOKENIZER section and config keys.

Byte-level BPE only: tokenizer.json, or vocab.json + merges.txt + tokenizer_config.json.
"""
import os

import files
from hf_config import Json, text_part
from q3n_file import ConvertError, pack_tokenizer
from safetensors_file import MAX_TEXT, load_json

_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_TAIL = r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "qwen2": _HEAD + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]" + _TAIL,
    "qwen3_5": _HEAD + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]" + _TAIL,
}
FLAGS = (("special", 1), ("lstrip", 2), ("rstrip", 4), ("normalized", 8), ("single_word", 16))


def byte_map():
    """The byte that each of the 256 characters of byte-level BPE stands for: printable Latin-1
    characters are themselves, the others follow from U+0100 on, in order."""
    shown = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    hidden = [b for b in range(256) if b not in shown]
    chars = {chr(b): b for b in shown}
    chars.update({chr(256 + i): b for i, b in enumerate(hidden)})
    return chars


class Tokenizer:
    """tokens: bytes by id (b"" where an id has no token); merges: (left, right, result) ids by
    rank; added: (id, flags); pattern; nfc."""

    def __init__(self, where):
        self.where = where
        self.vocab, self.raw_merges = {}, []
        self.added = []                  # (id, text, flags)
        self.pattern, self.nfc = None, 1

    def bad(self, what, found, expected):
        raise ConvertError("%s: %s: found %s, expected %s" % (self.where, what, found, expected))

    def pack(self, vocab_size):
        """The TOKENIZER section."""
        chars = byte_map()
        ids = list(self.vocab.values()) + [i for i, _, _ in self.added]
        if any(type(i) is not int or i < 0 for i in ids):
            self.bad("token id", next(i for i in ids if type(i) is not int or i < 0), "0 or more")
        n = max(ids) + 1 if ids else 0
        if n == 0:
            self.bad("vocab", "no tokens", "byte-level BPE")
        if n > vocab_size:
            self.bad("largest token id", n - 1, "less than vocab_size, %d" % vocab_size)
        tokens, taken = [b""] * n, {}
        added = {i: text for i, text, _ in self.added}
        for text, i in self.vocab.items():
            if i in taken:
                self.bad("id %d" % i, "%r and %r" % (taken[i], text), "one token")
            taken[i] = text
            try:
                tokens[i] = bytes(chars[c] for c in text)
            except KeyError as e:
                if added.get(i) != text:
                    self.bad("token %d %r" % (i, text), "the character %r" % e.args[0],
                             "the characters of byte-level BPE")
        for i, text in added.items():
            tokens[i] = text.encode("utf-8")
        return pack_tokenizer(tokens, self._merges(), [(i, flags) for i, _, flags in self.added])

    def _merges(self):
        out = []
        for rank, (left, right) in enumerate(self.raw_merges):
            try:
                out.append((self.vocab[left], self.vocab[right], self.vocab[left + right]))
            except KeyError as e:
                self.bad("merge %d (%r %r)" % (rank, left, right), "no token %r" % e.args[0],
                         "it in the vocabulary")
        return out


def _pairs(merges, tokenizer):
    """Merges as "a b" strings or [a, b] pairs."""
    out = []
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2
                and all(isinstance(p, str) for p in pair)):
            tokenizer.bad("merge %d" % rank, repr(merge)[:60], "two pieces")
        out.append(tuple(pair))
    return out


def _added_token(tokenizer, i, value):
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) \
            or type(i) is not int:
        tokenizer.bad("added token", repr(value)[:60], "id and content")
    flags = sum(bit for name, bit in FLAGS if value.get(name))
    if all(i != old for old, _, _ in tokenizer.added):
        tokenizer.added.append((i, value["content"], flags))


def _pattern_name(tokenizer, regex):
    for name, known in PATTERNS.items():
        if regex == known:
            return name
    tokenizer.bad("pre-tokenizer pattern", repr(regex)[:120],
                  "Qwen's (--no-tokenizer writes the file without a tokenizer)")


def _from_json(path):
    t = Tokenizer(path)
    top = Json(load_json(path), path)
    model = top.object("model")
    kind = model.word("type", "BPE")
    if kind != "BPE" or model.flag("byte_fallback"):
        model.bad("type" if kind != "BPE" else "byte_fallback",
                  "byte-level BPE (--no-tokenizer writes the file without a tokenizer)")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.word(key):
            model.bad(key, "none")
    if model.values.get("dropout") or model.flag("ignore_merges"):
        model.bad("ignore_merges", "false, and no dropout")
    t.vocab = model.object("vocab").values
    merges = model.values.get("merges")
    t.raw_merges = _pairs(merges if isinstance(merges, list) else model.bad("merges", "a list"), t)
    for value in top.items("added_tokens", dict):
        _added_token(t, value.get("id"), value)
    t.nfc = _nfc(top)
    t.pattern = _pattern_name(t, _split_regex(top))
    return t


def _nfc(top):
    normalizer = top.object("normalizer")
    if not normalizer.values:
        return 0
    kinds = [normalizer.word("type")]
    if kinds == ["Sequence"]:
        kinds = [Json(n, top.where).word("type") for n in normalizer.items("normalizers", dict)]
    if kinds not in (["NFC"], []):
        top.bad("normalizer", "NFC or none")
    return len(kinds)


def _split_regex(top):
    """The pattern of the Split step that comes before ByteLevel."""
    pre = top.object("pre_tokenizer")
    steps = pre.items("pretokenizers", dict) if pre.word("type") == "Sequence" else [pre.values]
    kinds = [step.get("type") for step in steps]
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex") is not False \
            or steps[1].get("add_prefix_space"):
        top.bad("pre_tokenizer", "a Split by pattern, then ByteLevel "
                "(--no-tokenizer writes the file without a tokenizer)")
    if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        top.bad("pre_tokenizer", 'a Split with behavior "Isolated"')
    return Json(steps[0], top.where).object("pattern").word("Regex")


def _from_vocab(vocab_path, merges_path):
    t = Tokenizer(vocab_path)
    t.vocab = load_json(vocab_path)
    lines = files.read_text(merges_path, MAX_TEXT).split("\n")
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    t.raw_merges = _pairs([line for line in (s.rstrip("\r") for s in lines) if line], t)
    return t


def load(folder, family):
    """The Tokenizer of a folder, None if it has none.  family: of the model, for a folder that
    names no pattern."""
    path, vocab = os.path.join(folder, "tokenizer.json"), os.path.join(folder, "vocab.json")
    settings = _settings(folder)
    if os.path.exists(path):
        t = _from_json(path)
    elif os.path.exists(vocab):
        t = _from_vocab(vocab, os.path.join(folder, "merges.txt"))
    else:
        return None
    for key, value in settings.object("added_tokens_decoder").values.items():
        if not key.isdigit():
            settings.bad("added_tokens_decoder", "ids as keys")
        _added_token(t, int(key), value)
    t.added.sort()
    # transformers follows the config before tokenizer.json, whose pattern Qwen3.5 left at Qwen2's
    regex = settings.word("pretokenize_regex")
    if regex:
        t.pattern = _pattern_name(t, regex)
    elif settings.word("tokenizer_class").startswith("Qwen3_5"):
        t.pattern = "qwen3_5"
    elif t.pattern is None:
        t.pattern = "qwen3_5" if family.startswith("qwen3_5") else "qwen2"
    return t


def _settings(folder):
    path = os.path.join(folder, "tokenizer_config.json")
    return Json(load_json(path) if os.path.exists(path) else {}, path)


# ---- Special ids ----

def special_ids(folder, raw, tokenizer, vocab_size):
    """Config keys eos_ids, bos_id, pad_id."""
    path = os.path.join(folder, "generation_config.json")
    generation = Json(load_json(path) if os.path.exists(path) else {}, path)
    config = text_part(raw, os.path.join(folder, "config.json"))
    settings = _settings(folder)
    eos = _ids(generation, "eos_token_id")
    if not eos:
        eos = _ids(config, "eos_token_id") + _named(settings, "eos_token", tokenizer)
    out = {}
    eos = [i for n, i in enumerate(eos) if i < vocab_size and i not in eos[:n]]
    if eos:
        out["eos_ids"] = eos
    for key in ("bos", "pad"):
        ids = (_ids(config, key + "_token_id") or _named(settings, key + "_token", tokenizer)
               or _ids(generation, key + "_token_id"))
        if ids and ids[0] < vocab_size:
            out[key + "_id"] = ids[0]
    return out


def _ids(source, key):
    value = source.values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        source.bad(key, "token ids")
    return ids


def _named(settings, key, tokenizer):
    """The id of a token that tokenizer_config.json gives as text, or as an object with content."""
    value = settings.values.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if tokenizer is None or not isinstance(text, str):
        return []
    ids = [i for i, added, _ in tokenizer.added if added == text]
    return ids or [i for i in [tokenizer.vocab.get(text)] if i is not None]


# ---- Chat template ----

def chat_template(folder):
    """The template's text, "" if there is none."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        return files.read_text(path, MAX_TEXT)
    path = os.path.join(folder, "chat_template.json")
    source = Json(load_json(path), path) if os.path.exists(path) else _settings(folder)
    value = source.values.get("chat_template")
    if isinstance(value, list):          # several, by name
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default") or next(iter(named.values()), None)
    if value is not None and not isinstance(value, str):
        source.bad("chat_template", "a string")
    return value or ""


def chat_kind(template):
    """One word for the templates that Qwen publishes, told apart by what only one of them says."""
    if not template:
        return "none"
    if "<|im_start|>" not in template:
        return "unknown"
    prompt = template[template.rfind("add_generation_prompt"):]
    xml_tools = "<function=" in template
    if "enable_thinking" in template:
        if not xml_tools:
            return "qwen3"
        if "reasoning_effort" in template:
            return "qwen3_8"
        # the smallest Qwen3.5 think only when asked to
        return "qwen3_5_nothinking" if "enable_thinking is true" in prompt else "qwen3_5"
    if xml_tools:
        return "qwen3_coder"
    if "<think>" in prompt:
        return "qwen3_thinking"
    if "<tool_call>" in template and "You are Qwen" not in template:
        return "qwen3_instruct"
    return "chatml"
