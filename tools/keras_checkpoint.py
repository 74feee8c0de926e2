"""The plan for a Keras file of the design model: .keras (a zip) or .weights.h5, both revisions.

Kernels are [in, out] and rotary pairs adjacent; the file written has [out, in] and halves.
"""
import io
import json
import math
import re
import struct
import zipfile

import files
import hf_config
from matrix import Matrix
from model_plan import Plan
from q3n_file import ConvertError

try:
    import numpy as np
    import h5py
except ImportError:
    np = h5py = None

WEIGHTS = "model.weights.h5"
PREFIXES = ("layers/qwen3_next/", "layers/qwen3/")       # of task models
POOLINGS = {"cls": "first", "first": "first", "last": "last", "mean": "mean"}
TABLE_TOLERANCE = 1e-6           # between the file's rotary tables and the formula
THETAS = (1e4, 1e6, 5e5, 1e7)    # tried after the configuration's
MIN_ANGLE = 1e-12                # of the slowest pair at position 1: that of any theta in use
MAX_JSON = 1 << 26               # bytes of config.json inside a .keras file
WHOLE_BYTES = 1 << 26            # kernels up to this size are read at once
HELP = "a Keras file needs h5py and numpy: pip install h5py (or apt-get install python3-h5py)"


# ---- Matrices ----

class Kernel(Matrix):
    """A dataset [in, out] as rows [out, in], f32.  order: source column of each row."""

    __slots__ = ("dataset", "order", "last")

    def __init__(self, dataset, order, last):
        """last: [dataset, transpose] of the small kernel read last, shared by all kernels."""
        Matrix.__init__(self, dataset.shape[1], dataset.shape[0], "f32", dataset.name.lstrip("/"))
        self.dataset, self.order, self.last = dataset, order, last

    def read(self, start, count):
        rows = slice(start, start + count)
        if self.order is not None:
            rows = self.order[rows]
        if 4 * self.rows * self.cols <= WHOLE_BYTES:
            if self.last[0] is not self.dataset:
                self.last[:] = self.dataset, self.dataset[:].T
            block = self.last[1][rows]
        elif self.order is None:
            block = self.dataset[:, rows].T
        else:                            # heads are permuted within, so the columns lie together
            first = int(rows.min())
            block = self.dataset[:, first:int(rows.max()) + 1].T[rows - first]
        return np.ascontiguousarray(block, "<f4").tobytes()


class Plain(Matrix):
    """A dataset [rows, cols] or [cols] as it is, f32; order: source element of each (vectors)."""

    __slots__ = ("dataset", "order")

    def __init__(self, dataset, order=None):
        shape = dataset.shape if len(dataset.shape) == 2 else (1,) + dataset.shape
        Matrix.__init__(self, shape[0], shape[1], "f32", dataset.name.lstrip("/"))
        self.dataset, self.order = dataset, order

    def read(self, start, count):
        if len(self.dataset.shape) == 2:
            block = self.dataset[start:start + count]
        else:
            block = self.dataset[:] if self.order is None else self.dataset[:][self.order]
        return np.ascontiguousarray(block, "<f4").tobytes()


class Stack(Matrix):
    """Vectors of equal length, one a row."""

    __slots__ = ("vectors",)

    def __init__(self, vectors):
        Matrix.__init__(self, len(vectors), vectors[0].cols, "f32", vectors[0].source)
        self.vectors = vectors

    def read(self, start, count):
        return b"".join(v.read(0, 1) for v in self.vectors[start:start + count])


def half_rotate(heads, head_dim):
    """Source column of each row: per head new[j] = old[2 j], new[D / 2 + j] = old[2 j + 1]."""
    within = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1)


# ---- The file ----

def open_file(path):
    """(h5py file, raw configuration or None)."""
    if h5py is None:
        raise ConvertError(HELP)
    source = files.open_input(path)
    try:
        if path.endswith(".keras"):
            return _open_archive(path, source)
    except BaseException:
        source.close()
        raise
    source.close()                       # HDF5 opens it again: its own reading is faster
    return _open_h5(path, path), None


