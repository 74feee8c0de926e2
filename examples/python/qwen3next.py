"""qwen3next.h from Python: ctypes over the shared library that `make` builds, no other module.

    import qwen3next
    with qwen3next.Model("build/models/stories.q3n") as model:
        with model.session(capacity=1024) as session:
            for piece in session.generate("Once upon a time", 100, temperature=0.8):
                print(piece, end="", flush=True)

Run as a program it does just that:

    python3 examples/python/qwen3next.py build/models/stories.q3n "Once upon a time"

The library is looked for at $QWEN3NEXT_LIB, beside this file, in build/ of this checkout, and where
the system keeps its libraries; load(path) names it.  Logits are array('f'), which numpy.asarray
takes without a copy.
"""
import array
import ctypes
import ctypes.util
import os
import pathlib
import sys
import weakref

NO_SPECIAL = 1                  # flag of tokenize: special tokens in the text are plain text
_OK, _ERR_FULL = 0, -7

_P = ctypes.c_void_p
_C_INT, _C_SIZE, _C_FLOAT = ctypes.c_int, ctypes.c_size_t, ctypes.c_float
_IDS = ctypes.POINTER(ctypes.c_int32)
_FLOATS = ctypes.POINTER(_C_FLOAT)


class _Record(ctypes.Structure):
    """q3n_error"""
    _fields_ = [("code", _C_INT), ("offset", ctypes.c_int64), ("message", ctypes.c_char * 500)]


class _Allocator(ctypes.Structure):
    _fields_ = [("alloc", _P), ("free", _P), ("user", _P)]


class _Logger(ctypes.Structure):
    _fields_ = [("log", _P), ("user", _P)]


class _ModelOptions(ctypes.Structure):
    _fields_ = [("allocator", _Allocator), ("logger", _Logger), ("skip_checksum", _C_INT)]


class _Executor(ctypes.Structure):
    _fields_ = [("run", _P), ("user", _P), ("n_threads", _C_INT)]


class _LayerHook(ctypes.Structure):
    _fields_ = [("layer", _P), ("user", _P)]


class _SessionOptions(ctypes.Structure):
    _fields_ = [("capacity", _C_INT), ("batch", _C_INT), ("n_threads", _C_INT),
                ("max_isa", _C_INT), ("scalar_only", _C_INT), ("kv_type", _C_INT),
                ("executor", _Executor), ("count_experts", _C_INT), ("layer_hook", _LayerHook)]


class _SessionMemory(ctypes.Structure):
    _fields_ = [(name, _C_SIZE) for name in
                ("kv_cache", "delta_state", "conv_state", "scratch", "other", "total")]


class _Outputs(ctypes.Structure):
    _fields_ = [(name, _FLOATS) for name in ("logits", "all_logits", "hidden", "all_hidden")]


class _Decoder(ctypes.Structure):
    _fields_ = [("pending", ctypes.c_ubyte * 4), ("n_pending", _C_INT), ("skip_special", _C_INT)]


class _SamplerOptions(ctypes.Structure):
    _fields_ = [("temperature", _C_FLOAT), ("top_k", _C_INT), ("top_p", _C_FLOAT),
                ("min_p", _C_FLOAT), ("repetition_penalty", _C_FLOAT), ("penalty_window", _C_INT),
                ("seed", ctypes.c_uint64)]


class _Config(ctypes.Structure):
    """q3n_config: the fields of Q3N_CONFIG_LIST in the struct's order"""
    _fields_ = [(name, _C_INT) for name in (
        "family vocab_size hidden_size num_hidden_layers max_position_embeddings "
        "intermediate_size num_attention_heads num_key_value_heads head_dim rotary_dim num_experts "
        "num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size "
        "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim "
        "linear_conv_kernel_dim num_mtp_layers num_labels norm_topk_prob attention_bias "
        "attn_output_gate qk_norm mlp_bias router_bias causal tie_word_embeddings pooling "
        "classifier_input rope_type rope_original_max_position").split()] + [
        (name, ctypes.c_double) for name in (
            "rms_norm_eps rope_theta rope_factor rope_beta_fast rope_beta_slow "
            "rope_attention_factor").split()] + [
        ("layer_types", ctypes.c_ubyte * 256), ("layer_experts", ctypes.c_ubyte * 256)]


