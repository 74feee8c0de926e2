"""qwen3next.h from Python: ctypes over the shared library, no other module.

    import qwen3next
    with qwen3next.Model("build/models/stories.q3n") as model:
        with model.session(capacity=1024) as session:
            for piece in session.generate("Once upon a time", 100, temperature=0.8):
                print(piece, end="", flush=True)

Run as a program it does just that:

    python3 -m qwen3next build/models/stories.q3n "Once upon a time"

A session chooses tokens with a sampler of its own, which a hook may mask or steer:

    def no_digits(logits, tokens):        # [vocab_size], writable; what follows session.tokens()
        for i in digits:
            logits[i] = float("-inf")
    session.set_sampler(temperature=0.8, top_p=0.95, seed=1, logits_hook=no_digits)

A session goes back, is copied, saved and continued:

    session.prefill(ids)                  # evaluates what is not known yet, returns how many were
    start = session.snapshot()
    other = session.fork()
    session.rewind(len(session) - 1)
    session.restore(start)
    session.save("chat.q3s")

`pip install ./examples/python` compiles the library and puts it into the package.  The library is
looked for at $QWEN3NEXT_LIB, in the package, in build/ of this checkout, and where the system keeps
its libraries; load(path) names it.  Logits are array('f'), which numpy.asarray takes without a
copy.  Ids and numbers must be what they stand for: nothing is rounded or cut off to fit, and an
option that does not exist is a TypeError.

Ctrl-C (or any signal whose handler raises) stops an evaluation that the main thread waits for: the
session is as before the call.
"""
from __future__ import annotations

import array
import ctypes
import ctypes.util
import math
import numbers
import operator
import os
import pathlib
import signal
import threading
import time
import weakref
from types import TracebackType
from typing import (TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, Optional,
                    Sequence, SupportsIndex, Tuple, Type, TypeVar, Union)

ABI = 1                         # q3n_abi_version of the library: it must agree
NO_SPECIAL, PREFIX, SUFFIX = 1, 2, 4    # flags of q3n_tokenize
PROBLEM_TYPES = ("none", "regression", "single_label_classification",
                 "multi_label_classification")  # q3n_problem_type in order
MAX_DRAFT = 8                   # most tokens that are drafted in a step
SPECULATE = ("off", "auto", "mtp", "lookup")    # q3n_speculate in order
POOLING = ("last", "first", "mean")             # q3n_pooling in order
_REAL_FIELDS = ("rms_norm_eps", "rope_theta", "rope_factor", "rope_beta_fast", "rope_beta_slow",
                "rope_attention_factor")        # of q3n_config; the others are whole numbers
_OK, _ERR_FULL = 0, -7

# ---- Types of arguments and results ----

if TYPE_CHECKING:
    Floats = array.array[float]                  # array('f')
    Path = Union[str, bytes, os.PathLike[str], os.PathLike[bytes]]
else:                                            # older Pythons cannot subscribe these
    Floats = array.array
    Path = Union[str, bytes, os.PathLike]
Ids = Iterable[SupportsIndex]
Text = Union[str, bytes, bytearray]
# Numbers, or memory of float32 in one dimension: array('f'), numpy.ndarray, memoryview, ...
Logits = Union[Sequence[float], Any]
LogitsHook = Callable[[memoryview, List[int]], object]      # writable logits, tokens

_P = ctypes.c_void_p
_C_INT, _C_SIZE, _C_FLOAT = ctypes.c_int, ctypes.c_size_t, ctypes.c_float
_C_INTEGERS = (_C_INT, ctypes.c_int32, ctypes.c_int64, _C_SIZE, ctypes.c_uint64)


def _integer(value, c_type, name="an argument", least=None, most=None):
    """value as a Python int that c_type can hold, within least .. most if they are given."""
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError("%s: %r is no whole number" % (name, value)) from None
    bits, signed = 8 * ctypes.sizeof(c_type), c_type(-1).value < 0
    low = -(1 << bits - 1) if signed else 0
    high = (1 << bits - signed) - 1
    low, high = low if least is None else least, high if most is None else most
    if not low <= value <= high:
        raise ValueError("%s: %d is not between %d and %d" % (name, value, low, high))
    return value


def _checked(function, name, arguments):
    """function, called with integers that its arguments can hold: ctypes cuts off high bits."""
    integers = [(i, a) for i, a in enumerate(arguments) if a in _C_INTEGERS]

    def call(*values):
        values = list(values)
        for i, c_type in integers:
            values[i] = _integer(values[i], c_type, "argument %d of %s" % (i, name))
        return function(*values)
    return call


def _float_array(values, name):
    """Numbers as array('f'): none becomes infinite that was not."""
    values = list(values)
    try:
        out = array.array("f", values)
        lost = [v for x, v in zip(out, values) if math.isinf(x) and not math.isinf(v)]
    except OverflowError:                # an int that not even a double can hold
        raise ValueError("%s: more than a float32 can hold" % name) from None
    if lost:
        raise ValueError("%s: %r is more than a float32 can hold" % (name, lost[0]))
    return out


def _struct(struct, **values):
    """A struct with these fields: every one must be there and hold its value."""
    types = dict(struct._fields_)
    for name, value in values.items():
        if name not in types:
            raise TypeError("there is no option %r" % name)
        if types[name] in _C_INTEGERS:
            values[name] = _integer(value, types[name], name)
        elif types[name] is _C_FLOAT:
            if not isinstance(value, numbers.Real):
                raise TypeError("%s: %r is no number" % (name, value))
            values[name] = _float_array([value], name)[0]
    return struct(**values)


class _Sized(ctypes.Structure):
    """A struct that begins with its size, which is set when it is made."""

    def __init__(self, **values: Any) -> None:
        super().__init__(size=ctypes.sizeof(self), **values)


_IDS = ctypes.POINTER(ctypes.c_int32)
_FLOATS = ctypes.POINTER(_C_FLOAT)
_DOUBLES = ctypes.POINTER(ctypes.c_double)


class _Record(ctypes.Structure):
    """q3n_error"""
    _fields_ = [("code", _C_INT), ("offset", ctypes.c_int64), ("message", ctypes.c_char * 500)]


class _Allocator(ctypes.Structure):
    _fields_ = [("alloc", _P), ("free", _P), ("user", _P)]