def _open_archive(path, source):
    try:
        archive = zipfile.ZipFile(source)
        members = {i.filename: i for i in archive.infolist()}
        for name in ("config.json", WEIGHTS):
            if name not in members:
                raise ConvertError("%s: found no %s, expected it in the archive" % (path, name))
        if members["config.json"].file_size > MAX_JSON:
            raise ConvertError("%s: config.json: found %d bytes, expected at most %d"
                               % (path, members["config.json"].file_size, MAX_JSON))
        config = json.loads(archive.read("config.json").decode("utf-8"))
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as e:
        raise ConvertError("%s: cannot read the archive: %s" % (path, e))
    except (ValueError, RecursionError) as e:
        raise ConvertError("%s: config.json: not valid JSON: %s" % (path, e))
    return _open_h5(Member(path, source, members[WEIGHTS]), "%s: %s" % (path, WEIGHTS)), config


class Member(io.RawIOBase):
    """A stored member of a zip archive, read in place: Python's own zip reader seeks by reading."""

    def __init__(self, path, file, info):
        io.RawIOBase.__init__(self)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ConvertError("%s: %s: found it compressed, expected it stored: unzip it and give "
                               "the .weights.h5 file with --config" % (path, info.filename))
        self.file, self.size, self.at = file, info.file_size, 0
        self.file.seek(info.header_offset)
        local = self.file.read(30)       # local header: lengths of name and extra at its end
        if len(local) < 30 or local[:4] != b"PK\3\4":
            raise ConvertError("%s: %s: found no local header, expected it at byte %d"
                               % (path, info.filename, info.header_offset))
        self.start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer):
        n = max(0, min(len(buffer), self.size - self.at))
        self.file.seek(self.start + self.at)
        data = self.file.read(n)
        buffer[:len(data)] = data
        self.at += len(data)
        return len(data)


def _open_h5(source, where):
    try:
        return h5py.File(source, "r")
    except (OSError, ValueError) as e:
        raise ConvertError("%s: not a readable HDF5 file: %s" % (where, str(e).split("\n")[0]))


def find_model(config):
    """The model's own configuration, wherever a task model nests it."""
    stack = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if "hidden_size" in value and "vocab_size" in value:
                return value
            stack += list(value.values())
        elif isinstance(value, list):
            stack += value
    return {}


def find_key(config, key):
    """The first value of a key at any depth."""
    stack = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if value.get(key) is not None:
                return value[key]
            stack += list(value.values())
        elif isinstance(value, list):
            stack += value
    return None


def indexed(base, i):
    return base if i == 0 else "%s_%d" % (base, i)


class Dataset:
    """A dataset of HDF5 that says where it is when it cannot be read: its blocks may be damaged."""

    def __init__(self, item, where):
        self.item, self.where = item, where
        self.dtype, self.name = item.dtype, item.name
        self.shape = item.shape or ()        # of an empty one None
        if item.external or item.is_virtual:
            raise ConvertError("%s: %s: found its data in another file, expected them here"
                               % (where, item.name))

    def __getitem__(self, key):
        try:
            return self.item[key]
        except (OSError, RuntimeError) as e:
            raise ConvertError("%s: %s: cannot read: %s" % (self.where, self.name, e))


