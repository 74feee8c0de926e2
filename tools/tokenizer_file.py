"""Tokenizer and chat template of a checkpoint folder, as the TOKENIZER section and config keys.

Byte-level BPE only: tokenizer.json, or vocab.json + merges.txt + tokenizer_config.json.
"""
import os
import re

import files
import q3n_file
from hf_config import Json, text_part
from q3n_file import ConvertError, utf8
from safetensors_file import MAX_TEXT, load_json

_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_TAIL = r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "qwen2": _HEAD + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]" + _TAIL,
    "qwen3_5": _HEAD + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]" + _TAIL,
}
SPECIAL = 1
FLAGS = (("special", SPECIAL), ("lstrip", 2), ("rstrip", 4), ("normalized", 8), ("single_word", 16))
WITHOUT = " (--no-tokenizer writes the file without a tokenizer)"


def byte_map():
    """The byte that each of the 256 characters of byte-level BPE stands for: printable Latin-1
    characters are themselves, the others follow from U+0100 on, in order."""
    shown = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    hidden = [b for b in range(256) if b not in shown]
    chars = {chr(b): b for b in shown}
    chars.update({chr(256 + i): b for i, b in enumerate(hidden)})
    return chars


class Tokenizer:
    """What a folder says.  added: {text: [id, flags]} in the order in which they are added; named:
    {"eos_token": text, ...}; prefix, suffix: ids put before and after a text; pattern; nfc."""

    def __init__(self, where, vocab):
        self.where, self.vocab, self.raw_merges = where, vocab, []
        self.added, self.named = {}, {}
        self.prefix, self.suffix = [], []
        self.pattern, self.nfc = None, 1
        self.warnings = []
        for text, i in vocab.items():
            if type(i) is not int or i < 0:
                self.bad("token id of %r" % text[:40], repr(i)[:40], "0 or more")
        self.next_id = len(vocab)        # of an added token whose text is not in the vocabulary

    def bad(self, what, found, expected):
        raise ConvertError("%s: %s: found %s, expected %s" % (self.where, what, found, expected))

    def add(self, text, flags, i=None):
        """An added token.  Hugging Face tokenizers gives it the id that its text has, else the next
        free one, whatever number i the file has beside it: a file with another number means two
        things."""
        known = self.added.get(text)
        expected = known[0] if known else self.vocab.get(text, self.next_id)
        if i is not None and i != expected:
            self.bad("added token %r" % text[:60], "id %r" % (i,), "%d, the id that Hugging Face "
                     "tokenizers gives it" % expected)
        if expected >= len(self.vocab):
            self.next_id = max(self.next_id, expected + 1)
        self.added[text] = [expected, flags]

    def pack(self, vocab_size, definitions):
        """The TOKENIZER section."""
        chars = byte_map()
        if not self.vocab:
            self.bad("vocab", "no tokens", "byte-level BPE")
        n = 1 + max(max(self.vocab.values()), max((i for i, _ in self.added.values()), default=0))
        if n > vocab_size:
            self.bad("largest token id", n - 1, "less than vocab_size, %d" % vocab_size)
        tokens, taken = [b""] * n, {}
        for text, i in self.vocab.items():
            if i in taken:
                self.bad("id %d" % i, "%r and %r" % (taken[i][:40], text[:40]), "one token")
            taken[i] = text
            try:
                tokens[i] = bytes(chars[c] for c in text)
            except KeyError as e:
                if text not in self.added:
                    self.bad("token %d %r" % (i, text[:40]), "the character %r" % e.args[0],
                             "the characters of byte-level BPE")
        for text, (i, _) in self.added.items():
            if i in taken and text != taken[i]:
                self.bad("id %d" % i, "%r and %r" % (taken[i][:40], text[:40]), "one token")
            tokens[i] = utf8(text, self.where)
        t = q3n_file.Tokenizer(tokens, self._merges(), sorted(map(tuple, self.added.values())))
        q3n_file.check_tokenizer(t, vocab_size, definitions, self.where)
        return q3n_file.pack_tokenizer(t)

    def _merges(self):
        """(left, right, result) ids.  Of a pair that stands twice Hugging Face tokenizers knows the
        last."""
        out = []
        last = {pair: rank for rank, pair in enumerate(self.raw_merges)}
        for rank, (left, right) in enumerate(self.raw_merges):
            try:
                merge = self.vocab[left], self.vocab[right], self.vocab[left + right]
            except KeyError as e:
                self.bad("merge %d (%r %r)" % (rank, left[:40], right[:40]),
                         "no token %r" % e.args[0][:80], "it in the vocabulary")
            if last[left, right] == rank:
                out.append(merge)
        return out


