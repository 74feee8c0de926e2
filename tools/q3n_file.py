#!/usr/bin/env python3
"""The .q3n model file: laid out, written, read and listed.

The FILE FORMAT comment of qwen3next.h defines every byte; type numbers and configuration fields
are read out of that header, recipes out of q3n_make.h, so that they cannot drift.

usage: q3n_file.py FILE              list configuration, tensors and tokenizer
       q3n_file.py --verify FILE     also compare every tensor's checksum
"""
import collections
import os
import re
import struct
import sys
import zlib

import files
from files import ConvertError

# The headers of the checkout, or where they are installed.
TOOLS = os.path.dirname(os.path.abspath(__file__))
INCLUDE = os.environ.get("QWEN3NEXT_INCLUDE")
HEADER = os.path.join(INCLUDE or os.path.join(TOOLS, os.pardir), "qwen3next.h")
MAKE_HEADER = os.path.join(INCLUDE or TOOLS, "q3n_make.h")

MAGIC = b"\x89Q3N\r\n\x1a\n"
VERSION = 1
CONFIG, TENSORS, NAMES, TOKENIZER = 1, 2, 3, 4
MUST_KNOW = 1                # section flag: a reader that does not know the kind refuses the file
RECORD_BYTES = 80
DATA_ALIGN = 64
EXPERT_ALIGN = 4096
READ_BYTES = 1 << 22         # at once, when checksums are computed
MAX_HEADER = 1 << 24         # bytes of a C header

# Keys of CONFIG beside the fields of Q3N_CONFIG_LIST, with their kind.
EXTRA_KEYS = {
    "layer_types": "ints", "layer_experts": "ints", "name": "string", "eos_ids": "ints",
    "bos_id": "int", "pad_id": "int", "labels": "strings", "chat": "string",
    "tokenizer_pattern": "string", "tokenizer_nfc": "int", "tokenizer_prefix": "ints",
    "tokenizer_suffix": "ints", "converter": "string",
}
PATTERNS = ("qwen2", "qwen3_5")

Type = collections.namedtuple("Type", "name number block_len block_bytes")
Recipe = collections.namedtuple("Recipe", "name experts other sensitive ends")
Field = collections.namedtuple("Field", "name kind least most")