# C name of every struct above, for the test that compares sizes and offsets with the header.
STRUCTS = {"q3n_error": _Record, "q3n_allocator": _Allocator, "q3n_logger": _Logger,
           "q3n_model_options": _ModelOptions, "q3n_executor": _Executor,
           "q3n_layer_hook": _LayerHook, "q3n_session_options": _SessionOptions,
           "q3n_session_memory": _SessionMemory, "q3n_outputs": _Outputs, "q3n_decoder": _Decoder,
           "q3n_sampler_options": _SamplerOptions, "q3n_config": _Config}

_R = ctypes.POINTER
_FUNCTIONS = {                  # name: (result, arguments...)
    "q3n_version": (_C_INT,),
    "q3n_result_string": (ctypes.c_char_p, _C_INT),
    "q3n_type_from_name": (_C_INT, ctypes.c_char_p, _R(_C_INT)),
    "q3n_isa_from_name": (_C_INT, ctypes.c_char_p, _R(_C_INT)),
    "q3n_model_open": (_C_INT, _R(_P), ctypes.c_char_p, _R(_ModelOptions), _R(_Record)),
    "q3n_model_close": (None, _P),
    "q3n_model_config": (_R(_Config), _P),
    "q3n_model_name": (ctypes.c_char_p, _P),
    "q3n_model_eos_ids": (_IDS, _P, _R(_C_INT)),
    "q3n_model_is_eos": (_C_INT, _P, ctypes.c_int32),
    "q3n_session_bytes": (_C_SIZE, _P, _R(_SessionOptions), _R(_SessionMemory)),
    "q3n_session_create": (_C_INT, _R(_P), _P, _R(_SessionOptions), _R(_Record)),
    "q3n_session_destroy": (None, _P),
    "q3n_session_eval": (_C_INT, _P, _IDS, _C_INT, _FLOATS),
    "q3n_session_eval_outputs": (_C_INT, _P, _IDS, _C_INT, _R(_Outputs)),
    "q3n_session_classify": (_C_INT, _P, _IDS, _C_INT, _FLOATS),
    "q3n_session_length": (_C_INT, _P),
    "q3n_session_capacity": (_C_INT, _P),
    "q3n_session_reset": (None, _P),
    "q3n_session_error": (_R(_Record), _P),
    "q3n_session_expert_counts": (_R(ctypes.c_int64), _P, _C_INT),
    "q3n_tokenize": (_C_INT, _P, ctypes.c_char_p, _C_SIZE, _C_INT, _IDS, _C_SIZE, _R(_C_SIZE)),
    "q3n_detokenize": (_C_INT, _P, _IDS, _C_SIZE, ctypes.c_char_p, _C_SIZE, _R(_C_SIZE)),
    "q3n_decoder_next": (_C_INT, _R(_Decoder), _P, ctypes.c_int32, ctypes.c_char_p, _C_SIZE,
                         _R(_C_SIZE)),
    "q3n_decoder_finish": (None, _R(_Decoder), ctypes.c_char_p, _R(_C_SIZE)),
    "q3n_sampler_create": (_C_INT, _R(_P), _P, _R(_SamplerOptions), _R(_Record)),
    "q3n_sampler_destroy": (None, _P),
    "q3n_sampler_sample": (ctypes.c_int32, _P, _FLOATS),
    "q3n_sampler_accept": (None, _P, ctypes.c_int32),
}

_lib = None


class Error(Exception):
    """A failure the library reports: its message, and its q3n_result as code."""

    def __init__(self, code, message, offset=-1):
        super().__init__(message)
        self.code, self.offset = code, offset


def load(path=None):
    """Load the shared library; the first call decides which.  Returns it as a ctypes library."""
    global _lib
    if _lib is None:
        here = pathlib.Path(__file__).resolve().parent
        places = [os.environ.get("QWEN3NEXT_LIB"), here / "libqwen3next.so",
                  here.parent.parent / "build" / "libqwen3next.so"]
        found = path or next((str(p) for p in places if p and os.path.exists(p)), None)
        found = found or ctypes.util.find_library("qwen3next")
        if not found:
            raise OSError("libqwen3next.so not found: run make, or set QWEN3NEXT_LIB")
        lib = ctypes.CDLL(found)
        for name, signature in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = signature[0], signature[1:]
        _lib = lib
    return _lib


def _check(code, record=None):
    if code != _OK:
        text = record.message if record is not None else b""
        text = text or load().q3n_result_string(code)
        raise Error(code, text.decode("utf-8", "replace"), record.offset if record else -1)


