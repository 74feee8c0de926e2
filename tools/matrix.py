"""Float conversion, and matrices that are read a block of rows at a time.

Works without numpy where the arithmetic is copying and rounding; with it, faster.  FP8 and LoRA
need it.
"""
import struct

from q3n_file import ConvertError

try:
    import numpy
except ImportError:
    numpy = None

ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
NUMPY_HELP = "needs numpy: pip install numpy (or apt-get install python3-numpy)"


def need_numpy(what):
    if numpy is None:
        raise ConvertError("%s %s" % (what, NUMPY_HELP))
    return numpy


# ---- Float conversion: little-endian bytes to little-endian bytes ----

def convert(data, source, target):
    """data in type source as bytes in type target; round to nearest, ties to even."""
    if source == target:
        return data
    if source == "f32":
        return _f32_to_bf16(data) if target == "bf16" else _f32_to_f16(data)
    wide = _bf16_to_f32(data) if source == "bf16" else _f16_to_f32(data)
    return convert(wide, "f32", target)


def _bf16_to_f32(data):
    out = bytearray(2 * len(data))      # a bf16 is the upper half of an f32
    out[2::4] = data[0::2]
    out[3::4] = data[1::2]
    return out


def _f16_to_f32(data):
    if numpy:
        return numpy.frombuffer(data, "<f2").astype("<f4").tobytes()
    n = len(data) // 2
    return struct.pack("<%df" % n, *struct.unpack("<%de" % n, data))


def _f32_to_f16(data):
    if numpy:
        x = numpy.frombuffer(data, "<f4")
        with numpy.errstate(over="ignore"):
            y = x.astype("<f2")
        lost = numpy.isinf(y) & ~numpy.isinf(x)
        if lost.any():
            raise OverflowError(float(x[lost][0]))
        return y.tobytes()
    n = len(data) // 4
    values = struct.unpack("<%df" % n, data)
    try:
        return struct.pack("<%de" % n, *values)
    except OverflowError:
        inf = float("inf")
        raise OverflowError(next(v for v in values if 65520 <= abs(v) < inf))


