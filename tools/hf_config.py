"""config.json of the families that Hugging Face transformers publishes, as fields of q3n_config.

Settings that may stand in two places, and which counts.  What transformers 5.17 does was measured
on configs with both (and read: [C] configuration_utils.py, [R] modeling_rope_utils.py, [G]
generation/utils.py, configuration_qwen3*.py).  The rule: as transformers; where that would lose a
value that the model was made with, refuse; never drop one without a word.  test_convert_config.py
walks this table row by row.

    SETTING        PLACES                   TRANSFORMERS 5.17             HERE
    rope set       rope_scaling |           rope_scaling, if not empty,   same, a warning; refused
                   rope_parameters          replaces the other whole [R]  if a default takes the
                                                                          place of rope_theta or
                                                                          the rotary factor
    rope by layer  one set | one set for    fails; qwen3_moe uses theta   refused
                   each layer type          10000 and default
    rope type      rope_type | type         rope_type [R]; null fails     same; null refused
    rope_theta     in the set | beside it   the set's, else the other,    same, a warning for
                                            else 10000; null fails        10000; null refused
    rotary factor  partial_rotary_factor    the set's, else the other,    same, a warning where
                   in the set | beside it   else 0.25 (hybrid) or 1;      it is ignored; refused
                                            null beside: 1; qwen3, _moe   for qwen3, _moe with a
                                            ignore it, or fail if scaled  scaled type
    yarn original  original_max_position_   beside it, else the set's,    same, a warning if they
                   embeddings: beside the   else max_position_embeddings  differ; null refused
                   set | in it              [R]; null fails
    yarn optional  factor null              max_position / original       same
                   beta_fast, _slow null|0  32, 1                         same
                   attention_factor null    from mscale and               same; 0 refused (cos and
                                            mscale_all_dim, else factor   sin would be 0)
                   truncate null            as false                      refused, as false is
    experts        num_local_experts |      qwen3_moe: the first;         same
                   num_experts              others: num_experts alone
    layer kinds    layer_types |            layer_types                   same
                   full_attention_interval
    sliding window layer_types |            layer_types; else layers      refused if a layer's
                   use_sliding_window,      from max_window_layers (28)   window is shorter than
                   sliding_window,          on; qwen3_moe: every layer;   the context
                   max_window_layers        window 4096 by default
    head_dim       itself | hidden_size /   the class's default: 128,     same
                   heads                    256; qwen3_moe: the quotient
    text_config    text_config | top level  text_config alone; what it    same; a warning for what
                                            lacks has its default; fails  stands at the top; a rope
                                            on yarn at the top            set there is refused
    model_type     text_config | top level  top level; of a wrapper of    same, a warning
                                            another family: text_config
    tying          text_config | top level  top level alone               same, a warning
    dtype          dtype | torch_dtype      dtype, else torch_dtype [C]   neither: a matrix keeps
                                                                          the type of its tensor
    labels         num_labels | id2label    num_labels                    rows of score.weight
    eos            generation_config.json   the first, even without eos   the first that has one,
                   | top level | text_      [G]; without it as here       with config.json's that of
                   config | tokenizer_                                    the tokenizer; a warning
                   config.json
    bos            top level | text_config  as eos                        as written here
                   | tokenizer_config.json
                   | generation_config.json
    pad            text_config | tokenizer_ as eos; classifiers: the      as written here;
                   config.json |            first alone                   classifiers: the first
                   generation_config.json                                 alone

--set KEY=VALUE goes to the place that counts; a key that is not read is an error (Settings.read).
"""
import difflib
import math

from files import ConvertError, shown

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3")
HYBRID = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
MAX_LAYERS = 256                 # Q3N_MAX_LAYERS
KV_HEADS = {"qwen3": 32, "qwen3_moe": 4, "qwen3_next": 2, "qwen3_5": 4, "qwen3_5_moe": 2}
HEAD_DIM = {"qwen3": 128, "qwen3_next": 256, "qwen3_5": 256, "qwen3_5_moe": 256}

# Of a config with text_config: what its top level alone says, and what it says first.
TOP = ("model_type", "tie_word_embeddings", "architectures")
TOP_FIRST = ("quantization_config", "id2label", "num_labels", "problem_type", "eos_token_id",
             "bos_token_id")
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")


class Settings(dict):
    """A config's keys.  read: those that someone asked for; overrides: those of --set."""

    def __init__(self, values, read=None, overrides=None):
        dict.__init__(self, values)
        self.read = set() if read is None else read
        self.overrides = {} if overrides is None else overrides

    def get(self, key, default=None):
        self.read.add(key)
        return dict.get(self, key, default)

    def __getitem__(self, key):
        self.read.add(key)
        return dict.__getitem__(self, key)

    def with_values(self, values):
        return Settings(values, self.read, self.overrides)


