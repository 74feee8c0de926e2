"""config.json of the families that Hugging Face transformers publishes, as fields of q3n_config."""
import math

from q3n_file import ConvertError

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3")
HYBRID = ("qwen3_next", "qwen3_5", "qwen3_5_moe")


class Json:
    """A JSON object with typed access; errors name the file and the key."""

    def __init__(self, values, where):
        self.values, self.where = values, where

    def bad(self, key, expected):
        raise ConvertError("%s: %s: found %s, expected %s"
                           % (self.where, key, repr(self.values.get(key))[:80], expected))

    def has(self, key):
        return self.values.get(key) is not None

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
                or not math.isfinite(value):
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


def text_part(raw, where):
    """The language model's part of a config: text_config over the top level, which keeps its say on
    tying and quantisation."""
    inner = Json(raw, where).object("text_config").values
    merged = {k: v for k, v in raw.items() if k != "text_config"}
    merged.update({k: v for k, v in inner.items() if v is not None})
    for key in ("architectures", "quantization_config", "tie_word_embeddings"):
        if raw.get(key) is not None:
            merged[key] = raw[key]
    return Json(merged, where)


def read(raw, where, warnings):
    """The configuration, all but what only the tensors tell: MTP, labels, tying."""
    c = text_part(raw, where)
    family = c.word("model_type")
    family = family[:-5] if family.endswith("_text") else family
    if family not in FAMILIES:
        c.bad("model_type", "one of %s" % ", ".join(FAMILIES))
    if c.word("hidden_act", "silu") not in ("silu", "swish"):
        c.bad("hidden_act", '"silu"')
    _check_quantization(c)
    hybrid = family in HYBRID
    layers = c.whole("num_hidden_layers", least=1)
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
        "num_key_value_heads": c.whole("num_key_value_heads", heads, least=1),
        "head_dim": c.whole("head_dim", hidden // heads, least=1),
    }
    out.update(_experts(c, family))
    out.update(_delta(c, hybrid))
    out.update({
        "num_mtp_layers": 0, "num_labels": 0,
        "attention_bias": c.flag("attention_bias"),
        "attn_output_gate": c.flag("attn_output_gate", True) if hybrid else 0,
        "qk_norm": 1, "mlp_bias": 0, "router_bias": 0, "causal": 1, "tie_word_embeddings": 0,
        "pooling": "last", "classifier_input": "hidden",
        "rms_norm_eps": c.real("rms_norm_eps", 1e-6),
    })
    out.update(_rope(c, out, hybrid, warnings))
    out["layer_types"] = _layer_types(c, family, layers)
    out["layer_experts"] = _layer_experts(c, out, family)
    _check(c, out)
    return out


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


def _experts(c, family):
    moe = family in ("qwen3_next", "qwen3_5_moe", "qwen3_moe")
    count = c.whole("num_experts" if c.has("num_experts") else "num_local_experts", 0) if moe else 0
    shared = family in ("qwen3_next", "qwen3_5_moe")
    return {
        "num_experts": count,
        "num_experts_per_tok": c.whole("num_experts_per_tok", least=1) if count else 0,
        "moe_intermediate_size": c.whole("moe_intermediate_size", least=1) if count else 0,
        "shared_expert_intermediate_size":
            c.whole("shared_expert_intermediate_size", 512) if count and shared else 0,
        # Qwen3.5 always renormalises; transformers' default for qwen3_moe is not to.
        "norm_topk_prob": 1 if family == "qwen3_5_moe"
            else c.flag("norm_topk_prob", family != "qwen3_moe"),
    }


def _delta(c, hybrid):
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
             "linear_value_head_dim")
    out = {name: c.whole(name, least=1) if hybrid else 0 for name in names}
    out["linear_conv_kernel_dim"] = c.whole("linear_conv_kernel_dim", 4, least=1) if hybrid else 0
    return out


def _rope(c, sizes, hybrid, warnings):
    """Old configs: rope_theta and rope_scaling.  New: rope_parameters, or one by layer type."""
    r = c.object("rope_parameters")
    if isinstance(r.values.get("full_attention"), dict):
        r = r.object("full_attention")
    if not r.values:
        r = c.object("rope_scaling")
    kind = r.word("rope_type" if r.has("rope_type") else "type", "default")
    if kind not in ("default", "linear", "yarn"):
        r.bad("rope_type" if r.has("rope_type") else "type", '"default", "linear" or "yarn"')
    if r.has("rope_theta"):
        theta = r.real("rope_theta")
    else:
        if not c.has("rope_theta"):
            warnings.append("%s: no rope_theta, using 10000" % c.where)
        theta = c.real("rope_theta", 10000.0)
    partial = (r if r.has("partial_rotary_factor") else c).real(
        "partial_rotary_factor", 0.25 if hybrid else 1.0)
    rotary = int(sizes["head_dim"] * partial)
    if not 0 < rotary <= sizes["head_dim"] or rotary % 2:
        c.bad("partial_rotary_factor", "an even number of rotating dimensions, not %d of %d"
              % (rotary, sizes["head_dim"]))
    out = {
        "rotary_dim": rotary, "rope_type": kind, "rope_theta": theta, "rope_factor": 1.0,
        "rope_original_max_position": 0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0,
        "rope_attention_factor": 1.0,
    }
    if kind != "default":
        out["rope_factor"] = r.real("factor")
        if out["rope_factor"] < 1:
            r.bad("factor", "a number of at least 1")
    if kind == "yarn":
        out.update(_yarn(r, sizes, out["rope_factor"]))
    return out


def _yarn(r, sizes, factor):
    if not r.flag("truncate", True):
        r.bad("truncate", "true")
    original = r.whole("original_max_position_embeddings", sizes["max_position_embeddings"], 1)
    attention = r.real("attention_factor", 0.0)
    mscale, all_dim = r.real("mscale", 0.0), r.real("mscale_all_dim", 0.0)
    if not attention and mscale and all_dim and factor > 1:
        attention = (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    # The published way to switch YaRN on leaves max_position_embeddings as it was.
    sizes["max_position_embeddings"] = max(sizes["max_position_embeddings"], int(original * factor))
    return {"rope_original_max_position": original, "rope_attention_factor": attention,
            "rope_beta_fast": r.real("beta_fast", 32.0), "rope_beta_slow": r.real("beta_slow", 1.0)}


def _layer_types(c, family, layers):
    """0 attention, 1 DeltaNet."""
    names = c.items("layer_types", str)
    window = c.flag("use_sliding_window") and c.has("sliding_window")
    if family == "qwen3":
        window = window and not names and c.whole("max_window_layers", 28) < layers
    elif family != "qwen3_moe":
        window = False
    if window or "sliding_attention" in names:
        raise ConvertError("%s: found sliding-window attention in use, expected full attention"
                           % c.where)
    if not names:
        every = c.whole("full_attention_interval", 4, least=1)
        return [int(family in HYBRID and (l + 1) % every != 0) for l in range(layers)]
    known = {"full_attention": 0, "linear_attention": 1} if family in HYBRID \
        else {"full_attention": 0}
    if len(names) != layers or any(name not in known for name in names):
        c.bad("layer_types", "%d of %s" % (layers, " or ".join(known)))
    return [known[name] for name in names]


def _layer_experts(c, sizes, family):
    layers = sizes["num_hidden_layers"]
    if not sizes["num_experts"]:
        return [0] * layers
    if family == "qwen3_5_moe":
        return [1] * layers
    dense, step = c.items("mlp_only_layers", int), c.whole("decoder_sparse_step", 1, least=1)
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