class Definitions:
    """What the headers say: types by name, fields by name, words of the enums, recipes, the ABI."""

    def __init__(self, path=HEADER, make_path=MAKE_HEADER):
        try:
            text = files.read_text(path, MAX_HEADER)
            make_text = files.read_text(make_path, MAX_HEADER)
        except ConvertError as e:
            raise ConvertError("%s (the converter reads the headers)" % e)
        abi = re.search(r"#define Q3N_ABI (\d+)", text)
        if not abi:
            raise ConvertError("%s: found no Q3N_ABI" % path)
        self.abi = int(abi.group(1))
        self.types, self.fields = {}, collections.OrderedDict()
        for macro in ("Q3N_FLOAT_TYPE_LIST", "Q3N_QUANT_TYPE_LIST"):
            for _, name, number, length, size in self._rows(text, macro, 5, path):
                self.types[name] = Type(name, int(number), int(length), int(size))
        self.recipes = collections.OrderedDict(
            (row[0], Recipe(row[0], *(name.lower() for name in row[1:])))
            for row in self._rows(make_text, "Q3N_RECIPE_LIST", 5, make_path))
        # Bounds of the loader, by their names in the header: MAX_ADDED, MAX_IDS, ...
        self.limits = {
            n: int(v) << int(by or 0) for n, v, by in
            re.findall(r"#define Q3N__?(MAX_\w+) +\(?(?:\(int64_t\))?(\d+)(?: << (\d+)\))?", text)}
        constants = {"Q3N_" + n: v for n, v in self.limits.items()}
        for kind, name, least, most in self._rows(text, "Q3N_CONFIG_LIST", 4, path):
            self.fields[name] = Field(name, kind, *(_number(t, constants) for t in (least, most)))
        self.words = {}
        for name, prefix in (("family", "FAMILY"), ("pooling", "POOLING"), ("rope_type", "ROPE"),
                             ("classifier_input", "CLASSIFIER"), ("problem_type", "PROBLEM")):
            body = re.search(r"typedef enum q3n_%s \{(.*?)\}" % name, text, re.S)
            found = re.findall(r"\bQ3N_%s_(\w+)\b" % prefix, body.group(1) if body else "")
            self.words[name] = [w.lower() for w in found if not w.endswith("COUNT")]

    @staticmethod
    def _rows(text, macro, n, path):
        body = re.search(r"#define %s\(X\)((?:.*\\\n)*.*\n)" % macro, text)
        rows = re.findall(r"X\(([^()]*)\)", body.group(1)) if body else []
        rows = [[part.strip().strip('"') for part in row.split(",")] for row in rows]
        if not rows or any(len(row) != n for row in rows):
            raise ConvertError("%s: found no %s with rows of %d entries" % (path, macro, n))
        return rows

    def check_config(self, config, where="configuration"):
        """Refuse a configuration that the library would refuse: unknown keys, wrong ranges, what
        does not go together."""
        for key, value in config.items():
            field = self.fields.get(key)
            if field is None and key not in EXTRA_KEYS:
                raise ConvertError("%s: no field %s in qwen3next.h" % (where, key))
            if field is None:
                continue
            if field.kind == "E":
                if value not in self.words[key]:
                    raise ConvertError("%s: %s: found %r, expected one of %s"
                                       % (where, key, value, ", ".join(self.words[key])))
            elif not field.least <= value <= field.most:
                raise ConvertError("%s: %s: found %s, expected %s .. %s"
                                   % (where, key, value, field.least, field.most))
        missing = [name for name in self.fields if name not in config]
        if missing:
            raise ConvertError("%s: no value for %s" % (where, ", ".join(missing)))
        _check_together(config, where)
        self._check_extra(config, where)

    def _check_extra(self, c, where):
        """The keys beside the fields."""
        def bad(key, found, expected):
            raise ConvertError("%s: %s: found %s, expected %s" % (where, key, found, expected))

        for key, limit in (("name", "MAX_NAME"), ("chat", "MAX_CHAT")):
            n = len(utf8(c.get(key, ""), where))
            if n > self.limits[limit] or "\0" in c.get(key, ""):
                bad(key, "%d bytes" % n, "at most %d, none of them 0" % self.limits[limit])
        for key in ("eos_ids", "tokenizer_prefix", "tokenizer_suffix"):
            ids = c.get(key, [])
            if len(ids) > self.limits["MAX_IDS"]:
                bad(key, "%d token ids" % len(ids), "at most %d" % self.limits["MAX_IDS"])
            if not all(0 <= i < c["vocab_size"] for i in ids):
                bad(key, ids, "token ids less than vocab_size, %d" % c["vocab_size"])
        if not 0 <= c.get("pad_id", 0) < (1 << 31) - 1:
            bad("pad_id", c["pad_id"], "a token id")
        labels = c.get("labels")
        if labels is not None and (len(labels) != c["num_labels"] or not labels):
            bad("labels", "%d names" % len(labels), "num_labels, %d" % c["num_labels"])
        if any("\0" in label for label in labels or []):
            bad("labels", "a byte 0 in a name", "none")
        if c.get("tokenizer_pattern", PATTERNS[0]) not in PATTERNS:
            bad("tokenizer_pattern", repr(c["tokenizer_pattern"]), "one of " + ", ".join(PATTERNS))
        for key in ("layer_types", "layer_experts"):
            if len(c.get(key, ())) != c["num_hidden_layers"] or not set(c[key]) <= {0, 1}:
                bad(key, str(c.get(key))[:80], "0 or 1 for each of %d layers"
                    % c["num_hidden_layers"])

    def kind(self, key):
        """'int', 'float', 'string' or 'ints'."""
        if key in EXTRA_KEYS:
            return EXTRA_KEYS[key]
        return {"I": "int", "B": "int", "F": "float", "E": "string"}[self.fields[key].kind]


def utf8(text, where):
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConvertError("%s: found the text %a, expected valid Unicode" % (where, text[:60]))