class _Logger(ctypes.Structure):
    _fields_ = [("log", _P), ("user", _P)]


class _ModelOptions(_Sized):
    _fields_ = [("size", _C_SIZE), ("allocator", _Allocator), ("logger", _Logger),
                ("skip_checksum", _C_INT), ("zero", _C_INT)]


class _Executor(ctypes.Structure):
    _fields_ = [("run", _P), ("user", _P), ("n_threads", _C_INT)]


class _LayerHook(ctypes.Structure):
    _fields_ = [("layer", _P), ("user", _P)]


class _EngineOptions(_Sized):
    _fields_ = [("size", _C_SIZE), ("n_threads", _C_INT), ("batch_size", _C_INT),
                ("isa", _C_INT), ("zero", _C_INT), ("executor", _Executor),
                ("layer_hook", _LayerHook)]


class _SessionOptions(_Sized):
    _fields_ = [("size", _C_SIZE), ("capacity", _C_INT), ("kv_type", _C_INT), ("engine", _P),
                ("engine_options", ctypes.POINTER(_EngineOptions)), ("cache", _P),
                ("snapshot_bytes", _C_SIZE), ("snapshot_every", _C_INT),
                ("snapshot_type", _C_INT), ("speculate", _C_INT), ("draft", _C_INT),
                ("count_experts", _C_INT), ("zero", _C_INT)]


class _SessionMemory(_Sized):
    _fields_ = [(name, _C_SIZE) for name in
                ("size", "kv_cache", "delta_state", "conv_state", "scratch", "other", "total",
                 "initial", "page", "snapshot")]


class _Outputs(_Sized):
    _fields_ = [("size", _C_SIZE)] + [(name, _FLOATS) for name in
                                      ("logits", "all_logits", "hidden", "all_hidden")]


class _EmbedOptions(_Sized):
    _fields_ = [("size", _C_SIZE), ("pooling", _C_INT), ("raw", _C_INT)]


class _CacheOptions(_Sized):
    _fields_ = [("size", _C_SIZE), ("max_bytes", _C_SIZE), ("directory", ctypes.c_char_p),
                ("max_directory_bytes", ctypes.c_int64), ("logger", _Logger)]


class _CacheStats(_Sized):
    _fields_ = [("size", _C_SIZE), ("bytes", _C_SIZE), ("n_entries", _C_INT), ("n_files", _C_INT),
                ("file_bytes", ctypes.c_int64), ("n_hits", ctypes.c_int64),
                ("n_misses", ctypes.c_int64), ("n_evicted", ctypes.c_int64),
                ("n_own", ctypes.c_int64)]


class _EngineItem(_Sized):
    _fields_ = [("size", _C_SIZE), ("session", _P), ("tokens", _IDS), ("n", _C_INT),
                ("done", _C_INT), ("logits", _FLOATS)]


class _Limit(_Sized):
    _fields_ = [("size", _C_SIZE), ("max_tokens", _C_INT), ("zero", _C_INT),
                ("max_microseconds", ctypes.c_int64)]


class _Speculation(_Sized):
    _fields_ = [("size", _C_SIZE)] + [(name, ctypes.c_int64) for name in (
        "n_steps", "n_tokens", "n_drafted", "n_accepted")] + [("draft", _C_INT), ("zero", _C_INT)]


class _Detokenizer(ctypes.Structure):
    _fields_ = [("pending", ctypes.c_ubyte * 4), ("n_pending", _C_INT), ("skip_special", _C_INT)]


class _LogitsHook(ctypes.Structure):
    _fields_ = [("edit", _P), ("user", _P)]


class _SamplerOptions(_Sized):
    _fields_ = [("size", _C_SIZE), ("temperature", _C_FLOAT), ("top_k", _C_INT),
                ("top_p", _C_FLOAT), ("min_p", _C_FLOAT), ("repetition_penalty", _C_FLOAT),
                ("penalty_window", _C_INT), ("seed", ctypes.c_uint64),
                ("logits_hook", _LogitsHook)]


# C name of every struct above, for the test that compares sizes and offsets with the header.
STRUCTS = {"q3n_error": _Record, "q3n_allocator": _Allocator, "q3n_logger": _Logger,
           "q3n_model_options": _ModelOptions, "q3n_executor": _Executor,
           "q3n_layer_hook": _LayerHook, "q3n_session_options": _SessionOptions,
           "q3n_session_memory": _SessionMemory, "q3n_outputs": _Outputs,
           "q3n_cache_options": _CacheOptions, "q3n_cache_stats": _CacheStats,
           "q3n_engine_options": _EngineOptions, "q3n_engine_item": _EngineItem,
           "q3n_limit": _Limit, "q3n_speculation": _Speculation,
           "q3n_detokenizer": _Detokenizer, "q3n_logits_hook": _LogitsHook,
           "q3n_sampler_options": _SamplerOptions}