def _pairs(merges, tokenizer):
    """Merges as "a b" strings or [a, b] pairs."""
    out = []
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2
                and all(isinstance(p, str) for p in pair)):
            tokenizer.bad("merge %d" % rank, repr(merge)[:60], "the texts of two tokens")
        out.append(tuple(pair))
    return out


def _add_object(tokenizer, value, i=None, special=False):
    """An added token as an object.  What it does not say is false, but `normalized` is true unless
    the token is special."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) \
            or type(i) not in (int, type(None)):
        tokenizer.bad("added token", repr(value)[:60], "id and content")
    for name, _ in FLAGS:
        if not isinstance(value.get(name, False), (bool, type(None))):
            tokenizer.bad("added token %r: %s" % (value["content"][:60], name),
                          repr(value[name])[:60], "true or false")
    special = special or bool(value.get("special"))
    known = dict({"normalized": not special}, **{k: v for k, v in value.items() if v is not None})
    known["special"] = special
    tokenizer.add(value["content"], sum(bit for name, bit in FLAGS if known.get(name)), i)


def _pattern_name(tokenizer, regex):
    for name, known in PATTERNS.items():
        if regex == known:
            return name
    tokenizer.bad("pre-tokenizer pattern", repr(regex)[:120], "Qwen's" + WITHOUT)


# ---- tokenizer.json: every component is followed or refused ----

# What has no effect where every byte has a token: what to do with unknown characters.
IDLE = ("unk_token", "fuse_unk")
MODEL_KEYS = ("type", "vocab", "merges", "byte_fallback", "continuing_subword_prefix",
              "end_of_word_suffix", "dropout", "ignore_merges") + IDLE
TOP_KEYS = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
            "post_processor", "decoder", "model")


def _only(source, keys):
    """Refuse what is set and not known."""
    for key, value in source.values.items():
        if key not in keys and value not in (None, False):
            source.bad(key, "none" + WITHOUT)


def _from_json(path):
    top = Json(load_json(path), path)
    _only(top, TOP_KEYS)
    model = top.object("model")
    _only(model, MODEL_KEYS)
    if model.word("type", "BPE") != "BPE":
        model.bad("type", "byte-level BPE" + WITHOUT)
    for key in ("byte_fallback", "ignore_merges"):
        if model.flag(key):
            model.bad(key, "false" + WITHOUT)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.word(key):
            model.bad(key, "none" + WITHOUT)
    if model.real("dropout", 0.0):
        model.bad("dropout", "none" + WITHOUT)
    t = Tokenizer(path, model.object("vocab").values)
    merges = model.values.get("merges")
    t.raw_merges = _pairs(merges if isinstance(merges, list) else model.bad("merges", "a list"), t)
    for value in top.items("added_tokens", dict):
        _add_object(t, value, value.get("id", ""))
    t.nfc = _nfc(top)
    t.pattern = _pattern_name(t, _split_regex(top))
    _decoder(top)
    _post_processor(t, top)
    for key in ("truncation", "padding"):
        if top.object(key).values:
            t.warnings.append("%s: %s is not applied: a text is taken whole, as transformers does "
                              "unless it is asked to" % (path, key))
    return t


def _steps(top, key, inner):
    """The steps of a component: those of a Sequence, itself, or none."""
    whole = top.object(key)
    if not whole.values:
        return []
    if whole.word("type") != "Sequence":
        return [whole]
    return [Json(step, whole.where) for step in whole.items(inner, dict)]


def _nfc(top):
    kinds = [step.word("type") for step in _steps(top, "normalizer", "normalizers")]
    if kinds not in (["NFC"], []):
        top.bad("normalizer", "NFC or none" + WITHOUT)
    return len(kinds)


def _split_regex(top):
    """The pattern of the Split step that comes before ByteLevel."""
    steps = _steps(top, "pre_tokenizer", "pretokenizers")
    if [step.word("type") for step in steps] != ["Split", "ByteLevel"] \
            or steps[1].flag("use_regex", True) or steps[1].flag("add_prefix_space", True):
        top.bad("pre_tokenizer", "a Split by pattern, then ByteLevel" + WITHOUT)
    if steps[0].word("behavior") != "Isolated" or steps[0].flag("invert"):
        top.bad("pre_tokenizer", 'a Split with behavior "Isolated"' + WITHOUT)
    return steps[0].object("pattern").word("Regex")


def _decoder(top):
    kinds = [step.word("type") for step in _steps(top, "decoder", "decoders")]
    if kinds not in (["ByteLevel"], []):
        top.bad("decoder", "ByteLevel" + WITHOUT)


def _post_processor(t, top):
    """Ids before and after a text: those of a template for one text, or of BERT's and RoBERTa's
    steps.  ByteLevel only moves offsets."""
    steps = [step for step in _steps(top, "post_processor", "processors")
             if step.word("type") != "ByteLevel"]
    if len(steps) > 1:
        top.bad("post_processor", "one step beside ByteLevel" + WITHOUT)
    for step in steps:
        kind = step.word("type")
        if kind == "TemplateProcessing":
            t.prefix, t.suffix = _template(step)
        elif kind in ("BertProcessing", "RobertaProcessing"):
            t.prefix, t.suffix = ([_pair_id(step, key)] for key in ("cls", "sep"))
        else:
            top.bad("post_processor", "ByteLevel, TemplateProcessing, BertProcessing or "
                    "RobertaProcessing" + WITHOUT)


def _pair_id(step, key):
    pair = step.values.get(key)
    if not isinstance(pair, list) or len(pair) != 2 or type(pair[1]) is not int:
        step.bad(key, "[token, id]")
    return pair[1]


def _template(step):
    """Ids before and after "A" of a TemplateProcessing for one text."""
    special, parts, here = step.object("special_tokens"), ([], []), 0
    for item in step.items("single", dict):
        item = Json(item, step.where + ": single")
        if "Sequence" in item.values:
            if item.object("Sequence").word("id") != "A" or here:
                step.bad("single", "the text A once" + WITHOUT)
            here = 1
            continue
        name = item.object("SpecialToken").word("id")
        if name not in special.values:
            special.bad(name, "the ids of the template's token %r" % name[:40])
        parts[here].extend(special.object(name).items("ids", int))
    if not here:
        step.bad("single", "the text A" + WITHOUT)
    return parts


# ---- vocab.json, merges.txt, and what stands beside either form ----

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What transformers' tokenizer of this family takes for granted where no file says otherwise.
DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")


def _from_vocab(vocab_path, merges_path):
    t = Tokenizer(vocab_path, load_json(vocab_path))
    lines = files.read_text(merges_path, MAX_TEXT).split("\n")
    t.raw_merges = _pairs([line for line in lines if line and not line.startswith("#version")], t)
    return t


def load(folder, family, vocab_size):
    """The Tokenizer of a folder, None if it has none.  family: of the model, for a folder that
    names no pattern."""
    path, vocab = os.path.join(folder, "tokenizer.json"), os.path.join(folder, "vocab.json")
    settings = _settings(folder)
    if os.path.exists(path):
        t = _from_json(path)
    elif os.path.exists(vocab):
        t = _from_vocab(vocab, os.path.join(folder, "merges.txt"))
        settings.values = dict(DEFAULTS, **settings.values)
    else:
        return None
    for key in ("add_prefix_space", "split_special_tokens"):
        if settings.flag(key):
            settings.bad(key, "false" + WITHOUT)
    _add_listed(t, folder, settings)
    _add_named(t, settings, vocab_size)
    if not os.path.exists(path):         # transformers: only where there is no tokenizer.json
        for key, part in (("bos_token", t.prefix), ("eos_token", t.suffix)):
            if settings.flag("add_" + key) and key in t.named:
                part.append(t.added[t.named[key]][0])
    # transformers follows the config before tokenizer.json, whose pattern Qwen3.5 left at Qwen2's
    regex = settings.word("pretokenize_regex")
    if regex:
        t.pattern = _pattern_name(t, regex)
    elif settings.word("tokenizer_class").startswith("Qwen3_5"):
        t.pattern = "qwen3_5"
    elif t.pattern is None:
        t.pattern = "qwen3_5" if family.startswith("qwen3_5") else "qwen2"
    return t


def _optional(folder, name):
    path = os.path.join(folder, name)
    return Json(load_json(path) if os.path.exists(path) else {}, path)


def _settings(folder):
    """tokenizer_config.json; special_tokens_map.json goes before it unless it lists the added
    tokens itself, as in transformers."""
    settings = _optional(folder, "tokenizer_config.json")
    if not settings.has("added_tokens_decoder"):
        named = _optional(folder, "special_tokens_map.json")
        settings.values = dict(settings.values, **named.values)
    return settings


def _extra(settings):
    """Tokens that are special without a name of NAMED, in the order of transformers."""
    for key, token in settings.values.items():
        if key.endswith("_token") and key not in NAMED and isinstance(token, (str, dict)):
            yield key, token
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.values.get(key)
        if isinstance(value, dict) and "content" not in value:
            value = list(value.values())
        if value is not None and not isinstance(value, list):
            settings.bad(key, "a list of tokens")
        for token in value or []:
            yield key, token


def _content(settings, key, value):
    """The text of a token that stands as text or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        settings.bad(key, "the text of a token")
    return text