class Weights:
    """Float datasets by path; taken with the expected shape, and counted."""

    def __init__(self, h5, plan):
        self.all, self.used, self.plan, self.prefix = {}, set(), plan, ""
        self.last = [None, None]
        try:
            h5.visititems(self._add)
        except (OSError, RuntimeError, KeyError) as e:
            raise ConvertError("%s: not a readable HDF5 file: %s" % (plan.where, e))

    def _add(self, name, item):
        if isinstance(item, h5py.Dataset):
            self.all[name] = Dataset(item, self.plan.where)

    def has(self, path, i=0):
        return "%s%s/vars/%d" % (self.prefix, path, i) in self.all

    def shape(self, path, i=0, dims=2):
        """The shape of a dataset that the geometry is taken from; None if it is not there."""
        dataset = self.all.get("%s%s/vars/%d" % (self.prefix, path, i))
        return dataset.shape if dataset is not None and len(dataset.shape) == dims else None

    def take(self, path, shape, i=0, prefix=None):
        """The dataset, or None after noting the problem."""
        name = "%s%s/vars/%d" % (self.prefix if prefix is None else prefix, path, i)
        dataset = self.all.get(name)
        if dataset is None:
            self.plan.problem(name, "nothing", list(shape))
            return None
        self.used.add(name)
        if dataset.shape != tuple(shape):
            self.plan.problem(name, list(dataset.shape), list(shape))
        elif dataset.dtype.kind != "f":
            self.plan.problem(name, "type %s" % dataset.dtype, "a float type")
        else:
            return dataset
        return None

    def kernel(self, path, n_in, n_out, order=None, prefix=None):
        dataset = self.take(path, (n_in, n_out), 0, prefix)
        return Kernel(dataset, order, self.last) if dataset is not None \
            else Matrix(n_out, n_in, "f32", path)

    def vector(self, path, n, i=0, order=None, prefix=None):
        dataset = self.take(path, (n,), i, prefix)
        return Plain(dataset, order) if dataset is not None else Matrix(1, n, "f32", path)


# ---- Geometry ----

class Geometry:
    """What the shapes say, with the configuration for what they do not."""

    def __init__(self, w, config, plan):
        self.w, self.plan = w, plan
        prefixes = [p for p in PREFIXES if p + "embeddings/vars/0" in w.all]
        self.task = bool(prefixes)
        w.prefix = prefixes[0] if prefixes else ""
        self.newer = any(n.startswith(w.prefix + "blocks/transformer_layer") for n in w.all)
        self.base = ("blocks/" if self.newer else "layers/") + "transformer_layer"
        self.V, self.d = self.require("embeddings", "[vocabulary, hidden]")
        self.layers = self.count(self.base, "/attention_norm/vars/0")
        if not self.layers:
            raise ConvertError("%s: found no %s, expected the design model's layers"
                               % (plan.where, w.prefix + self.base))
        self.head(config)
        self.ffn()

    def require(self, path, what):
        shape = self.w.shape(path)
        if shape is None:
            found = "nothing" if not self.w.has(path) else "another number of dimensions"
            raise ConvertError("%s: %s%s/vars/0: found %s, expected %s"
                               % (self.plan.where, self.w.prefix, path, found, what))
        return shape

    def count(self, base, rest):
        """How many of base, base_1, ... have the dataset rest."""
        pattern = re.compile(r"%s(?:_(\d+))?%s$" % (re.escape(self.w.prefix + base),
                                                    re.escape(rest)))
        found = [int(m.group(1) or 0) for m in map(pattern.match, self.w.all) if m]
        return max(found) + 1 if found else 0

    def layer(self, l):
        return indexed(self.base, l)

    def head(self, config):
        """Heads from the rotary table's width, half a head; else from the configuration."""
        attention = self.layer(0) + "/attention/"
        table = self.w.shape(attention + "rope")
        q = self.require(attention + "w_q", "[hidden, heads x head_dim]")[1]
        k = self.require(attention + "w_k", "[hidden, kv heads x head_dim]")[1]
        self.table = table
        given = config.has("num_attention_heads")
        if table is None and not given:
            raise ConvertError("%s: found neither rotary tables nor a configuration, expected "
                               "--set num_attention_heads=N" % self.plan.where)
        H = config.whole("num_attention_heads", least=1) if given else None
        self.D = 2 * table[1] if table is not None else q // H
        self.H = H if given else q // max(self.D, 1)
        self.K = config.whole("num_key_value_heads", least=1) if config.has("num_key_value_heads") \
            else k // max(self.D, 1)
        if self.D < 2 or self.D % 2 or self.H * self.D != q or self.K * self.D != k \
                or self.H % self.K:
            raise ConvertError(
                "%s: found w_q of %d and w_k of %d columns, expected %s heads and %s kv heads of %d"
                % (self.plan.where, q, k, self.H, self.K, self.D))

    def ffn(self):
        """Widths of dense and expert layers; which layers have experts."""
        self.has_experts = [self.w.has(self.layer(l) + "/ffn_layer/gating_network/gate_dense")
                            for l in range(self.layers)]
        self.E = self.I = self.dense = 0
        for l in range(self.layers):
            path = self.layer(l) + "/ffn_layer/"
            if self.has_experts[l] and not self.E:
                self.E = self.require(path + "gating_network/gate_dense", "[hidden, experts]")[1]
                self.I = self.require(path + "experts/ffn_expert/ffn_block/gate_proj",
                                      "[hidden, width]")[1]
            elif not self.has_experts[l] and not self.dense:
                self.dense = self.require(path + "gate_proj", "[hidden, width]")[1]