_R = ctypes.POINTER
_FUNCTIONS = {                  # name: (result, arguments...)
    "q3n_version": (_C_INT,),
    "q3n_abi_version": (_C_INT,),
    "q3n_result_string": (ctypes.c_char_p, _C_INT),
    "q3n_type_from_name": (_C_INT, ctypes.c_char_p, _R(_C_INT)),
    "q3n_isa_from_name": (_C_INT, ctypes.c_char_p, _R(_C_INT)),
    "q3n_model_open": (_C_INT, _R(_P), ctypes.c_char_p, _R(_ModelOptions), _R(_Record)),
    "q3n_model_close": (None, _P),
    "q3n_model_config": (_P, _P),
    "q3n_config_field": (ctypes.c_char_p, _P, _C_INT, ctypes.c_char_p),
    "q3n_config_value": (_C_INT, _P, ctypes.c_char_p, _R(ctypes.c_double)),
    "q3n_model_vocab_size": (_C_INT, _P),
    "q3n_model_n_layers": (_C_INT, _P),
    "q3n_model_n_labels": (_C_INT, _P),
    "q3n_model_layer_is_delta": (_C_INT, _P, _C_INT),
    "q3n_model_layer_has_experts": (_C_INT, _P, _C_INT),
    "q3n_model_name": (ctypes.c_char_p, _P),
    "q3n_model_eos_ids": (_IDS, _P, _R(_C_INT)),
    "q3n_model_is_eos": (_C_INT, _P, ctypes.c_int32),
    "q3n_model_label": (ctypes.c_char_p, _P, _C_INT),
    "q3n_model_probabilities": (_C_INT, _P, _FLOATS, _FLOATS),
    "q3n_session_bytes": (_C_SIZE, _P, _R(_SessionOptions), _R(_SessionMemory)),
    "q3n_session_create": (_C_INT, _R(_P), _P, _R(_SessionOptions), _R(_Record)),
    "q3n_session_destroy": (None, _P),
    "q3n_session_eval": (_C_INT, _P, _IDS, _C_INT, _FLOATS),
    "q3n_session_eval_outputs": (_C_INT, _P, _IDS, _C_INT, _R(_Outputs)),
    "q3n_session_score": (_C_INT, _P, _IDS, _C_INT, _DOUBLES),
    "q3n_session_embed": (_C_INT, _P, _IDS, _C_INT, _R(_EmbedOptions), _FLOATS),
    "q3n_session_classify": (_C_INT, _P, _IDS, _C_INT, _FLOATS),
    "q3n_session_length": (_C_INT, _P),
    "q3n_session_capacity": (_C_INT, _P),
    "q3n_session_reset": (None, _P),
    "q3n_session_error": (_R(_Record), _P),
    "q3n_session_expert_counts": (_R(ctypes.c_int64), _P, _C_INT),
    "q3n_session_logits": (_C_INT, _P, _FLOATS),
    "q3n_session_tokens": (_C_INT, _P, _C_INT, _C_INT, _IDS),
    "q3n_session_cancel": (_C_INT, _P),
    "q3n_session_snapshot": (_C_INT, _P, _R(_P)),
    "q3n_snapshot_length": (_C_INT, _P),
    "q3n_snapshot_bytes": (_C_SIZE, _P),
    "q3n_snapshot_free": (None, _P),
    "q3n_session_restore": (_C_INT, _P, _P),
    "q3n_session_fork": (_C_INT, _R(_P), _P, _R(_SessionOptions), _R(_Record)),
    "q3n_session_rewind": (_C_INT, _P, _C_INT),
    "q3n_session_prefill": (_C_INT, _P, _IDS, _C_INT, _FLOATS, _R(_C_INT)),
    "q3n_session_reuse": (_C_INT, _P, _IDS, _C_INT, _R(_C_INT)),
    "q3n_session_checkpoint": (_C_INT, _P),
    "q3n_session_save": (_C_INT, _P, ctypes.c_char_p),
    "q3n_session_load": (_C_INT, _P, ctypes.c_char_p),
    "q3n_session_set_sampler": (_C_INT, _P, _R(_SamplerOptions)),
    "q3n_session_sampler": (_P, _P),
    "q3n_session_decode": (_C_INT, _P, ctypes.c_int32, _IDS, _C_INT, _R(_C_INT)),
    "q3n_session_draft": (_C_INT, _P, ctypes.c_int32, _IDS, _C_INT, _FLOATS),
    "q3n_session_speculation": (_C_INT, _P, _R(_Speculation)),
    "q3n_cache_create": (_C_INT, _R(_P), _P, _R(_CacheOptions), _R(_Record)),
    "q3n_cache_destroy": (None, _P),
    "q3n_cache_clear": (None, _P),
    "q3n_cache_stats_get": (_C_INT, _P, _R(_CacheStats)),
    "q3n_engine_create": (_C_INT, _R(_P), _P, _R(_EngineOptions), _R(_Record)),
    "q3n_engine_destroy": (None, _P),
    "q3n_engine_eval": (_C_INT, _P, _R(_EngineItem), _C_INT, _R(_Limit)),
    "q3n_engine_cancel": (_C_INT, _P),
    "q3n_engine_error": (_R(_Record), _P),
    "q3n_tokenize": (_C_INT, _P, ctypes.c_char_p, _C_SIZE, _C_INT, _IDS, _C_SIZE, _R(_C_SIZE)),
    "q3n_detokenize": (_C_INT, _P, _IDS, _C_SIZE, ctypes.c_char_p, _C_SIZE, _R(_C_SIZE)),
    "q3n_detokenizer_next": (_C_INT, _R(_Detokenizer), _P, ctypes.c_int32, ctypes.c_char_p,
                             _C_SIZE, _R(_C_SIZE)),
    "q3n_detokenizer_finish": (None, _R(_Detokenizer), ctypes.c_char_p, _R(_C_SIZE)),
    "q3n_sampler_create": (_C_INT, _R(_P), _P, _R(_SamplerOptions), _R(_Record)),
    "q3n_sampler_destroy": (None, _P),
    "q3n_sampler_sample": (_C_INT, _P, _FLOATS, _R(ctypes.c_int32)),
    "q3n_sampler_error": (_R(_Record), _P),
    "q3n_sampler_accept": (None, _P, ctypes.c_int32),
    "q3n_sampler_reset": (None, _P),
    "q3n_sampler_seed": (None, _P, ctypes.c_uint64),
}

_lib: Optional[ctypes.CDLL] = None
_lib_path: Optional[str] = None
LIBRARY_NAMES = ("libqwen3next.so", "libqwen3next.dylib", "qwen3next.dll")


class Error(Exception):
    """A failure the library reports: its message, and its q3n_result as code."""

    def __init__(self, code: int, message: str, offset: int = -1) -> None:
        super().__init__(message)
        self.code, self.offset = code, offset


def load(path: Optional[Path] = None) -> ctypes.CDLL:
    """Load the shared library; the first call decides which.  Returns it as a ctypes library."""
    global _lib, _lib_path
    if _lib is None:
        here = pathlib.Path(__file__).resolve().parent
        checkout = here.parent.parent.parent
        places = [folder / name for folder in (here, checkout / "build") for name in LIBRARY_NAMES]
        found = os.fsdecode(path) if path else os.environ.get("QWEN3NEXT_LIB")
        found = found or next((str(p) for p in places if p.exists()), None)
        found = found or ctypes.util.find_library("qwen3next")
        if not found:
            raise OSError("libqwen3next not found: run make, or set QWEN3NEXT_LIB")
        _lib = _prepare(ctypes.CDLL(found), found)
        _lib_path = found
    elif path and os.fsdecode(path) != _lib_path:
        raise OSError("%s is loaded already, %s cannot be" % (_lib_path, os.fsdecode(path)))
    return _lib