class Json:
    """A JSON object with typed access; errors name the file and the key."""

    def __init__(self, values, where):
        self.values, self.where = values, where

    def bad(self, key, expected):
        raise ConvertError("%s: %s: found %s, expected %s"
                           % (self.where, key, shown(self.values.get(key)), expected))

    def has(self, key):
        return self.values.get(key) is not None

    def given(self, key):
        """The key stands there, if only with null."""
        return self.has(key) or key in self.values

    def whole(self, key, default=None, least=0):
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            self.bad(key, "a whole number of at least %d" % least)
        return value

    def real(self, key, default=None):
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) \
                or not -1e300 < value < 1e300:
            self.bad(key, "a number")
        return float(value)

    def flag(self, key, default=False):
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool) and value not in (0, 1):
            self.bad(key, "true or false")
        return int(value)

    def word(self, key, default=""):
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            self.bad(key, "a string")
        return value

    def items(self, key, kind):
        """A list of kind; [] if absent."""
        value = self.values.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(v) is kind for v in value):
            self.bad(key, "a list of %s" % kind.__name__)
        return value

    def object(self, key):
        """{} if absent."""
        value = self.values.get(key)
        value = {} if value is None else value
        if not isinstance(value, dict):
            self.bad(key, "an object")
        return Json(value, "%s: %s" % (self.where, key))


def settings(raw):
    return raw if isinstance(raw, Settings) else Settings(raw)


def family_of(model_type):
    name = model_type if isinstance(model_type, str) else ""
    return name[:-5] if name.endswith("_text") else name


def text_part(raw, where):
    """The language model's part of a config: text_config, if it has one, and of the top level what
    TOP and TOP_FIRST name."""
    raw = settings(raw)
    if raw.get("text_config") is None:
        return Json(raw, where)
    inner = Json(raw, where).object("text_config").values
    merged = {k: v for k, v in inner.items() if k not in TOP}
    merged.update((k, dict.get(raw, k)) for k in TOP if k in raw)
    merged.update((k, dict.get(raw, k)) for k in TOP_FIRST if dict.get(raw, k) is not None)
    if family_of(raw.get("model_type")) not in FAMILIES:
        merged["model_type"] = inner.get("model_type")   # a wrapper of another family
    return Json(raw.with_values(merged), where)


def override(raw, values, where):
    """The config with the values of --set, each in the place that counts (see the table)."""
    out = Settings(raw, overrides=dict(values))
    if "text_config" in values:
        out["text_config"] = values["text_config"]
    nested = dict.get(out, "text_config") is not None
    inner = dict(Json(out, where).object("text_config").values) if nested else out
    for key, value in values.items():
        if key == "text_config":
            continue
        place = out if nested and key in TOP + TOP_FIRST else inner
        if key == "rope_parameters":
            place.pop("rope_scaling", None)
        if key == "num_experts" and "num_local_experts" in place:
            place["num_local_experts"] = value
        for name in ("rope_scaling", "rope_parameters"):
            rope = dict.get(place, name)
            if isinstance(rope, dict) and rope and name not in values and key in rope \
                    and key != "original_max_position_embeddings":
                place[name] = dict(rope, **{key: value})
                out.read.add(key)
        place[key] = value
    if nested:
        out["text_config"] = inner
    return out


def check_overrides(raw, family):
    """After all is planned: a key of --set that nobody asked for is an error."""
    for key in raw.overrides:
        if key not in raw.read:
            near = difflib.get_close_matches(key, sorted(raw.read), 1)
            raise ConvertError("--set %s: found a key that %s does not use here, expected one that "
                               "its config.json is read for%s"
                               % (key, family, ", such as " + near[0] if near else ""))


def _warn_of_top(raw, c, where, warnings):
    """Of a config with text_config: what one of its two levels says in vain."""
    inner = dict.get(raw, "text_config")
    if not inner:
        return
    for key in TOP[:2] + TOP_FIRST:
        value, used = dict.get(inner, key), dict.get(c.values, key)
        same = {"model_type": family_of, "tie_word_embeddings": bool}.get(key, lambda v: v)
        if value is not None and same(value) != same(used):
            warnings.append("%s: %s %s of text_config is not used: the top level counts"
                            % (where, key, shown(value)))
    for key in sorted(c.values.read - {"text_config"} - set(TOP + TOP_FIRST)):
        value = dict.get(raw, key)
        if value in (None, {}) or value == dict.get(c.values, key):
            continue
        if key in ("rope_scaling", "rope_parameters"):
            Json(raw, where).bad(key, "it in text_config, where it counts")
        warnings.append("%s: %s %s is not used: text_config counts" % (where, key, shown(value)))