def _add_listed(t, folder, settings):
    """Tokens of added_tokens_decoder, else of added_tokens.json."""
    if settings.has("added_tokens_decoder"):
        listed = settings.object("added_tokens_decoder")
        if not all(re.match("[0-9]{1,10}$", key) for key in listed.values):
            settings.bad("added_tokens_decoder", "ids as keys")
        for key in sorted(listed.values, key=int):
            _add_object(t, listed.values[key], int(key))
        return
    listed = _optional(folder, "added_tokens.json")
    if not all(type(i) is int for i in listed.values.values()):
        raise ConvertError("%s: found %s, expected {token: id}"
                           % (listed.where, ascii(listed.values)[:80]))
    special = {_content(settings, key, value) for key, value in list(_extra(settings))
               + [(key, settings.values[key]) for key in NAMED if settings.has(key)]}
    for text, i in sorted(listed.values.items(), key=lambda item: item[1]):
        if text not in t.added:
            _add_object(t, {"content": text, "special": text in special}, i)


def _add_named(t, settings, vocab_size):
    """The tokens that have a role are special; those that are new come last.  One for which the
    model has no row is left out."""
    tokens = [(key, settings.values[key]) for key in NAMED if settings.has(key)]
    for key, value in tokens + list(_extra(settings)):
        text = _content(settings, key, value)
        if text not in t.added and t.vocab.get(text, t.next_id) >= vocab_size:
            if DEFAULTS.get(key) != text:
                t.warnings.append("%s: %s %r is not in the vocabulary and has no room in it"
                                  % (settings.where, key, text[:60]))
            continue
        if text in t.added:
            t.added[text][1] |= SPECIAL
        else:
            _add_object(t, value if isinstance(value, dict) else {"content": text}, special=True)
        if key in NAMED:
            t.named[key] = text