def _id_array(ids):
    ids = [int(i) for i in ids]
    return (ctypes.c_int32 * max(len(ids), 1))(*ids), len(ids)


def _floats(n):
    """array('f') of n elements, and the same memory for a C function."""
    a = array.array("f", bytes(4 * n))
    return a, (_C_FLOAT * n).from_buffer(a) if n else None


def _named(function, name):
    value = _C_INT()
    if name is not None and function(name.encode(), ctypes.byref(value)) != _OK:
        raise ValueError("unknown name %r" % name)
    return value.value


class _Owner:
    """Holds a C object; with-statement and close() give it back."""

    def __init__(self, handle, destroy):
        self._handle, self._destroy = handle, destroy

    @property
    def handle(self):
        if not self._handle:
            raise ValueError("%s is closed" % type(self).__name__)
        return self._handle

    def close(self):
        handle, self._handle = self._handle, None
        if handle:
            self._destroy(handle)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()

    def __del__(self):
        if getattr(self, "_handle", None):
            self.close()


class Model(_Owner):
    """An open model file.  Closing it closes its sessions and samplers first."""

    def __init__(self, path, skip_checksum=False):
        lib = load()
        handle, record = _P(), _Record()
        options = _ModelOptions(skip_checksum=int(skip_checksum))
        self._handle = None
        _check(lib.q3n_model_open(ctypes.byref(handle), os.fsencode(path), ctypes.byref(options),
                                  ctypes.byref(record)), record)
        super().__init__(handle.value, lib.q3n_model_close)
        self._users = weakref.WeakSet()
        fields = lib.q3n_model_config(self.handle).contents
        self.config = {name: getattr(fields, name) for name, _ in _Config._fields_}
        for name in ("layer_types", "layer_experts"):
            self.config[name] = list(self.config[name])[:fields.num_hidden_layers]
        self.vocab_size = fields.vocab_size
        self.name = lib.q3n_model_name(self.handle).decode("utf-8", "replace")
        n = _C_INT()
        ids = lib.q3n_model_eos_ids(self.handle, ctypes.byref(n))
        self.eos_ids = [ids[i] for i in range(n.value)]

    def close(self):
        for user in list(getattr(self, "_users", ())):
            user.close()
        super().close()

    def session(self, **options):
        return Session(self, **options)

    def sampler(self, **options):
        return Sampler(self, **options)

    def tokenize(self, text, special=True):
        """Ids of a str or bytes; special=False: special tokens in it are plain text."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        ids, n = (ctypes.c_int32 * (len(data) + 1))(), _C_SIZE()
        _check(load().q3n_tokenize(self.handle, data, len(data), 0 if special else NO_SPECIAL,
                                   ids, len(data) + 1, ctypes.byref(n)))
        return ids[:n.value]

    def detokenize(self, ids):
        lib, n = load(), _C_SIZE()
        c_ids, n_ids = _id_array(ids)
        code = lib.q3n_detokenize(self.handle, c_ids, n_ids, None, 0, ctypes.byref(n))
        if code not in (_OK, _ERR_FULL):
            _check(code)
        text = ctypes.create_string_buffer(n.value + 1)
        _check(lib.q3n_detokenize(self.handle, c_ids, n_ids, text, n.value, ctypes.byref(n)))
        return text.raw[:n.value].decode("utf-8", "replace")


class Sampler(_Owner):
    """Chooses tokens: temperature (0 = greedy), top_k, top_p, min_p, repetition_penalty, ..."""

    def __init__(self, model, **options):
        lib = load()
        handle, record = _P(), _Record()
        self._handle, self._model = None, model
        _check(lib.q3n_sampler_create(ctypes.byref(handle), model.handle,
                                      ctypes.byref(_SamplerOptions(**options)),
                                      ctypes.byref(record)), record)
        super().__init__(handle.value, lib.q3n_sampler_destroy)
        model._users.add(self)

    def sample(self, logits):
        if len(logits) != self._model.vocab_size:
            raise ValueError("%d logits, expected %d" % (len(logits), self._model.vocab_size))
        c_logits = (_C_FLOAT * len(logits)).from_buffer(logits)
        return load().q3n_sampler_sample(self.handle, c_logits)

    def accept(self, token):
        load().q3n_sampler_accept(self.handle, token)


class Session(_Owner):
    """The state of one text.  Options: capacity, batch, n_threads (0 = the library's default),
    isa and kv_type by name, count_experts."""

    def __init__(self, model, isa=None, kv_type=None, count_experts=False, **options):
        lib = load()
        self._handle, self.model = None, model
        handle, record = _P(), _Record()
        o = _SessionOptions(count_experts=int(count_experts), **options)
        o.kv_type = _named(lib.q3n_type_from_name, kv_type)
        o.max_isa = _named(lib.q3n_isa_from_name, isa)
        o.scalar_only = int(isa == "scalar")
        memory = _SessionMemory()
        lib.q3n_session_bytes(model.handle, ctypes.byref(o), ctypes.byref(memory))
        self.memory = {name: getattr(memory, name) for name, _ in _SessionMemory._fields_}
        _check(lib.q3n_session_create(ctypes.byref(handle), model.handle, ctypes.byref(o),
                                      ctypes.byref(record)), record)
        super().__init__(handle.value, lib.q3n_session_destroy)
        model._users.add(self)

    def __len__(self):
        return load().q3n_session_length(self.handle)

    @property
    def capacity(self):
        return load().q3n_session_capacity(self.handle)

    def reset(self):
        load().q3n_session_reset(self.handle)

    def _check(self, code):
        if code != _OK:
            _check(code, load().q3n_session_error(self.handle).contents)

    def logits(self, ids):
        """Append tokens; the logits [vocab_size] that follow the last of them."""
        c_ids, n = _id_array(ids)
        logits, c_logits = _floats(self.model.vocab_size)
        self._check(load().q3n_session_eval(self.handle, c_ids, n, c_logits))
        return logits

    def all_logits(self, ids):
        """Append tokens; the logits that follow each of them, a list of array('f')."""
        c_ids, n = _id_array(ids)
        vocab = self.model.vocab_size
        flat, c_flat = _floats(n * vocab)
        outputs = _Outputs(all_logits=ctypes.cast(c_flat, _FLOATS))
        self._check(load().q3n_session_eval_outputs(self.handle, c_ids, n, ctypes.byref(outputs)))
        return [flat[i * vocab:(i + 1) * vocab] for i in range(n)]

    def classify(self, ids):
        """Scores [num_labels] of a whole text; the session is reset first."""
        c_ids, n = _id_array(ids)
        scores, c_scores = _floats(self.model.config["num_labels"])
        self._check(load().q3n_session_classify(self.handle, c_ids, n, c_scores))
        return scores

    def expert_counts(self, layer):
        """How often each expert of a layer was chosen; None without experts or count_experts."""
        counts = load().q3n_session_expert_counts(self.handle, layer)
        return counts[:self.model.config["num_experts"]] if counts else None

    def generate_ids(self, prompt, max_tokens, stop_at_eos=True, **sampling):
        """Yield up to max_tokens ids that continue prompt, ids behind what was evaluated before.
        The last one yielded is not evaluated."""
        with self.model.sampler(**sampling) as sampler:
            for token in prompt:
                sampler.accept(token)
            pending = prompt
            for _ in range(max_tokens):
                token = sampler.sample(self.logits(pending))
                if stop_at_eos and token in self.model.eos_ids:
                    return
                yield token
                pending = [token]

    def generate(self, prompt, max_tokens, **sampling):
        """Yield pieces of text, whole characters each, that continue the text or ids prompt."""
        lib, n = load(), _C_SIZE()
        ids = self.model.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        decoder, text = _Decoder(skip_special=1), ctypes.create_string_buffer(1 << 12)
        for token in self.generate_ids(ids, max_tokens, **sampling):
            _check(lib.q3n_decoder_next(ctypes.byref(decoder), self.model.handle, token, text,
                                        len(text), ctypes.byref(n)))
            if n.value:
                yield text.raw[:n.value].decode("utf-8")
        lib.q3n_decoder_finish(ctypes.byref(decoder), text, ctypes.byref(n))
        if n.value:
            yield text.raw[:n.value].decode("utf-8")


def _main(argv):
    if len(argv) != 3:
        print("usage: qwen3next.py MODEL.q3n PROMPT", file=sys.stderr)
        return 2
    try:
        with Model(argv[1]) as model, model.session(capacity=1024) as session:
            for piece in session.generate(argv[2], 200, temperature=0.8, top_p=0.95, seed=1):
                print(piece, end="", flush=True)
            print()
    except (Error, OSError) as e:
        print("qwen3next.py: %s" % e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv))