def _check_together(c, where):
    """q3n_config_check: what fields demand of one another."""
    def need(ok, text):
        if not ok:
            raise ConvertError("%s: %s" % (where, text % c))

    need(c["num_attention_heads"] % c["num_key_value_heads"] == 0,
         "num_attention_heads: found %(num_attention_heads)d, expected a multiple of "
         "num_key_value_heads, %(num_key_value_heads)d")
    need(c["causal"] or not c["num_mtp_layers"],
         "num_mtp_layers: found 1, expected causal 1 with it")
    need(c["rotary_dim"] % 2 == 0 and c["rotary_dim"] <= c["head_dim"],
         "rotary_dim: found %(rotary_dim)d, expected an even number up to head_dim, %(head_dim)d")
    need(c["rope_type"] != "table" or c["rotary_dim"] == c["head_dim"],
         "rotary_dim: found %(rotary_dim)d, expected head_dim, %(head_dim)d, for rope_type table")
    need(c["rope_type"] != "yarn" or (c["rope_original_max_position"] > 0 and c["rope_theta"] > 1
                                      and c["rope_beta_fast"] >= c["rope_beta_slow"] > 0),
         "rope_type yarn: found rope_original_max_position %(rope_original_max_position)d, "
         "rope_theta %(rope_theta)g, beta_fast %(rope_beta_fast)g and beta_slow "
         "%(rope_beta_slow)g, expected a position above 0, theta above 1 and beta_fast >= "
         "beta_slow > 0")
    experts = c["layer_experts"] + [int(c["num_experts"] > 0)] * c["num_mtp_layers"]
    need(0 not in experts or c["intermediate_size"],
         "intermediate_size: found 0, expected the width of the dense layers")
    need(1 not in experts or (0 < c["num_experts_per_tok"] <= c["num_experts"]
                              and c["moe_intermediate_size"]),
         "num_experts %(num_experts)d, num_experts_per_tok %(num_experts_per_tok)d, "
         "moe_intermediate_size %(moe_intermediate_size)d: expected more than 0, and no more "
         "experts per token than there are")
    if 1 not in c["layer_types"]:
        return
    for key in ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
                "linear_value_head_dim", "linear_conv_kernel_dim"):
        need(c[key], key + ": found 0, expected more for the DeltaNet layers")
    need(c["linear_num_value_heads"] % c["linear_num_key_heads"] == 0,
         "linear_num_value_heads: found %(linear_num_value_heads)d, expected a multiple of "
         "linear_num_key_heads, %(linear_num_key_heads)d")
    need(c["causal"], "causal: found 0, expected 1 with DeltaNet layers")


def _number(text, constants):
    """A bound of Q3N_CONFIG_LIST; None for an enum's count, which words replace."""
    shift = re.match(r"(\d+) *<< *(\d+)$", text)
    if shift:
        return int(shift.group(1)) << int(shift.group(2))
    if text in constants:
        return constants[text]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None


def align(n, to):
    return (n + to - 1) // to * to


# ---- Layout ----