def read(raw, where, warnings):
    """The configuration, all but what only the tensors tell: MTP, labels, tying."""
    raw = settings(raw)
    c = text_part(raw, where)
    family = family_of(c.values.get("model_type"))
    if family not in FAMILIES:
        c.bad("model_type", "one of %s" % ", ".join(FAMILIES))
    for key in ("per_layer_config", "transformers_weights"):
        if c.values.get(key):
            c.bad(key, "none")
    if c.word("hidden_act", "silu") not in ("silu", "swish"):
        c.bad("hidden_act", '"silu"')
    _check_quantization(c)
    hybrid = family in HYBRID
    layers = c.whole("num_hidden_layers", least=1)
    if layers > MAX_LAYERS:
        c.bad("num_hidden_layers", "at most %d" % MAX_LAYERS)
    heads = c.whole("num_attention_heads", least=1)
    hidden = c.whole("hidden_size", least=1)
    out = {
        "family": family,
        "vocab_size": c.whole("vocab_size", least=1),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": c.whole("max_position_embeddings", 32768, least=1),
        "intermediate_size": 0 if family == "qwen3_5_moe" else c.whole("intermediate_size", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(c, family, heads),
        "head_dim": _head_dim(c, family, hidden // heads),
    }
    out.update(_experts(c, family, warnings))
    out.update(_delta(c, hybrid))
    out.update({
        "num_mtp_layers": 0, "num_labels": 0,
        "attention_bias": c.flag("attention_bias"),
        "attn_output_gate": _gate(c) if hybrid else 0,
        "qk_norm": 1, "mlp_bias": 0, "router_bias": 0, "causal": 1, "tie_word_embeddings": 0,
        "pooling": "last", "classifier_input": "hidden", "problem_type": "none",
        "rms_norm_eps": _eps(c),
    })
    out.update(_rope(c, out, hybrid, warnings))
    out["layer_types"] = _layer_types(c, out, warnings)
    out["layer_experts"] = _layer_experts(c, out, family)
    _check(c, out)
    _warn_of_top(raw, c, where, warnings)
    return out


def _kv_heads(c, family, heads):
    if c.given("num_key_value_heads") and not c.has("num_key_value_heads"):
        return heads                     # null: one for every head
    return c.whole("num_key_value_heads", KV_HEADS[family], least=1)


def _head_dim(c, family, quotient):
    if family not in HEAD_DIM:
        return c.whole("head_dim", quotient, least=1)
    if c.given("head_dim") and not c.has("head_dim"):
        c.bad("head_dim", "a whole number, or no such key")
    return c.whole("head_dim", HEAD_DIM[family], least=1)


def _gate(c):
    if not c.flag("attn_output_gate", True):
        c.bad("attn_output_gate", "true: the attention of these families is always gated")
    return 1


def _eps(c):
    if isinstance(c.values.get("rms_norm_eps"), int):
        c.bad("rms_norm_eps", "a number with a fraction, such as 1e-06")
    return c.real("rms_norm_eps", 1e-6)


def _check_quantization(c):
    q = c.object("quantization_config")
    if not q.values:
        return
    if q.word("quant_method") != "fp8":
        q.bad("quant_method", '"fp8" (convert the checkpoint before quantisation instead)')
    if q.word("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        q.bad("fmt", '"e4m3"')
    fp8_block(c)


def fp8_block(c):
    """(rows, columns) that share one scale."""
    q = c.object("quantization_config")
    block = q.items("weight_block_size", int) or [128, 128]
    if len(block) != 2 or min(block) < 1:
        q.bad("weight_block_size", "two sizes")
    return tuple(block)


def _experts(c, family, warnings):
    moe = family in ("qwen3_next", "qwen3_5_moe", "qwen3_moe")
    local = family == "qwen3_moe" and c.has("num_local_experts")
    count = c.whole("num_local_experts" if local else "num_experts") if moe else 0
    _warn_beside(c, "num_experts" if local else "num_local_experts", count if moe else None,
                 warnings)
    shared = family in ("qwen3_next", "qwen3_5_moe")
    return {
        "num_experts": count,
        "num_experts_per_tok": c.whole("num_experts_per_tok", least=1) if count else 0,
        "moe_intermediate_size": c.whole("moe_intermediate_size", least=1) if count else 0,
        "shared_expert_intermediate_size":
            c.whole("shared_expert_intermediate_size", 512) if count and shared else 0,
        # Qwen3.5 always renormalises; transformers' default for qwen3_moe is not to.
        "norm_topk_prob": 1 if family == "qwen3_5_moe" or not moe
            else c.flag("norm_topk_prob", family != "qwen3_moe"),
    }


def _delta(c, hybrid):
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
             "linear_value_head_dim")
    out = {name: c.whole(name, least=1) if hybrid else 0 for name in names}
    out["linear_conv_kernel_dim"] = c.whole("linear_conv_kernel_dim", 4, least=1) if hybrid else 0
    return out


def _rope_set(c):
    """The set of rotary parameters that counts, and the one that it replaces (empty if none)."""
    old, new = c.object("rope_scaling"), c.object("rope_parameters")
    r, lost = (old, new) if old.values else (new, Json({}, c.where))
    for key in LAYER_TYPES:
        if key in r.values:
            r.bad(key, "one set of rotary parameters for all layers")
    return r, lost


def _check_lost(c, r, lost, used, warnings):
    """What rope_scaling takes away: an error where a default takes the place of rope_theta or
    partial_rotary_factor (used: what counts of these), else a warning."""
    for key in sorted(lost.values):
        value = lost.values[key]
        if value is None or key in ("rope_type", "type") \
                or value == used.get(key, dict.get(r.values, key)):
            continue
        if key in used and not r.given(key) and not c.given(key):
            lost.bad(key, "%s: rope_scaling replaces rope_parameters and does not have this key; "
                     "write it into rope_scaling" % used[key])
        warnings.append("%s: %s %s of rope_parameters is not used: rope_scaling replaces them"
                        % (c.where, key, shown(value)))


def _rope(c, sizes, hybrid, warnings):
    """Old configs: rope_theta and rope_scaling.  New: rope_parameters."""
    r, lost = _rope_set(c)
    type_key = "rope_type" if r.given("rope_type") else "type"
    kind = r.word(type_key) if r.given(type_key) else "default"
    if kind not in ("default", "linear", "yarn"):
        r.bad(type_key, '"default", "linear" or "yarn"')
    _warn_beside(r, "type", kind, warnings)
    theta = _theta(c, r, kind, warnings)
    partial = _partial(c, r, kind, hybrid, warnings)
    _check_lost(c, r, lost, {"rope_theta": theta, "partial_rotary_factor": partial}, warnings)
    rotary = int(sizes["head_dim"] * partial) if 0 < partial <= 1 else 0
    if rotary == 0 or rotary % 2:
        c.bad("partial_rotary_factor", "an even number of rotating dimensions, not %d of %d"
              % (rotary, sizes["head_dim"]))
    out = {
        "rotary_dim": rotary, "rope_type": kind, "rope_theta": theta, "rope_factor": 1.0,
        "rope_original_max_position": 0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0,
        "rope_attention_factor": 1.0,
    }
    if kind == "linear":
        out["rope_factor"] = _factor(r, r.real("factor"))
    if kind == "yarn":
        out.update(_yarn(c, r, sizes, warnings))
    return out


def _warn_beside(c, key, used, warnings):
    """A key of c that stands beside the one that counts, with another value."""
    value = dict.get(c.values, key)
    if None not in (value, used) and value != used:
        warnings.append("%s: %s %s is not used: %s counts" % (c.where, key, shown(value),
                                                              shown(used)))


def _theta(c, r, kind, warnings):
    place = r if r.given("rope_theta") else c
    if not place.given("rope_theta"):
        warnings.append("%s: no rope_theta, using 10000" % c.where)
        return 10000.0
    theta = place.real("rope_theta")
    if not (theta > 1 or theta == 1 and kind != "yarn"):
        place.bad("rope_theta", "a number above 1")
    if place is r:
        _warn_beside(c, "rope_theta", theta, warnings)
    return theta


def _partial(c, r, kind, hybrid, warnings):
    """The part of a head that rotates."""
    key = "partial_rotary_factor"
    if r.given(key):
        partial = r.real(key)
        _warn_beside(c, key, partial, warnings)
    else:
        partial = c.real(key, 1.0) if c.given(key) else 0.25 if hybrid else 1.0
    if hybrid or partial == 1:
        return partial
    if kind != "default" or key in c.values.overrides:
        (r if r.given(key) else c).bad(key, "1: this family rotates whole heads")
    warnings.append("%s: %s %s is not used: this family rotates whole heads"
                    % (c.where, key, partial))
    return 1.0


def _factor(r, factor):
    if not 1 <= factor <= 1e6:
        r.bad("factor", "a number of at least 1 and at most 1e6")
    return factor


def _yarn(c, r, sizes, warnings):
    if r.given("truncate") and not r.flag("truncate"):
        r.bad("truncate", "true")
    original = _yarn_original(c, r, sizes["max_position_embeddings"], warnings)
    factor = r.real("factor") if not r.given("factor") or r.has("factor") \
        else sizes["max_position_embeddings"] / float(original)
    _factor(r, factor)
    attention = r.real("attention_factor", 0.0)
    if r.has("attention_factor") and attention <= 0:
        r.bad("attention_factor", "a number above 0")
    mscale, all_dim = r.real("mscale", 0.0), r.real("mscale_all_dim", 0.0)
    if not attention and mscale and all_dim and factor > 1:
        scale = 0.1 * math.log(factor)
        if not (mscale * scale + 1 > 0 and all_dim * scale + 1 > 0):
            r.bad("mscale", "a number above 0")
        attention = (mscale * scale + 1) / (all_dim * scale + 1)
    fast, slow = r.real("beta_fast", 0.0) or 32.0, r.real("beta_slow", 0.0) or 1.0
    if not 0 < slow <= fast:
        r.bad("beta_fast", "at least beta_slow, %s, and both above 0" % slow)
    # The published way to switch YaRN on leaves max_position_embeddings as it was.
    sizes["max_position_embeddings"] = max(sizes["max_position_embeddings"], int(original * factor))
    return {"rope_factor": factor, "rope_original_max_position": original,
            "rope_attention_factor": attention, "rope_beta_fast": fast, "rope_beta_slow": slow}


def _yarn_original(c, r, default, warnings):
    key = "original_max_position_embeddings"
    place = c if c.given(key) else r
    if not place.given(key):
        return default
    value = place.values.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        place.bad(key, "a whole number of at least 1")
    if place is c:
        _warn_beside(r, key, value, warnings)
    return value


def _window(c, family):
    """Tokens that a sliding layer sees, None if nothing slides."""
    if family not in ("qwen3", "qwen3_moe") or not c.flag("use_sliding_window"):
        return None
    if c.given("sliding_window") and not c.has("sliding_window"):
        return None
    return c.whole("sliding_window", 4096)


def _layer_types(c, sizes, warnings):
    """0 attention, 1 DeltaNet.  After _rope, which may lengthen the context."""
    family, layers = sizes["family"], sizes["num_hidden_layers"]
    names, window = c.items("layer_types", str), _window(c, family)
    slides = window is not None
    if family == "qwen3":
        slides = "sliding_attention" in names if names \
            else slides and c.whole("max_window_layers", 28) < layers
    if slides and (window is None or window < sizes["max_position_embeddings"]):
        raise ConvertError("%s: found sliding-window attention in use, of %s tokens, expected full "
                           "attention or a window of the whole context, %d tokens"
                           % (c.where, window, sizes["max_position_embeddings"]))
    if not names and family not in HYBRID:
        return [0] * layers
    if not names:
        return _pattern(c.whole("full_attention_interval", 4, least=1), layers)
    known = {"full_attention": 0}
    if family in HYBRID:
        known.update(attention=0, linear_attention=1)
    elif slides:
        known["sliding_attention"] = 0
    if len(names) != layers or any(name not in known for name in names):
        c.bad("layer_types", "%d of %s" % (layers, " or ".join(known)))
    kinds, every = [known[name] for name in names], dict.get(c.values, "full_attention_interval")
    if family in HYBRID and type(every) is int and every > 0 and _pattern(every, layers) != kinds:
        warnings.append("%s: full_attention_interval %d is not used: layer_types counts"
                        % (c.where, every))
    return kinds


def _pattern(every, layers):
    return [int((l + 1) % every != 0) for l in range(layers)]


def _layer_experts(c, sizes, family):
    layers = sizes["num_hidden_layers"]
    if not sizes["num_experts"]:
        return [0] * layers
    if family == "qwen3_5_moe":
        return [1] * layers
    dense, step = set(c.items("mlp_only_layers", int)), c.whole("decoder_sparse_step", 1, least=1)
    return [int(l not in dense and (l + 1) % step == 0) for l in range(layers)]


def _check(c, out):
    for many, few in (("num_attention_heads", "num_key_value_heads"),
                      ("linear_num_value_heads", "linear_num_key_heads")):
        if out[few] and out[many] % out[few]:
            c.bad(many, "a multiple of %s, %d" % (few, out[few]))
    if out["num_experts_per_tok"] > out["num_experts"]:
        c.bad("num_experts_per_tok", "at most num_experts, %d" % out["num_experts"])
    if 0 in out["layer_experts"] and not out["intermediate_size"]:
        c.bad("intermediate_size", "the width of the dense layers")