def _prepare(lib, path):
    """lib, when it is the library, of our ABI: its functions get their types, and checks."""
    if not hasattr(lib, "q3n_version"):
        raise OSError("%s is another library: it has no q3n_version" % path)
    version = lib.q3n_version()
    version = version // 10000, version // 100 % 100, version % 100
    if not hasattr(lib, "q3n_abi_version") or lib.q3n_abi_version() != ABI:
        raise OSError("%s, of version %d.%d.%d, has not the ABI %d that this module is for"
                      % (path, *version, ABI))
    for name, (result, *arguments) in _FUNCTIONS.items():
        if not hasattr(lib, name):
            raise OSError("%s has no function %s, though it is of version %d.%d.%d"
                          % (path, name, *version))
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
        setattr(lib, name, _checked(function, name, arguments))
    return lib


def _check(code, record=None):
    """Raises Error, with what the record says or else the code means, if a call failed."""
    if code != _OK:
        text = record.message if record is not None else b""
        text = text or load().q3n_result_string(code)
        raise Error(code, text.decode("utf-8", "replace"), record.offset if record else -1)


_TEXT = (str, bytes, bytearray)


def _id_list(ids):
    if isinstance(ids, _TEXT):
        raise TypeError("ids are whole numbers: tokenize(text) gives those of a text")
    return [_integer(i, ctypes.c_int32, "a token id") for i in ids]


def _id_array(ids):
    ids = _id_list(ids)
    return (ctypes.c_int32 * max(len(ids), 1))(*ids), len(ids)


def _floats_of(values, n, name):
    """For a C function: the memory of n float32, or a copy of a sequence of numbers."""
    try:
        view = memoryview(values)
    except TypeError:
        view = memoryview(_float_array(values, name))
    if view.format.lstrip("<=@") != "f" or view.ndim != 1:
        raise TypeError("%s are float32 in one dimension, these are %r in %d: convert them"
                        % (name, view.format, view.ndim))
    if len(view) != n:
        raise ValueError("%d %s, expected %d" % (len(view), name, n))
    if view.readonly or not view.contiguous:
        view = memoryview(array.array("f", view.tolist()))
    return (_C_FLOAT * n).from_buffer(view)


def _text(data, name):
    """Bytes for a C string."""
    if b"\0" in data:
        raise ValueError("%s: %r has a zero byte" % (name, data))
    return data


def _floats(n):
    """array('f') of n elements, and the same memory for a C function."""
    a = array.array("f", bytes(4 * n))
    return a, (_C_FLOAT * n).from_buffer(a) if n else None


def _named(function, name):
    """The number of a name by q3n_..._from_name; None is the default, 0."""
    value = _C_INT()
    if name is None:
        return 0
    if not isinstance(name, str):
        raise TypeError("%r is no name" % (name,))
    if function(_text(name.encode(), "a name"), ctypes.byref(value)) != _OK:
        raise ValueError("unknown name %r" % name)
    return value.value


def _fields(struct):
    """The numbers in a struct by name."""
    return {name: getattr(struct, name) for name, _ in struct._fields_
            if name not in ("size", "zero")}


# ---- Calls that Ctrl-C stops ----

_SHORT = 0.05                   # seconds: a call that is as short may as well end


def _interruptible(cancel, call, *args):
    """call(*args) on a thread of its own, while this one, the main thread, handles signals: Python
    runs no handler while C is at work.  If a handler raises, cancel() stops the call, and the
    exception goes on when it has ended."""
    raised, done, result, failed = [], threading.Event(), [], []

    def work():
        try:
            result.append(call(*args))
        except BaseException as e:
            failed.append(e)
        finally:
            done.set()

    def on_interrupt(number, frame):
        try:
            handler(number, frame)
        except BaseException as e:
            raised.append(e)

    handler = signal.signal(signal.SIGINT, on_interrupt)
    try:
        threading.Thread(target=work, daemon=True).start()
        while not done.is_set():
            try:
                done.wait(0.05)
            except BaseException as e:          # of another signal's handler
                raised.append(e)
            # A call that has not begun yet is not stopped: then the next time.
            if raised and not done.is_set():
                cancel()
    finally:
        signal.signal(signal.SIGINT, handler)
    for error in raised + failed:
        raise error
    return result[0]


def _may_interrupt():
    return (threading.current_thread() is threading.main_thread()
            and callable(signal.getsignal(signal.SIGINT)))


class _Pace:
    """Evaluates, interruptibly if it may take long by what the last call took for a token."""

    def __init__(self):
        self._seconds = float("inf")

    def call(self, cancel, n, function, *args):
        start = time.monotonic()
        if self._seconds * n < _SHORT or not _may_interrupt():
            code = function(*args)
        else:
            code = _interruptible(cancel, function, *args)
        self._seconds = (time.monotonic() - start) / max(n, 1)
        return code


_Self = TypeVar("_Self", bound="_Owner")


class _Owner:
    """Holds a C object; with-statement and close() give it back, after those that depend on it."""

    def __init__(self, handle, destroy, *depends_on):
        self._handle: Optional[int] = handle
        self._destroy = destroy
        self._users = weakref.WeakSet()
        for owner in depends_on:
            if owner is not None:
                owner._users.add(self)

    @property
    def handle(self) -> int:
        if not self._handle:
            raise ValueError("%s is closed" % type(self).__name__)
        return self._handle

    def close(self) -> None:
        for user in list(getattr(self, "_users", ())):
            user.close()
        handle, self._handle = self._handle, None
        if handle:
            self._destroy(handle)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


def _config_of(lib: Any, model: int) -> Dict[str, Any]:
    """The fields of q3n_config, enums as numbers, and the kinds of all layers."""
    config: Dict[str, Any] = {}
    c = lib.q3n_model_config(model)
    text, value = ctypes.create_string_buffer(64), ctypes.c_double()
    while name := lib.q3n_config_field(c, len(config), text):
        _check(lib.q3n_config_value(c, name, ctypes.byref(value)))
        name = name.decode()
        config[name] = value.value if name in _REAL_FIELDS else int(value.value)
    layers = range(lib.q3n_model_n_layers(model))
    config["layer_types"] = [lib.q3n_model_layer_is_delta(model, l) for l in layers]
    config["layer_experts"] = [lib.q3n_model_layer_has_experts(model, l) for l in layers]
    return config