def read_config(g, config, plan):
    """The fields of q3n_config, all but RoPE."""
    w, attention = g.w, g.layer(0) + "/attention/"
    expert = g.layer(g.has_experts.index(True)) + "/ffn_layer/" if g.E else ""
    mlp = expert + "experts/ffn_expert/ffn_block/" if g.E else g.layer(0) + "/ffn_layer/"
    out = {
        "family": "design", "vocab_size": g.V, "hidden_size": g.d, "num_hidden_layers": g.layers,
        "max_position_embeddings": _positions(g, config), "intermediate_size": g.dense,
        "num_attention_heads": g.H, "num_key_value_heads": g.K, "head_dim": g.D,
        "num_experts": g.E, "num_experts_per_tok": _top_k(g, config, plan) if g.E else 0,
        "moe_intermediate_size": g.I, "shared_expert_intermediate_size": 0,
        "linear_num_key_heads": 0, "linear_num_value_heads": 0, "linear_key_head_dim": 0,
        "linear_value_head_dim": 0, "linear_conv_kernel_dim": 0, "num_mtp_layers": 0,
        "num_labels": 0, "norm_topk_prob": 1,
        "attention_bias": int(w.has(attention + "w_q", 1)), "attn_output_gate": 0, "qk_norm": 0,
        "mlp_bias": int(w.has(mlp + "gate_proj", 1)),
        "router_bias": int(bool(g.E) and w.has(expert + "gating_network/gate_dense", 1)),
        "causal": int(g.newer), "tie_word_embeddings": int(not w.has("layers/dense")),
        "pooling": "last" if g.newer else "first", "classifier_input": "logits",
        "rms_norm_eps": config.real("norm_eps", 1e-6),
        "layer_types": [0] * g.layers, "layer_experts": [int(x) for x in g.has_experts],
    }
    return out


def _top_k(g, config, plan):
    key = "num_experts_per_tok"
    of_gating = config.object("moe_config").object("gating_config").values.get("top_k")
    if g.E == 1:
        return 1
    if of_gating is None and not config.has(key):
        raise ConvertError("%s: found %d experts and no configuration, expected "
                           "--set num_experts_per_tok=K" % (plan.where, g.E))
    top_k = config.whole(key, of_gating, least=1)
    if top_k > g.E:
        raise ConvertError("%s: %s: found %d, expected at most %d"
                           % (config.where, key, top_k, g.E))
    return top_k


def _positions(g, config):
    key = "max_seq_len" if config.has("max_seq_len") else "max_position_embeddings"
    return config.whole(key, g.table[0] if g.table is not None else 8192, least=1)


# ---- Rotary tables ----

def table_theta(cos, sin, wanted):
    """The theta whose formula gives these tables [positions, D / 2]; None if none does."""
    positions, half = cos.shape
    candidates = ([wanted] if wanted else []) + list(THETAS)
    if positions > 1 and half > 1:
        angle = math.atan2(sin[1, -1], cos[1, -1])
        if angle > MIN_ANGLE:
            candidates.append(round(angle ** (-half / (half - 1.0))))
    for theta in candidates:
        inverse = float(theta) ** -(np.arange(half) / half)
        angle = np.arange(positions)[:, None] * inverse
        if max(np.abs(np.cos(angle) - cos).max(), np.abs(np.sin(angle) - sin).max()) \
                <= TABLE_TOLERANCE:
            return float(theta)
    return None