# ---- Special ids ----

def special_ids(folder, plan, tokenizer):
    """Config keys eos_ids, bos_id, pad_id.  Which place counts: the table in hf_config.py."""
    generation = _optional(folder, "generation_config.json")
    config = text_part(plan.raw, os.path.join(folder, "config.json"))
    eos, mine, out = _ids(generation, "eos_token_id"), _ids(config, "eos_token_id"), {}
    if "eos_token_id" in config.values.overrides:
        eos = mine
    elif not eos:
        eos = mine + _named(tokenizer, "eos_token")
    counted = set(eos)
    lost = [i for i in mine if i not in counted]
    if lost:
        plan.warnings.append("%s: eos_token_id %d is not used: generation_config.json has another"
                             % (config.where, lost[0]))
    eos = _known(plan, config, "eos_token_id", eos)
    if eos:
        out["eos_ids"] = eos
    for key in ("bos", "pad"):
        name = key + "_token_id"
        ids = _ids(config, name)
        if not ids and name not in config.values.overrides \
                and (key == "bos" or not plan.config["num_labels"]):
            ids = _named(tokenizer, key + "_token") or _ids(generation, name)
        ids = _known(plan, config, name, ids)
        if ids:
            out[key + "_id"] = ids[0]
    return out


def _known(plan, config, key, ids):
    """The ids that the vocabulary has, each once."""
    vocab_size = plan.config["vocab_size"]
    beyond = [i for i in ids if i >= vocab_size]
    if beyond and key in config.values.overrides:
        config.bad(key, "ids below vocab_size, %d" % vocab_size)
    if beyond:
        plan.warnings.append("%s %d is not used: vocab_size is %d" % (key, beyond[0], vocab_size))
    return [i for i in dict.fromkeys(ids) if i < vocab_size]


def _ids(source, key):
    value = source.values.get(key)
    ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        source.bad(key, "token ids")
    return ids


def _named(tokenizer, key):
    """The id of the tokenizer's token of that name."""
    text = tokenizer.named.get(key) if tokenizer else None
    return [] if text is None else [tokenizer.added[text][0]]


# ---- Chat template ----

def chat_template(folder):
    """The template's text, "" if there is none."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        return files.read_text(path, MAX_TEXT)
    path = os.path.join(folder, "chat_template.json")
    source = Json(load_json(path), path) if os.path.exists(path) \
        else _optional(folder, "tokenizer_config.json")
    value = source.values.get("chat_template")
    if isinstance(value, list):          # several, by name
        named = [Json(v, source.where + ": chat_template")
                 for v in source.items("chat_template", dict)]
        texts = {v.word("name"): v.word("template") for v in named}
        value = texts.get("default") or next(iter(texts.values()), None)
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
