"""Quantised types, encoded by the C library: the search lives in q3n_make.h alone.

The library is looked for at $QWEN3NEXT_LIB and in build/ beside the header, where `make` puts it.
"""
import concurrent.futures
import ctypes
import os

import q3n_file
from q3n_file import ConvertError

TILE_ROWS = 16
NAMES = ("libqwen3next.so", "libqwen3next.dylib", "qwen3next.dll")
ROUTERS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight", "linear_attn.in_proj_ba.weight",
           "score.weight")
SENSITIVE = ("self_attn.v_proj.weight", "linear_attn.out_proj.weight")
ENDS = ("embed_tokens.weight", "lm_head.weight")


def type_of(name, recipe, keep):
    """The type of a matrix by a row of Q3N_RECIPE_LIST; keep is the checkpoint's own."""
    if name.endswith(ROUTERS):
        return recipe.experts if recipe.experts in ("f32", "f16", "bf16") else keep
    if name in ENDS or name.startswith("mtp."):
        return recipe.ends
    if ".mlp.experts." in name:
        return recipe.experts
    return recipe.sensitive if name.endswith(SENSITIVE) else recipe.other


class _Rows(ctypes.Structure):
    """q3n_rows"""
    _fields_ = [("x", ctypes.c_void_p), ("n_rows", ctypes.c_int64), ("n_cols", ctypes.c_int64),
                ("importance", ctypes.c_void_p)]


class _Error(ctypes.Structure):
    """q3n_error"""
    _fields_ = [("code", ctypes.c_int), ("offset", ctypes.c_int64),
                ("message", ctypes.c_char * 500)]


def find_library():
    named = os.environ.get("QWEN3NEXT_LIB")
    if named:
        return named
    build = os.path.join(os.path.dirname(q3n_file.HEADER), "build")
    for name in NAMES:
        if os.path.exists(os.path.join(build, name)):
            return os.path.join(build, name)
    raise ConvertError("quantised types need the library: found no %s in %s: run `make`, or name "
                       "it in QWEN3NEXT_LIB" % (NAMES[0], os.path.normpath(build)))


def cpu_count():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


class Encoder:
    """encode() splits rows over threads: the library works outside Python's lock.  abi is the
    Q3N_ABI of the header that was read."""

    def __init__(self, abi):
        path = find_library()
        try:
            lib = ctypes.CDLL(os.path.abspath(path))
            found = lib.q3n_abi_version()
            self.function = lib.q3n_quantize_rows
        except (OSError, AttributeError) as e:
            raise ConvertError("%s: cannot be used: %s: run `make`" % (path, e))
        if found != abi:
            raise ConvertError("%s: found the ABI %d, expected the header's %d: run `make`"
                               % (path, found, abi))
        self.function.restype = ctypes.c_int
        self.function.argtypes = [ctypes.c_int, ctypes.POINTER(_Rows), ctypes.c_void_p,
                                  ctypes.c_size_t, ctypes.POINTER(_Error)]
        self.n_threads = cpu_count()
        self.pool = concurrent.futures.ThreadPoolExecutor(self.n_threads)

    def _rows(self, type_, x, y, part):
        """Rows of the f32 at address x into the type at address y; None, or the first row of the
        part and what is wrong."""
        first, rows, cols = part
        tile_bytes = q3n_file.matrix_bytes(type_, TILE_ROWS, cols)
        given = _Rows(x + 4 * first * cols, rows, cols, None)
        error = _Error()
        if self.function(type_.number, ctypes.byref(given), y + first // TILE_ROWS * tile_bytes,
                         q3n_file.matrix_bytes(type_, rows, cols), ctypes.byref(error)) == 0:
            return None
        return first, error.message.decode("utf-8", "replace")

    def encode(self, type_, data, rows, cols):
        """data: f32 rows.  Raises ValueError(row, what is wrong)."""
        data = bytes(data)
        out = bytearray(q3n_file.matrix_bytes(type_, rows, cols))
        x = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
        y = ctypes.addressof((ctypes.c_char * len(out)).from_buffer(out))
        step = q3n_file.align(-(-rows // self.n_threads), TILE_ROWS)
        parts = [(first, min(step, rows - first), cols) for first in range(0, rows, step)]
        for wrong in self.pool.map(lambda part: self._rows(type_, x, y, part), parts):
            if wrong:
                raise ValueError(*wrong)
        return out