def set_rope(g, config, out, plan):
    """RoPE fields, and the tables if no theta explains them: the file is followed."""
    theta = config.real("rope_theta", 0.0)
    if theta < 0:
        config.bad("rope_theta", "a number above 0")
    out.update({"rotary_dim": g.D, "rope_type": "default", "rope_theta": theta or 1e6,
                "rope_factor": 1.0, "rope_original_max_position": 0, "rope_beta_fast": 32.0,
                "rope_beta_slow": 1.0, "rope_attention_factor": 1.0})
    if g.table is None:
        plan.warnings.append("no rotary tables in the file: using theta %g" % out["rope_theta"])
        return None
    names = [g.layer(l) + "/attention/rope" for l in range(g.layers)]
    taken = [[g.w.take(name, g.table, i) for i in (0, 1)] for name in names]
    if any(t is None for pair in taken for t in pair):
        return None
    cos, sin = (np.asarray(t[:], np.float64) for t in taken[0])
    for name, pair in zip(names[1:], taken[1:]):
        if not all(np.array_equal(a, b[:]) for a, b in zip((cos, sin), pair)):
            plan.problem(name, "tables unlike the first layer's", "the same in every layer")
    found = table_theta(cos, sin, theta)
    if found:
        out["rope_theta"] = found
        if theta and abs(theta - found) > 1e-9 * found:
            plan.warnings.append("rotary tables follow theta %g, the configuration says %g: the "
                                 "tables are followed" % (found, theta))
        return None
    out["rope_type"] = "table"
    out["max_position_embeddings"] = min(out["max_position_embeddings"], g.table[0])
    if not cos.any() and not sin.any():
        plan.warnings.append("the rotary tables of this file are all zero (a defect of the older "
                             "revision): they are followed, so attention weighs all tokens alike")
    else:
        plan.warnings.append("no theta explains the rotary tables: they are kept in the file")
    return [Plain(t) for t in taken[0]]


# ---- Plan ----

class Builder:
    def __init__(self, g, out, plan):
        self.g, self.w, self.c, self.plan = g, g.w, out, plan

    def model(self, tables):
        g, w, plan = self.g, self.w, self.plan
        embeddings = w.take("embeddings", (g.V, g.d))
        plan.mat("embed_tokens.weight", Plain(embeddings) if embeddings is not None
                 else Matrix(g.V, g.d, "f32", "embeddings"))
        plan.vec("norm.weight", w.vector("final_norm", g.d))
        if not self.c["tie_word_embeddings"]:
            plan.mat("lm_head.weight", w.kernel("layers/dense", g.d, g.V))
            if w.has("layers/dense", 1):
                plan.problem(w.prefix + "layers/dense/vars/1", "a bias of lm_head", "none")
        self.classifier()
        if tables:
            for name, table in zip(("rope.cos", "rope.sin"), tables):
                plan.vec(name, table, (table.rows, table.cols))
        for l in range(g.layers):
            self.layer(g.layer(l) + "/", "layers.%d." % l, g.has_experts[l])

    def classifier(self):
        g, w, name = self.g, self.w, "layers/dense/vars/0"
        if not g.task or name not in w.all:
            return
        shape = w.all[name].shape
        self.c["num_labels"] = labels = shape[1] if len(shape) == 2 else 1
        self.plan.mat("score.weight", w.kernel("layers/dense", g.V, labels, prefix=""))
        if "layers/dense/vars/1" in w.all:
            self.plan.vec("score.bias", w.vector("layers/dense", labels, 1, prefix=""))

    def layer(self, source, out, experts):
        g, w, plan = self.g, self.w, self.plan
        plan.vec(out + "input_layernorm.weight", w.vector(source + "attention_norm", g.d))
        plan.vec(out + "post_attention_layernorm.weight", w.vector(source + "output_norm", g.d))
        self.attention(source + "attention/", out + "self_attn.")
        if experts:
            self.experts(source + "ffn_layer/", out + "mlp.")
        else:
            self.mlp(source + "ffn_layer/", out + "mlp.")

    def attention(self, source, out):
        g, w = self.g, self.w
        parts = (("q", g.d, g.H * g.D, half_rotate(g.H, g.D)),
                 ("k", g.d, g.K * g.D, half_rotate(g.K, g.D)),
                 ("v", g.d, g.K * g.D, None), ("o", g.H * g.D, g.d, None))
        for name, n_in, n_out, order in parts:
            self.plan.mat("%s%s_proj.weight" % (out, name),
                          w.kernel(source + "w_" + name, n_in, n_out, order))
        if self.c["attention_bias"]:
            for name, _, n_out, order in parts:
                self.plan.vec("%s%s_proj.bias" % (out, name),
                              w.vector(source + "w_" + name, n_out, 1, order))

    def mlp(self, source, out):
        g, w = self.g, self.w
        parts = (("gate", g.d, g.dense), ("up", g.d, g.dense), ("down", g.dense, g.d))
        for name, n_in, n_out in parts:
            self.plan.mat("%s%s_proj.weight" % (out, name),
                          w.kernel("%s%s_proj" % (source, name), n_in, n_out))
        if self.c["mlp_bias"]:
            for name, _, n_out in parts:
                self.plan.vec("%s%s_proj.bias" % (out, name),
                              w.vector("%s%s_proj" % (source, name), n_out, 1))

    def experts(self, source, out):
        g, w, plan = self.g, self.w, self.plan
        gate = source + "gating_network/gate_dense"
        plan.mat(out + "gate.weight", w.kernel(gate, g.d, g.E))
        if self.c["router_bias"]:
            plan.vec(out + "gate.bias", w.vector(gate, g.E, 1))
        paths = ["%sexperts/%s/ffn_block/" % (source, indexed("ffn_expert", e)) for e in range(g.E)]
        parts = (("gate", g.d, g.I), ("up", g.d, g.I), ("down", g.I, g.d))
        plan.experts(out + "experts.", *(
            [w.kernel("%s%s_proj" % (p, name), n_in, n_out) for p in paths]
            for name, n_in, n_out in parts))
        if self.c["mlp_bias"]:
            for name, _, n_out in parts:
                vectors = [w.vector("%s%s_proj" % (p, name), n_out, 1) for p in paths]
                plan.vec("%sexperts.%s_proj.bias" % (out, name), Stack(vectors), (g.E, n_out))