def matrix_bytes(type_, rows, cols):
    """Quantised types have tiles of 16 rows."""
    blocks = -(-cols // type_.block_len)
    return (align(rows, 16) if type_.block_len > 1 else rows) * blocks * type_.block_bytes


class Tensor:
    """One record of the tensor table."""

    __slots__ = ("name", "type", "dims", "offset", "slice_bytes", "stride", "crc")

    def __init__(self, name, type_, dims):
        self.name, self.type, self.dims = name, type_, tuple(dims)
        self.slice_bytes = matrix_bytes(type_, dims[-2] if len(dims) > 1 else 1, dims[-1])
        self.offset = self.stride = self.crc = 0

    @property
    def n_slices(self):
        return self.dims[0] if len(self.dims) == 3 else 1

    @property
    def bytes(self):
        return self.n_slices * self.slice_bytes

    def slice_offset(self, e):
        return self.offset + e * self.stride


def place(groups, meta_bytes):
    """Give every tensor its offset; the file's size.  A group is one tensor, or the three of a
    layer's experts, whose slices interleave."""
    at = align(meta_bytes, DATA_ALIGN)
    for group in groups:
        if len(group[0].dims) < 3:
            (t,) = group
            t.offset = at
            at = align(at + t.slice_bytes, DATA_ALIGN)
            continue
        at = align(at, EXPERT_ALIGN)
        within = 0
        for t in group:
            t.offset = at + within
            within = align(within + t.slice_bytes, DATA_ALIGN)
        stride = align(within, EXPERT_ALIGN)
        for t in group:
            t.stride = stride
        at += stride * group[0].dims[0]
    return at


# ---- Packing ----

def pack_config(config, definitions):
    out = bytearray()
    for key, value in config.items():
        kind = definitions.kind(key)
        if kind == "string":
            type_, data = 3, utf8(value, key)
        elif kind == "strings":
            type_, data = 3, b"".join(utf8(text, key) + b"\0" for text in value)
        elif kind == "float":
            type_, data = 2, struct.pack("<d", value)
        else:
            values = value if kind == "ints" else [value]
            type_, data = 1, struct.pack("<%dq" % len(values), *values)
        name = key.encode("ascii")
        out += struct.pack("<BBHI", len(name), type_, 0, len(data)) + name + data
        out += bytes(-len(out) % 8)
    return bytes(out)


def pack_tensors(tensors):
    """The TENSORS and NAMES sections."""
    records, names = bytearray(struct.pack("<II", len(tensors), RECORD_BYTES)), bytearray()
    for t in tensors:
        name = t.name.encode("utf-8")
        dims = t.dims + (1,) * (3 - len(t.dims))
        records += struct.pack("<IIII3QQQQI12x", len(names), len(name), t.type.number, len(t.dims),
                               *(dims + (t.offset, t.slice_bytes, t.stride, t.crc)))
        names += name
    return bytes(records), bytes(names)


def pack_meta(config, tensors, tokenizer, file_bytes, definitions):
    """Header, section table and sections.  The length does not depend on offsets and checksums."""
    records, names = pack_tensors(tensors)
    sections = [(CONFIG, pack_config(config, definitions)), (TENSORS, records), (NAMES, names)]
    if tokenizer:
        sections.append((TOKENIZER, tokenizer))
    at = 64 + 32 * len(sections)
    table, body = bytearray(), bytearray()
    for kind, data in sections:
        flags = 0 if kind == TOKENIZER else MUST_KNOW
        table += struct.pack("<IIQQQ", kind, flags, at + len(body), len(data), 0)
        body += data + bytes(-len(data) % 8)
    meta_bytes = at + len(body)

    def header(crc):
        return MAGIC + struct.pack("<IIQQI28x", VERSION, len(sections), file_bytes, meta_bytes, crc)

    rest = bytes(table + body)
    return header(zlib.crc32(rest, zlib.crc32(header(0)))) + rest


def pack_tokenizer(t):
    """tokens: bytes by id; merges: (left, right, result) by rank; added: (id, flags)."""
    tokens, merges, added = t
    out = [struct.pack("<IIII", len(tokens), len(merges), len(added), 0)]
    offsets, at = [0], 0
    for text in tokens:
        at += len(text)
        offsets.append(at)
    out.append(struct.pack("<%dI" % len(offsets), *offsets))
    out.append(b"".join(struct.pack("<III", *m) for m in merges))
    out.append(b"".join(struct.pack("<II", *a) for a in added))
    return b"".join(out + list(tokens))


Tokenizer = collections.namedtuple("Tokenizer", "tokens merges added")


def check_tokenizer(t, vocab_size, definitions, where):
    """Refuse a TOKENIZER section that the library would refuse."""
    def need(ok, what, found, expected):
        if not ok:
            raise ConvertError("%s: %s: found %s, expected %s" % (where, what, found, expected))

    n, limit = len(t.tokens), definitions.limits["MAX_ADDED"]
    need(1 <= n <= vocab_size, "tokens", n, "1 to vocab_size, %d" % vocab_size)
    gone = {bytes([b]) for b in range(256)}.difference(t.tokens)
    need(not gone, "vocab", "no token for the byte 0x%02X" % min(gone or [b"\0"])[0],
         "one for each byte")
    for rank, merge in enumerate(t.merges):
        need(max(merge) < n, "merge %d" % rank, "ids %s" % (merge,), "ids less than %d" % n)
        left, right, both = (len(t.tokens[i]) for i in merge)
        need(left and right and left + right == both, "merge %d" % rank, "tokens of %d and %d "
             "bytes that make one of %d" % (left, right, both), "the bytes of both")
    added = set()
    for i, _ in t.added:
        need(0 <= i < n and i not in added, "added token", "id %d" % i, "ids less than %d, each "
             "once" % n)
        need(0 < len(t.tokens[i]) <= limit, "added token %d" % i, "%d bytes" % len(t.tokens[i]),
             "1 to %d" % limit)
        added.add(i)


# ---- Reading ----


class File:
    """A .q3n file opened for reading: config, tensors by name, tokenizer."""

    def __init__(self, path, definitions=None):
        self.path, self.definitions = path, definitions or Definitions()
        self.file = files.open_input(path)
        try:
            self._parse()
        except BaseException as e:
            self.file.close()
            if isinstance(e, struct.error):
                raise ConvertError("%s: metadata end too early" % path)
            if isinstance(e, UnicodeDecodeError):
                raise ConvertError("%s: metadata: found the bytes %r in a text, expected %s"
                                   % (path, e.object[e.start:e.end], e.encoding))
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def _require(self, ok, what, found, expected):
        if not ok:
            raise ConvertError("%s: %s: found %s, expected %s" % (self.path, what, found, expected))

    def _parse(self):
        size = os.fstat(self.file.fileno()).st_size
        head = self.file.read(64)
        self._require(head[:8] == MAGIC, "magic", head[:8], MAGIC)
        version, n, file_bytes, meta_bytes, crc = struct.unpack_from("<IIQQI", head, 8)
        self._require(version == VERSION, "version", version, VERSION)
        self._require(file_bytes == size, "file_bytes", file_bytes, size)
        self._require(n <= 64 and 64 + 32 * n <= meta_bytes <= size, "meta_bytes", meta_bytes,
                      "at most %d" % size)
        self.file.seek(0)
        meta = self.file.read(meta_bytes)
        found = zlib.crc32(meta[36:], zlib.crc32(meta[:32] + bytes(4)))
        self._require(found == crc, "meta_crc", "%08x" % crc, "%08x" % found)
        self.file_bytes, self.meta_bytes = file_bytes, meta_bytes
        parts = {}
        for i in range(n):
            kind, flags, offset, length, _ = struct.unpack_from("<IIQQQ", meta, 64 + 32 * i)
            self._require(offset % 8 == 0 and 64 + 32 * n <= offset <= meta_bytes - length,
                          "section %d" % kind, "[%d, +%d)" % (offset, length), "inside metadata")
            self._require(kind not in parts, "section %d" % kind, "two", "one")
            self._require(kind <= TOKENIZER or not flags & MUST_KNOW, "section kind", kind,
                          "1 .. 4")
            parts[kind] = meta[offset:offset + length]
        for kind in (CONFIG, TENSORS, NAMES):
            self._require(kind in parts, "section %d" % kind, "none", "one")
        self.config = self._config(parts[CONFIG])
        self.tensors = self._tensors(parts[TENSORS], parts[NAMES])
        self.tokenizer = self._tokenizer(parts[TOKENIZER]) if TOKENIZER in parts else None

    def _config(self, data):
        config, at = collections.OrderedDict(), 0
        while at < len(data):
            key_bytes, type_, zero, value_bytes = struct.unpack_from("<BBHI", data, at)
            start, end = at + 8 + key_bytes, at + 8 + key_bytes + value_bytes
            self._require(end <= len(data) and zero == 0, "CONFIG", "an entry past its end", "none")
            key, raw = data[at + 8:start].decode("ascii"), data[start:end]
            self._require(key not in config, key, "two", "one")
            self._require(type_ in (1, 2, 3), key + ": type", type_, "1, 2 or 3")
            if type_ == 3:
                text = raw.decode("utf-8")
                is_list = EXTRA_KEYS.get(key) == "strings"
                config[key] = text.split("\0")[:-1] if is_list else text
            else:
                values = list(struct.unpack("<%d%s" % (value_bytes // 8, " qd"[type_]), raw))
                is_list = EXTRA_KEYS.get(key) == "ints"
                config[key] = values if is_list or len(values) != 1 else values[0]
            at = align(end, 8)
        return config

    def _tensors(self, data, names):
        types = {t.number: t for t in self.definitions.types.values()}
        tensors = collections.OrderedDict()
        n, record_bytes = struct.unpack_from("<II", data)
        for i in range(n):
            v = struct.unpack_from("<IIII3QQQQI", data, 8 + i * record_bytes)
            name = names[v[0]:v[0] + v[1]].decode("utf-8")
            self._require(v[2] in types, name + ": type", v[2], sorted(types))
            self._require(1 <= v[3] <= 3 and min(v[4:7]) > 0, name + ": dims",
                          "%d, %s" % (v[3], list(v[4:7])), "1 to 3, none of them 0")
            t = Tensor(name, types[v[2]], v[4:4 + v[3]])
            self._require(t.slice_bytes == v[8], name + ": slice_bytes", v[8], t.slice_bytes)
            t.offset, t.stride, t.crc = v[7], v[9], v[10]
            self._require(t.stride >= t.slice_bytes if v[3] == 3 else t.stride == 0,
                          name + ": stride", t.stride, "slice_bytes or more, 0 for a matrix")
            end = t.slice_offset(t.n_slices - 1) + t.slice_bytes
            self._require(t.offset % 64 == 0 and self.meta_bytes <= t.offset
                          and end <= self.file_bytes, name + ": place",
                          "[%d, %d)" % (t.offset, end), "inside the file, at a multiple of 64")
            self._require(name not in tensors, name, "two", "one")
            tensors[name] = t
        return tensors

    def _tokenizer(self, data):
        n_tokens, n_merges, n_added, _ = struct.unpack_from("<IIII", data)
        at = 16
        offsets = struct.unpack_from("<%dI" % (n_tokens + 1), data, at)
        at += 4 * (n_tokens + 1)
        m = struct.unpack_from("<%dI" % (3 * n_merges), data, at)
        at += 12 * n_merges
        a = struct.unpack_from("<%dI" % (2 * n_added), data, at)
        text = data[at + 8 * n_added:]
        self._require(offsets[-1] == len(text), "TOKENIZER text", len(text), offsets[-1])
        t = Tokenizer([text[offsets[i]:offsets[i + 1]] for i in range(n_tokens)],
                      list(zip(m[0::3], m[1::3], m[2::3])), list(zip(a[0::2], a[1::2])))
        vocab_size = self.config.get("vocab_size")
        self._require(isinstance(vocab_size, int), "vocab_size", vocab_size, "a whole number")
        check_tokenizer(t, vocab_size, self.definitions, self.path)
        return t

    def slices(self, name):
        """The bytes of one slice after the other."""
        t = self.tensors[name]
        for e in range(t.n_slices):
            self.file.seek(t.slice_offset(e))
            data = self.file.read(t.slice_bytes)
            self._require(len(data) == t.slice_bytes, name, len(data), t.slice_bytes)
            yield data

    def data(self, name):
        return b"".join(self.slices(name))

    def verify(self):
        """Names of the tensors whose checksum does not match."""
        bad = []
        for name, t in self.tensors.items():
            crc = 0
            for e in range(t.n_slices):
                self.file.seek(t.slice_offset(e))
                left = t.slice_bytes
                while left:
                    data = self.file.read(min(left, READ_BYTES))
                    if not data:
                        break
                    crc, left = zlib.crc32(data, crc), left - len(data)
            if crc != t.crc:
                bad.append(name)
        return bad


def main(argv):
    verify = argv[:1] == ["--verify"]
    if len(argv) != 1 + verify or argv[-1].startswith("-"):
        sys.stderr.write("usage: q3n_file.py [--verify] FILE\n")
        return 2
    files.print_any(sys.stdout)
    try:
        with File(argv[-1]) as f:
            for key, value in f.config.items():
                print("%-32s %s" % (key, files.line(str(value))))
            if f.tokenizer:
                print("%-32s %d tokens, %d merges, %d added" % (
                    ("tokenizer",) + tuple(len(part) for part in f.tokenizer)))
            for t in f.tensors.values():
                print("%-56s %-5s %-20s offset %-12d bytes %-12d stride %-8d crc %08x" % (
                    files.line(t.name), t.type.name, list(t.dims), t.offset, t.bytes, t.stride,
                    t.crc))
            bad = f.verify() if verify else []
    except (ConvertError, OSError) as e:
        sys.stderr.write("q3n_file.py: error: %s\n" % files.line(str(e)))
        return 1
    for name in bad:
        sys.stderr.write("q3n_file.py: error: %s: checksum differs\n"
                         % files.line("%s: %s" % (argv[-1], name)))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