def _f32_to_bf16(data):
    if numpy:
        u = numpy.frombuffer(data, "<u4")
        y = ((u + (0x7FFF + ((u >> 16) & 1)).astype("<u4")) >> 16).astype("<u2")
        nan = (u & 0x7FFFFFFF) > 0x7F800000
        if nan.any():
            y[nan] = (u[nan] >> 16) | 0x40
        return y.tobytes()
    # All lanes of a part in one long integer: the same sum, and no lane carries into the next
    # unless it holds a NaN.
    out = bytearray()
    for at in range(0, len(data), 1 << 16):
        part = bytes(data[at:at + (1 << 16)])
        ones = int.from_bytes(b"\1\0\0\0" * (len(part) // 4), "little")
        u = int.from_bytes(part, "little")
        if ((u & 0x7F800000 * ones) + 0x00800000 * ones) & 0x80000000 * ones:
            out += _f32_to_bf16_lanes(part)
            continue
        u += 0x7FFF * ones + ((u >> 16) & ones)
        rounded = u.to_bytes(len(part), "little")
        low = bytearray(len(part) // 2)
        low[0::2] = rounded[2::4]
        low[1::2] = rounded[3::4]
        out += low
    return out


def _f32_to_bf16_lanes(part):
    values = struct.unpack("<%dI" % (len(part) // 4), part)
    return struct.pack("<%dH" % len(values), *(
        (u >> 16) | 0x40 if u & 0x7FFFFFFF > 0x7F800000 else (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        for u in values))


# Bits of the exponent, all set in what is not finite; the values of the highest byte that has them.
EXPONENT = {"f32": 0x7F800000, "bf16": 0x7F80, "f16": 0x7C00}
TOP_BYTES = {"f32": b"\x7f\xff", "bf16": b"\x7f\xff", "f16": b"\x7c\x7d\x7e\x7f\xfc\xfd\xfe\xff"}


def not_finite(data, type_):
    """(index of the first NaN or infinity, how many there are); quantised types are f32 here."""
    type_ = type_ if type_ in EXPONENT else "f32"
    size, mask = ELEMENT_BYTES[type_], EXPONENT[type_]
    if not data:
        return 0, 0
    if numpy:                            # two maxima: of positive numbers, of negative ones
        bits, sign = numpy.frombuffer(data, "<u%d" % size), 1 << (8 * size - 1)
        if bits.max() < sign | mask and bits.view("<i%d" % size).max() < mask:
            return 0, 0
        bad = numpy.nonzero(bits & bits.dtype.type(mask) == mask)[0]
        return (int(bad[0]), len(bad)) if len(bad) else (0, 0)
    top = data[size - 1::size]           # sound weights have none of these bytes: a search in C
    if not any(byte in top for byte in TOP_BYTES[type_]):
        return 0, 0
    bits = struct.unpack("<%d%s" % (len(top), "I" if size == 4 else "H"), data)
    bad = [i for i, value in enumerate(bits) if value & mask == mask]
    return (bad[0], len(bad)) if bad else (0, 0)


def floats(data, source):
    """The values as Python floats, exactly."""
    data = convert(data, source, "f32")
    return struct.unpack("<%df" % (len(data) // 4), data)


# ---- Matrices ----

class Matrix:
    """[rows, cols] of one type.  read(start, count) gives whole rows as bytes of that type; keep is
    the type that a file keeps it in when nobody asks for another."""

    __slots__ = ("rows", "cols", "type", "keep", "source")

    def __init__(self, rows, cols, type_, source, keep=None):
        self.rows, self.cols, self.type, self.source = rows, cols, type_, source
        self.keep = keep or type_

    @property
    def row_bytes(self):
        return self.cols * ELEMENT_BYTES[self.type]

    def read(self, start, count):
        raise NotImplementedError

    def blocks(self, limit, multiple=1):
        """Ranges (start, count) of rows that take at most limit bytes as f32, but a multiple of so
        many rows at least."""
        step = max(1, limit // (4 * self.cols * multiple)) * multiple
        for start in range(0, self.rows, step):
            yield start, min(step, self.rows - start)

    def floats(self):
        return floats(self.read(0, self.rows), self.type)


class Stored(Matrix):
    """Rows as they lie in a file at offset.  store.read(offset, bytes) fetches them."""

    __slots__ = ("store", "offset")

    def __init__(self, rows, cols, type_, source, store, offset):
        Matrix.__init__(self, rows, cols, type_, source)
        self.store, self.offset = store, offset

    def read(self, start, count):
        return self.store.read(self.offset + start * self.row_bytes, count * self.row_bytes)


class Bytes(Matrix):
    """A small matrix that is in memory."""

    __slots__ = ("data",)

    def __init__(self, rows, cols, type_, source, data):
        Matrix.__init__(self, rows, cols, type_, source)
        self.data = data

    def read(self, start, count):
        return self.data[start * self.row_bytes:(start + count) * self.row_bytes]


def common(types):
    """The type that holds all of them."""
    return types[0] if len(set(types)) == 1 else "f32"


class Rows(Matrix):
    """Row ranges (matrix, start, count) of other matrices, one below the other.  Types may differ:
    then rows come as f32."""

    __slots__ = ("parts",)

    def __init__(self, parts, source):
        matrices = [m for m, _, _ in parts]
        Matrix.__init__(self, sum(count for _, _, count in parts), matrices[0].cols,
                        common([m.type for m in matrices]), source,
                        common([m.keep for m in matrices]))
        self.parts = parts

    def read(self, start, count):
        out, at = [], 0
        for m, first, n in self.parts:
            low, high = max(start, at), min(start + count, at + n)
            if low < high:
                out.append(convert(m.read(first + low - at, high - low), m.type, self.type))
            at += n
        return out[0] if len(out) == 1 else b"".join(out)


class Fp8(Matrix):
    """e4m3 bytes [rows, cols] (bits of store at offset) times a scale for each block, as f32."""

    __slots__ = ("store", "offset", "scale", "block")

    table = None                         # value of each of the 256 bytes

    def __init__(self, rows, cols, source, store, offset, scale, block):
        Matrix.__init__(self, rows, cols, "f32", source, "bf16")
        self.store, self.offset, self.scale, self.block = store, offset, scale, block

    def read(self, start, count):
        np = numpy
        if Fp8.table is None:
            Fp8.table = np.array([e4m3(byte) for byte in range(256)], "<f4")
        raw = self.store.read(self.offset + start * self.cols, count * self.cols)
        values = Fp8.table[np.frombuffer(raw, np.uint8)].reshape(count, self.cols)
        high, wide = self.block
        first, last = start // high, (start + count - 1) // high
        scale = self.scale.read(first, last - first + 1)
        scale = np.frombuffer(convert(scale, self.scale.type, "f32"), "<f4")
        scale = scale.reshape(last - first + 1, -1)
        by_row = scale[np.arange(start, start + count) // high - first]
        for i in range(by_row.shape[1]):
            values[:, i * wide:(i + 1) * wide] *= by_row[:, i:i + 1]
        return values.tobytes()


def e4m3(byte):
    """Value of an FP8 e4m3 number (4 exponent bits, bias 7, no infinities)."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    value = mantissa * 2.0 ** -9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if sign else value


class Lora(Matrix):
    """base + scale * (b a) in f32: the adapter merged.

    load() gives a [r, cols] and b [rows, r] as numpy arrays of f32."""

    __slots__ = ("base", "load", "scale")

    def __init__(self, base, load, scale):
        Matrix.__init__(self, base.rows, base.cols, "f32", base.source + " + LoRA", base.keep)
        self.base, self.load, self.scale = base, load, scale

    def read(self, start, count):
        a, b = self.load()
        rows = convert(self.base.read(start, count), self.base.type, "f32")
        x = numpy.frombuffer(rows, "<f4").reshape(count, self.cols)
        x = x + numpy.float32(self.scale) * (b[start:start + count] @ a)
        return x.astype("<f4").tobytes()
