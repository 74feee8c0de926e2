#!/usr/bin/env python3
"""Print the Unicode tables of qwen3next.h's tokenizer section as C.

usage: unicode_tables.py [--check HEADER]

--check compares the tables in HEADER with what would be printed: status 0 if they are equal,
1 if not.

Two Unicode versions meet in the published tokenizers, and the tables follow both:
  * classes (\\p{L}, \\p{M}, \\p{N}, \\w) are those of Unicode 16.0, which the regular expression
    engine of Hugging Face tokenizers 0.23 carries;
  * NFC is that of Unicode 9.0, at which the normaliser of that library has stood still.  Later
    characters neither compose nor move; LATER_THAN_9 names those for which it matters.
Unicode 16.0 data come from Python's unicodedata (Python 3.14), or from the package unicodedata2
16.0.0, which older Pythons can install.
"""
import sys

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

VERSION = "16.0.0"

# Encoded after Unicode 9.0 with a combining class or a canonical decomposition; between the ends
# of a range no older character has either.
LATER_THAN_9 = [
    (0x07FD, 0x07FD), (0x0897, 0x08D3), (0x09FE, 0x09FE), (0x0C3C, 0x0C3C), (0x0D3B, 0x0D3C),
    (0x0EBA, 0x0EBA), (0x1715, 0x1715), (0x1ABF, 0x1ACE), (0x1DF6, 0x1DFA), (0xA82C, 0xA82C),
    (0x105C9, 0x105E4), (0x10D24, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B),
    (0x11383, 0x113D0), (0x1145E, 0x1145E), (0x11839, 0x11A99), (0x11D42, 0x1612F),
    (0x16D68, 0x16FF1), (0x1E08F, 0x1E5EF)]

WHITE_SPACE = [0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B),
               0x2028, 0x2029, 0x202F, 0x205F, 0x3000]       # PropList.txt, stable by policy
HANGUL_V, HANGUL_T = range(0x1161, 0x1176), range(0x11A8, 0x11C3)
HANGUL_SYLLABLES = range(0xAC00, 0xD7A4)                     # composed by arithmetic, not tables
# \w is Alphabetic, \p{M}, \p{Nd}, \p{Pc} and Join_Control (Unicode Technical Standard 18, annex
# C): of the numbers not \p{No}, of the rest connectors, joiners and some symbols.
CLASS = {"L": 1, "M": 2, "N": 3}
SPACE, WORD, NUMBER_ALONE = 4, 5, 6
ALPHABETIC_SYMBOLS = [*range(0x24B6, 0x24EA), *range(0x1F130, 0x1F14A), *range(0x1F150, 0x1F16A),
                      *range(0x1F170, 0x1F18A)]              # Other_Alphabetic of PropList.txt
JOIN_CONTROL = [0x200C, 0x200D]
UNSTABLE = 8
COLUMNS = 93                                                 # characters of data a line


def later(cp):
    return any(first <= cp <= last for first, last in LATER_THAN_9)


def decompositions():
    """{cp: (first, second or 0, composes)}, one level deep, for every canonical mapping."""
    out = {}
    for cp in range(0x110000):
        if cp in HANGUL_SYLLABLES or later(cp):
            continue
        fields = unicodedata.decomposition(chr(cp)).split()
        if not fields or fields[0].startswith("<"):
            continue
        parts = [int(f, 16) for f in fields]
        composes = len(parts) == 2 and unicodedata.normalize("NFC", chr(cp)) == chr(cp)
        out[cp] = (parts[0], parts[1] if len(parts) == 2 else 0, composes)
    for cp, (first, second, _) in out.items():
        depth = 1
        while first in out:                # the C code follows the first part, at most 4 deep
            first, depth = out[first][0], depth + 1
        assert second not in out and depth <= 4, hex(cp)
    return out


def char_class(cp):
    category = unicodedata.category(chr(cp))
    if cp in WHITE_SPACE:
        return SPACE
    if category == "Pc" or cp in ALPHABETIC_SYMBOLS or cp in JOIN_CONTROL:
        return WORD
    return NUMBER_ALONE if category == "No" else CLASS.get(category[0], 0)


def spans(decomposed):
    """[(length, value)] over all code points: value = class, UNSTABLE, rank of combining class.

    UNSTABLE marks characters that NFC may change or join to what precedes them: everything but
    starters with NFC_Quick_Check = Yes.  Ranks keep the order of the combining classes, and order
    is all that normalisation asks of them."""
    combining = [0 if later(cp) else unicodedata.combining(chr(cp)) for cp in range(0x110000)]
    ranks = {c: i for i, c in enumerate(sorted(set(combining)))}
    assert len(ranks) <= 64
    seconds = {second for first, second, composes in decomposed.values() if composes}
    out = []
    for cp in range(0x110000):
        value = char_class(cp)
        excluded = cp in decomposed and not decomposed[cp][2]
        if combining[cp] or excluded or cp in seconds or cp in HANGUL_V or cp in HANGUL_T:
            value |= UNSTABLE
        value |= ranks[combining[cp]] << 4
        if out and out[-1][1] == value:
            out[-1][0] += 1
        else:
            out.append([1, value])
    return out


def packed(n):
    """n in printable characters, most significant digit first.  The last digit, in base 62, is
    '@' to '~' without the backslash; those before it, worth 1 to 28 in base 28, are '#' to '>'."""
    last = chr(64 + n % 62 + (n % 62 >= 28))
    n //= 62
    lead = ""
    while n:
        lead = chr(35 + (n - 1) % 28) + lead
        n = (n - 1) // 28
    return lead + last


def zigzag(n):
    return 2 * n if n >= 0 else -2 * n - 1


def table(name, text):
    lines = [text[i:i + COLUMNS] for i in range(0, len(text), COLUMNS)]
    body = "\n".join(f'    "{line}",' for line in lines)
    return f"static const char {name}[][{COLUMNS + 1}] = {{\n{body}\n}};\n"


def generate():
    decomposed = decompositions()
    char_spans = spans(decomposed)
    span_text = "".join(packed(length) + packed(value) for length, value in char_spans)
    text, last_cp, last_first = "", 0, 0
    for cp, (first, second, composes) in sorted(decomposed.items()):
        text += packed((cp - last_cp) * 2 + (second != 0 and not composes))
        text += packed(zigzag(first - last_first))
        text += packed(second - 0x2FF if second >= 0x300 else 0)
        assert second == 0 or second >= 0x300
        last_cp, last_first = cp, first
    return (f"#define Q3N__N_CHAR_SPANS     {len(char_spans)}\n"
            f"#define Q3N__N_DECOMPOSITIONS {len(decomposed)}\n\n"
            + table("q3n__packed_spans", span_text) + "\n"
            + table("q3n__packed_decompositions", text))


def main(args):
    if args[:1] not in ([], ["--check"]) or len(args) == 1 or len(args) > 2:
        sys.exit(__doc__.split("\n\n")[1])
    if unicodedata.unidata_version != VERSION:
        sys.exit(f"unicode_tables.py: this Python has Unicode {unicodedata.unidata_version}; "
                 f"use Python 3.14 or install unicodedata2=={VERSION}")
    text = generate()
    if not args:
        sys.stdout.write(text)
        return 0
    with open(args[1], encoding="utf-8") as f:
        same = text in f.read()
    print(f"{args[1]}: Unicode tables " + ("are up to date" if same else "differ"))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