def reason(name):
    """Why a variable that the model does not use is passed over; None if nobody knows it."""
    if "/noise_dense/" in name:
        return "used in training only"
    if name.startswith("optimizer/"):
        return "optimizer state"
    if "seed_generator" in name:
        return "random state of training"
    return None


def plan(path, overrides):
    """The plan for a Keras file.  overrides: configuration that goes before the file's own."""
    h5, raw = open_file(path)
    p = Plan(path)
    p.close = h5.close                   # before Python ends: HDF5 calls back to read
    try:
        fill(p, h5, raw, overrides)
    except BaseException:
        h5.close()
        raise
    return p


def fill(p, h5, raw, overrides):
    config = hf_config.Settings(find_model(raw) if raw else {})
    config.update(find_model(overrides) or overrides)
    p.raw = config.with_values(overrides)
    config = hf_config.Json(config, "%s: configuration" % p.where)
    w = Weights(h5, p)
    g = Geometry(w, config, p)
    if raw is None:
        p.notes.append("no configuration in a .h5 file: geometry from the shapes, norm_eps %s"
                       % config.real("norm_eps", 1e-6))
    p.config = read_config(g, config, p)
    if not g.newer:
        p.warnings.append("older revision: attention looks both ways, as the file was trained")
    pooling = find_key(raw, "pooling_strategy")
    if isinstance(pooling, str) and pooling in POOLINGS:
        p.config["pooling"] = POOLINGS[pooling]
    tables = set_rope(g, config, p.config, p)
    Builder(g, p.config, p).model(tables)
    p.finish()
    unknown = []
    for name in w.all:
        if name not in w.used:
            why = reason(name)
            p.skipped.append((name, why or "not known to the design model"))
            if why is None:
                unknown.append(name)
    if unknown:
        p.warnings.append("%d datasets are not part of the design model and were passed over: %s"
                          % (len(unknown), ", ".join(unknown[:3])))