class Model(_Owner):
    """An open model file.  Closing it closes everything made with it first.

    config: the fields of q3n_config by name; problem_type: one of PROBLEM_TYPES; labels: names of
    the classes, None if the file has none."""

    name: str
    vocab_size: int
    config: Dict[str, Any]
    eos_ids: List[int]
    problem_type: str
    labels: Optional[List[str]]

    def __init__(self, path: Path, skip_checksum: bool = False) -> None:
        lib = load()
        handle, record = _P(), _Record()
        options = _struct(_ModelOptions, skip_checksum=bool(skip_checksum))
        self._handle = None
        _check(lib.q3n_model_open(ctypes.byref(handle), _text(os.fsencode(path), "path"),
                                  ctypes.byref(options), ctypes.byref(record)), record)
        super().__init__(handle.value, lib.q3n_model_close)
        self.config = _config_of(lib, self.handle)
        self.vocab_size = lib.q3n_model_vocab_size(self.handle)
        self.name = lib.q3n_model_name(self.handle).decode("utf-8", "replace")
        n = _C_INT()
        ids = lib.q3n_model_eos_ids(self.handle, ctypes.byref(n))
        self.eos_ids = [ids[i] for i in range(n.value)]
        self.problem_type = PROBLEM_TYPES[self.config["problem_type"]]
        labels = range(lib.q3n_model_n_labels(self.handle))
        labels = [lib.q3n_model_label(self.handle, i) for i in labels]
        named = labels and None not in labels
        self.labels = [b.decode("utf-8", "replace") for b in labels] if named else None

    def session(self, **options: Any) -> Session:
        return Session(self, **options)

    def cache(self, max_bytes: int, **options: Any) -> Cache:
        return Cache(self, max_bytes, **options)

    def engine(self, **options: Any) -> Engine:
        return Engine(self, **options)

    def sampler(self, **options: float) -> Sampler:
        return Sampler(self, **options)

    def tokenize(self, text: Union[Text, memoryview], special: bool = True, prefix: bool = False,
                 suffix: bool = False) -> List[int]:
        """Ids of a str or bytes; special=False: special tokens in it are plain text.  prefix and
        suffix: with the ids that the tokenizer puts before and after a text; both give those of
        transformers' tokenizer(text)."""
        if not isinstance(text, _TEXT + (memoryview,)):
            raise TypeError("a text is str or bytes, not %s" % type(text).__name__)
        flags = (0 if special else NO_SPECIAL) | (PREFIX if prefix else 0) | (
            SUFFIX if suffix else 0)
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        n, code = _C_SIZE(len(data) // 3 + 32), _ERR_FULL
        while code == _ERR_FULL:         # then n is how many there are
            ids = (ctypes.c_int32 * n.value)()
            code = load().q3n_tokenize(self.handle, data, len(data), flags, ids, len(ids),
                                       ctypes.byref(n))
        _check(code)
        return ids[:n.value]

    def probabilities(self, scores: Logits) -> Floats:
        """What scores [num_labels] of Session.classify mean, by problem_type."""
        n = self.config["num_labels"]
        c_scores = _floats_of(scores, n, "scores") if n else None
        out, c_out = _floats(n)
        _check(load().q3n_model_probabilities(self.handle, c_scores, c_out))
        return out

    def detokenize(self, ids: Ids) -> str:
        """The text of ids; bytes that are no character become U+FFFD."""
        lib, n = load(), _C_SIZE()
        c_ids, n_ids = _id_array(ids)
        code = lib.q3n_detokenize(self.handle, c_ids, n_ids, None, 0, ctypes.byref(n))
        if code not in (_OK, _ERR_FULL):
            _check(code)
        text = ctypes.create_string_buffer(n.value + 1)
        _check(lib.q3n_detokenize(self.handle, c_ids, n_ids, text, n.value, ctypes.byref(n)))
        return text.raw[:n.value].decode("utf-8", "replace")


_EDIT = ctypes.CFUNCTYPE(None, _P, _FLOATS, _C_INT, _IDS, _C_INT)


class _Hook:
    """A callable as q3n_logits_hook, for a sampler and its forks.  What it raises masks everything
    and cancels the call under way on its thread, and is in raised then."""

    def __init__(self, edit: LogitsHook) -> None:
        self._edit, self._call_of = edit, threading.local()
        self._callback = _EDIT(self._call)
        self.struct = _LogitsHook(edit=ctypes.cast(self._callback, _P).value)

    def around(self, function, cancel, raised):
        """function, to be called on any thread: what the hook raises in it is put into raised."""
        def call(*args):
            self._call_of.cancel, self._call_of.raised = cancel, raised
            return function(*args)
        return call

    def _call(self, user, logits, n_vocab, tokens, n_tokens):
        address = ctypes.addressof(logits.contents)
        try:
            view = memoryview((_C_FLOAT * n_vocab).from_address(address)).cast("B").cast("f")
            self._edit(view, tokens[:n_tokens])
        except BaseException as e:
            self._call_of.raised.append(e)
            ctypes.memset(address, 0xFF, 4 * n_vocab)            # NaN
            self._call_of.cancel()


def _hooked(hook, function, cancel, raised):
    return hook.around(function, cancel, raised) if hook else function


def _sampler_options(logits_hook: Optional[LogitsHook] = None,
                     **options: Any) -> Tuple[_SamplerOptions, Optional[_Hook]]:
    """q3n_sampler_options, and the hook that must live as long, or None."""
    hook = None if logits_hook is None else _Hook(logits_hook)
    if hook:
        options["logits_hook"] = hook.struct
    return _struct(_SamplerOptions, **options), hook


class _Chooser:
    """A sampler: it has a handle."""

    _model: Model
    _hook: Optional[_Hook] = None

    @property
    def handle(self) -> int:
        raise NotImplementedError

    def sample(self, logits: Logits) -> int:
        """The token that is chosen by logits [vocab_size]: float32 in one dimension, or a sequence
        of numbers."""
        c_logits = _floats_of(logits, self._model.vocab_size, "logits")
        lib, token = load(), ctypes.c_int32()
        raised: List[BaseException] = []
        sample = _hooked(self._hook, lib.q3n_sampler_sample, lambda: None, raised)
        code = sample(self.handle, c_logits, ctypes.byref(token))
        for e in raised:
            raise e
        if code != _OK:
            _check(code, lib.q3n_sampler_error(self.handle).contents)
        return token.value

    def accept(self, token: int) -> None:
        """Remember a token that was not sampled, such as the prompt's."""
        load().q3n_sampler_accept(self.handle, token)

    def reset(self) -> None:
        """Forget tokens, seed again."""
        load().q3n_sampler_reset(self.handle)

    def seed(self, seed: int) -> None:
        """Begin other random numbers; the tokens remembered stay."""
        load().q3n_sampler_seed(self.handle, seed)


class Sampler(_Owner, _Chooser):
    """Chooses tokens by logits from anywhere: temperature (0 = greedy), top_k, top_p, min_p,
    repetition_penalty, penalty_window, seed; logits_hook(logits, tokens) edits logits [vocab_size],
    writable during the call, before a token is chosen."""

    def __init__(self, model: Model, **options: Any) -> None:
        lib = load()
        handle, record = _P(), _Record()
        self._handle, self._model = None, model
        o, self._hook = _sampler_options(**options)
        _check(lib.q3n_sampler_create(ctypes.byref(handle), model.handle, ctypes.byref(o),
                                      ctypes.byref(record)), record)
        super().__init__(handle.value, lib.q3n_sampler_destroy, model)


class _SessionSampler(_Chooser):
    """A session's own: gone with it, or when it gets another."""

    def __init__(self, session: "Session", hook: Optional[_Hook]) -> None:
        self._session, self._model, self._hook = weakref.proxy(session), session.model, hook

    @property
    def handle(self) -> int:
        if self._session.sampler is not self:
            raise ValueError("the session has another sampler")
        return load().q3n_session_sampler(self._session.handle)


class Cache(_Owner):
    """States by the tokens that led to them, for sessions of one model: session(cache=...)."""

    def __init__(self, model: Model, max_bytes: int, directory: Optional[Path] = None,
                 max_directory_bytes: int = 0) -> None:
        lib = load()
        self._handle = None
        handle, record = _P(), _Record()
        path = None if directory is None else _text(os.fsencode(directory), "directory")
        o = _struct(_CacheOptions, max_bytes=max_bytes, directory=path,
                    max_directory_bytes=max_directory_bytes)
        _check(lib.q3n_cache_create(ctypes.byref(handle), model.handle, ctypes.byref(o),
                                    ctypes.byref(record)), record)
        super().__init__(handle.value, lib.q3n_cache_destroy, model)

    def clear(self) -> None:
        """Forget what is in memory."""
        load().q3n_cache_clear(self.handle)

    def stats(self) -> Dict[str, int]:
        """What is in it, and how often a state was found."""
        stats = _CacheStats()
        _check(load().q3n_cache_stats_get(self.handle, ctypes.byref(stats)))
        return _fields(stats)


class Snapshot(_Owner):
    """A state that a session was in: len() is its tokens."""

    def __init__(self, model: Model, handle: Optional[int]) -> None:
        super().__init__(handle, load().q3n_snapshot_free, model)

    def __len__(self) -> int:
        return load().q3n_snapshot_length(self.handle)

    @property
    def bytes(self) -> int:
        """Its memory beside the pages that it shares with the session."""
        return load().q3n_snapshot_bytes(self.handle)


def _engine_options(isa=None, **options):
    o = _struct(_EngineOptions, **options)
    o.isa = _named(load().q3n_isa_from_name, isa)
    return o


def _session_options(isa, kv_type, **options):
    """Those that an engine has are of the session's own."""
    names = [name for name in ("n_threads", "batch_size", "executor", "layer_hook")
             if name in options]
    own = {name: options.pop(name) for name in names}
    o = _struct(_SessionOptions, **options)
    o.kv_type = _named(load().q3n_type_from_name, kv_type)
    if own or isa is not None:
        o.engine_options = ctypes.pointer(_engine_options(isa, **own))
    return o


class Session(_Owner):
    """The state of one text; len() is its tokens.

    Options: capacity, kv_type, snapshot_type and speculate ("auto": drafts where they pay, by which
    a seed no longer gives one text) by name, draft, count_experts; cache=Cache or snapshot_bytes,
    snapshot_every; engine=Engine, or for an engine of its own n_threads, batch_size (0 = the
    library's default) and isa."""

    model: Model
    memory: Dict[str, int]               # planned bytes, by part
    cache: Optional[Cache]
    engine: Optional[Engine]

    def __init__(self, model: Model, isa: Optional[str] = None, kv_type: Optional[str] = None,
                 snapshot_type: Optional[str] = None, speculate: str = "off",
                 count_experts: bool = False, cache: Optional[Cache] = None,
                 engine: Optional[Engine] = None, **options: int) -> None:
        lib = load()
        self._handle = None
        if speculate not in SPECULATE:
            raise ValueError("unknown name %r" % speculate)
        o = _session_options(isa, kv_type, count_experts=int(count_experts),
                             speculate=SPECULATE.index(speculate),
                             cache=cache and cache.handle, engine=engine and engine.handle,
                             **options)
        o.snapshot_type = _named(lib.q3n_type_from_name, snapshot_type)
        handle, record, memory = _P(), _Record(), _SessionMemory()
        lib.q3n_session_bytes(model.handle, ctypes.byref(o), ctypes.byref(memory))
        _check(lib.q3n_session_create(ctypes.byref(handle), model.handle, ctypes.byref(o),
                                      ctypes.byref(record)), record)
        self._adopt(model, handle.value, _fields(memory), cache, engine)

    def _adopt(self, model, handle, memory, cache, engine):
        self.model, self.memory, self.cache, self.engine = model, memory, cache, engine
        self._pace = _Pace()
        self.sampler: Optional[_SessionSampler] = None
        super().__init__(handle, load().q3n_session_destroy, model, cache, engine)

    def __len__(self) -> int:
        return load().q3n_session_length(self.handle)

    @property
    def capacity(self) -> int:
        """The most tokens that it can hold."""
        return load().q3n_session_capacity(self.handle)

    def reset(self) -> None:
        """Begin an empty text."""
        load().q3n_session_reset(self.handle)

    def _check(self, code):
        if code != _OK:
            _check(code, load().q3n_session_error(self.handle).contents)

    def _evaluate(self, n, function, *args):
        """A call that evaluates about n tokens."""
        self._check(self._pace.call(self.cancel, n, function, self.handle, *args))

    def logits(self, ids: Optional[Ids] = None) -> Floats:
        """Append tokens; the logits [vocab_size] that follow the last of them.  Without ids those
        of the last token once more."""
        logits, c_logits = _floats(self.model.vocab_size)
        if ids is None:
            self._check(load().q3n_session_logits(self.handle, c_logits))
            return logits
        c_ids, n = _id_array(ids)
        self._evaluate(n, load().q3n_session_eval, c_ids, n, c_logits)
        return logits

    def tokens(self) -> List[int]:
        """The session's text."""
        n = len(self)
        ids = (ctypes.c_int32 * max(n, 1))()
        if n:
            self._check(load().q3n_session_tokens(self.handle, 0, n, ids))
        return ids[:n]

    def prefill(self, ids: Ids) -> int:
        """Make ids the session's text, from what costs least; how many were not evaluated."""
        (c_ids, n), reused = _id_array(ids), _C_INT()
        self._evaluate(n, load().q3n_session_prefill, c_ids, n, None, ctypes.byref(reused))
        return reused.value

    def reuse(self, ids: Ids) -> int:
        """The first step of prefill: go to the longest known beginning of ids; its length."""
        (c_ids, n), reused = _id_array(ids), _C_INT()
        self._evaluate(n, load().q3n_session_reuse, c_ids, n, ctypes.byref(reused))
        return reused.value

    def checkpoint(self) -> None:
        """Put the state into the cache."""
        self._check(load().q3n_session_checkpoint(self.handle))

    def rewind(self, length: int) -> None:
        """Go back to the first length tokens."""
        self._evaluate(max(len(self), 1), load().q3n_session_rewind, length)

    def snapshot(self) -> Snapshot:
        """The state as it is now, for restore."""
        handle = _P()
        self._check(load().q3n_session_snapshot(self.handle, ctypes.byref(handle)))
        return Snapshot(self.model, handle.value)

    def restore(self, snapshot: Snapshot) -> None:
        """Go to a state of this session, or of another one of the model with the same kv_type."""
        self._check(load().q3n_session_restore(self.handle, snapshot.handle))

    def fork(self) -> Session:
        """A new session with the same text, options and sampler, in the same state."""
        handle, record = _P(), _Record()
        _check(load().q3n_session_fork(ctypes.byref(handle), self.handle, None,
                                       ctypes.byref(record)), record)
        other = Session.__new__(Session)
        other._adopt(self.model, handle.value, dict(self.memory), self.cache, self.engine)
        if self.sampler:
            other.sampler = _SessionSampler(other, self.sampler._hook)
        return other

    def save(self, path: Path) -> None:
        """Write a file with which load continues."""
        self._check(load().q3n_session_save(self.handle, _text(os.fsencode(path), "path")))

    def load(self, path: Path) -> None:
        """Continue a saved session; a sampler that was set before takes on the state of its."""
        self._check(load().q3n_session_load(self.handle, _text(os.fsencode(path), "path")))

    def cancel(self) -> bool:
        """From any thread: stop the evaluation under way, which raises Error; False if none is."""
        return bool(load().q3n_session_cancel(self.handle))

    def set_sampler(self, **options: Any) -> None:
        """Give the session a sampler of its own, with the options of Sampler: session.sampler.  Its
        hook's tokens are those that follow session.tokens(), drafts among them."""
        o, hook = _sampler_options(**options)
        self._check(load().q3n_session_set_sampler(self.handle, ctypes.byref(o)))
        self.sampler = _SessionSampler(self, hook)

    def decode(self, token: int, max_tokens: int = MAX_DRAFT + 1) -> List[int]:
        """Evaluate token and let the session's sampler choose 1 .. max_tokens that follow; all but
        the last are evaluated."""
        max_tokens = min(_integer(max_tokens, _C_INT, "max_tokens", 1), MAX_DRAFT + 1)
        chosen, n = (ctypes.c_int32 * max_tokens)(), _C_INT()
        raised: List[BaseException] = []
        decode = _hooked(self.sampler and self.sampler._hook, load().q3n_session_decode,
                         self.cancel, raised)
        code = self._pace.call(self.cancel, 1, decode, self.handle, token, chosen, max_tokens,
                               ctypes.byref(n))
        for e in raised:
            raise e
        self._check(code)
        return chosen[:n.value]

    def draft(self, token: int, n: int = 1) -> List[int]:
        """What the MTP module would draft after token."""
        drafts = (ctypes.c_int32 * _integer(n, _C_INT, "n", 1, MAX_DRAFT))()
        self._evaluate(1, load().q3n_session_draft, token, drafts, n, None)
        return drafts[:n]

    def speculation(self) -> Dict[str, int]:
        """Steps of decode, tokens that they gave, drafted and accepted ones, as numbers by name."""
        s = _Speculation()
        _check(load().q3n_session_speculation(self.handle, ctypes.byref(s)))
        return _fields(s)

    def all_logits(self, ids: Ids) -> List[Floats]:
        """Append tokens; the logits that follow each of them, a list of array('f')."""
        c_ids, n = _id_array(ids)
        vocab = self.model.vocab_size
        flat, c_flat = _floats(n * vocab)
        outputs = _Outputs(all_logits=ctypes.cast(c_flat, _FLOATS))
        self._evaluate(n, load().q3n_session_eval_outputs, c_ids, n, ctypes.byref(outputs))
        return [flat[i * vocab:(i + 1) * vocab] for i in range(n)]

    def score(self, ids: Ids) -> List[float]:
        """Append tokens; the natural logarithm of the probability of each after all before it, of
        which the first is 0 where nothing comes before."""
        c_ids, n = _id_array(ids)
        log_probs = (ctypes.c_double * max(n, 1))()
        self._evaluate(n, load().q3n_session_score, c_ids, n, log_probs)
        return log_probs[:n]

    def embed(self, text: Union[Text, Ids], pooling: str = "last", raw: bool = False) -> Floats:
        """A vector [hidden_size] of a whole text or its ids, of length 1 unless raw: the hidden
        state of the "last" token, of the "first", or the "mean" of all; the session is reset
        first."""
        if pooling not in POOLING:
            raise ValueError("unknown name %r" % pooling)
        if isinstance(text, _TEXT):
            text = self.model.tokenize(text, prefix=True, suffix=True)
        c_ids, n = _id_array(text)
        options = _EmbedOptions(pooling=POOLING.index(pooling), raw=int(raw))
        vector, c_vector = _floats(self.model.config["hidden_size"])
        self._evaluate(n, load().q3n_session_embed, c_ids, n, ctypes.byref(options), c_vector)
        return vector

    def classify(self, text: Union[Text, Ids]) -> Floats:
        """Scores [num_labels] of a whole text or its ids; the session is reset first."""
        if isinstance(text, _TEXT):
            text = self.model.tokenize(text, prefix=True, suffix=True)
        c_ids, n = _id_array(text)
        scores, c_scores = _floats(self.model.config["num_labels"])
        self._evaluate(n, load().q3n_session_classify, c_ids, n, c_scores)
        return scores

    def expert_counts(self, layer: int) -> Optional[List[int]]:
        """How often each expert of a layer was chosen; None without experts or count_experts."""
        counts = load().q3n_session_expert_counts(self.handle, layer)
        return counts[:self.model.config["num_experts"]] if counts else None

    def generate_ids(self, prompt: Ids, max_tokens: int, stop_at_eos: bool = True,
                     **sampling: Any) -> Iterator[int]:
        """Yield up to max_tokens ids that continue prompt, ids after what was evaluated before;
        an empty prompt goes on from there.  With drafts the session may be MAX_DRAFT tokens ahead
        of what was yielded; in the end all but the last are evaluated.  Options of sampling set
        another sampler; without any the session's goes on, greedy if it has none."""
        if max_tokens < 1:
            return
        ids = _id_list(prompt)
        if sampling or self.sampler is None:
            self.set_sampler(**sampling)
        sampler = self.sampler
        assert sampler is not None
        for token in ids:
            sampler.accept(token)
        chosen = [sampler.sample(self.logits(ids or None))]
        while True:
            for token in chosen:
                if stop_at_eos and token in self.model.eos_ids:
                    return
                yield token
            max_tokens -= len(chosen)
            if max_tokens < 1:
                return
            room = self.capacity - len(self)
            chosen = self.decode(token, max(1, min(max_tokens, room, MAX_DRAFT + 1)))

    def generate(self, prompt: Union[Text, Ids], max_tokens: int,
                 **sampling: Any) -> Iterator[str]:
        """Yield pieces of text, whole characters each, that continue the text or ids prompt."""
        lib, n = load(), _C_SIZE()
        ids = self.model.tokenize(prompt, prefix=len(self) == 0) if isinstance(prompt, _TEXT) \
            else prompt
        decoder, text = _Detokenizer(skip_special=1), ctypes.create_string_buffer(1 << 12)
        for token in self.generate_ids(ids, max_tokens, **sampling):
            _check(lib.q3n_detokenizer_next(ctypes.byref(decoder), self.model.handle, token, text,
                                            len(text), ctypes.byref(n)))
            if n.value:
                yield text.raw[:n.value].decode("utf-8")
        lib.q3n_detokenizer_finish(ctypes.byref(decoder), text, ctypes.byref(n))
        if n.value:
            yield text.raw[:n.value].decode("utf-8")


class EngineItem:
    """Ids to append to a session in Engine.eval: done of them are evaluated; logits [vocab_size]
    are there when all are, None before or if they were not wanted."""

    def __init__(self, session: Session, ids: Ids, logits: bool = True) -> None:
        self.session, self._wanted = session, logits
        self._ids, self.n = _id_array(ids)
        self._logits, c_logits = _floats(session.model.vocab_size if logits else 0)
        self._item = _EngineItem(tokens=self._ids, n=self.n,
                                 logits=c_logits and ctypes.cast(c_logits, _FLOATS))

    @property
    def done(self) -> int:
        return self._item.done

    @property
    def logits(self) -> Optional[Floats]:
        return self._logits if self._wanted and self.done == self.n else None


class Engine(_Owner):
    """Evaluates several sessions, made with engine=, together.  Options: batch_size, n_threads,
    isa."""

    def __init__(self, model: Model, isa: Optional[str] = None, **options: int) -> None:
        lib = load()
        self._handle = None
        handle, record = _P(), _Record()
        o = _engine_options(isa, **options)
        _check(lib.q3n_engine_create(ctypes.byref(handle), model.handle, ctypes.byref(o),
                                     ctypes.byref(record)), record)
        self._pace = _Pace()
        super().__init__(handle.value, lib.q3n_engine_destroy, model)

    def eval(self, items: Iterable[Union[EngineItem, Tuple[Session, Ids]]], max_tokens: int = 0,
             max_microseconds: int = 0) -> List[EngineItem]:
        """Evaluate EngineItems or (session, ids) until all are done, or the limit (0 = none) is
        reached; returns the EngineItems, with which the next call goes on."""
        all_items = [i if isinstance(i, EngineItem) else EngineItem(*i) for i in items]
        for item in all_items:
            item._item.session = item.session.handle
        c_items = (_EngineItem * max(len(all_items), 1))(*(item._item for item in all_items))
        limit = _struct(_Limit, max_tokens=max_tokens, max_microseconds=max_microseconds)
        n = sum(item.n - item.done for item in all_items)
        code = self._pace.call(self.cancel, n, load().q3n_engine_eval, self.handle, c_items,
                               len(all_items), ctypes.byref(limit))
        for item, c_item in zip(all_items, c_items):
            item._item.done = c_item.done
        if code != _OK:
            _check(code, load().q3n_engine_error(self.handle).contents)
        return all_items

    def cancel(self) -> bool:
        """As Session.cancel."""
        return bool(load().q3n_engine_cancel(self.handle))
