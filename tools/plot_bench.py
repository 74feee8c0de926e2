#!/usr/bin/env python3
"""Draw what q3n bench --json measured, as one SVG file.

usage: plot_bench.py FILE.json ... [-o bench.svg] [--title TEXT]

Three charts, one line a file: decoded tokens per second by threads (at the least depth), by depth
(with the most threads), and prefill by threads (the longest prompt).  Bars at a point go from the
least to the most of its repetitions.  make bench writes such files into build/bench.

SVG is text, so this writes it itself: no library to install, the same bytes for the same numbers,
and any browser shows it."""
import argparse
import json
import math
import os
import sys
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 420, 320                           # of one chart
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 40, 46          # margins inside it
LEGEND_ROW = 18
# Okabe and Ito's colours: told apart with any kind of colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]


def fail(message):
    sys.exit("plot_bench.py: error: %s" % message)


# ---- Series ----

def load(path):
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        rows = result["prefill"] + result["decode"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        fail("%s is no output of q3n bench --json (%s)" % (path, e))
    if not rows:
        fail("%s has no measurements" % path)
    return result


def point(row, key):
    y = row["tok_s"]
    return row[key], y, row.get("tok_s_min", y), row.get("tok_s_max", y)


def series(result, kind, key):
    """Points (x, median, least, most) of the chart of kind by key."""
    rows, other = result[kind], "n" if kind == "prefill" else "depth"
    if not rows:
        return []
    if key == "threads":
        fixed = max(r[other] for r in rows) if kind == "prefill" else min(r[other] for r in rows)
        rows = [r for r in rows if r[other] == fixed]
    else:
        most = max(r["threads"] for r in rows)
        rows = [r for r in rows if r["threads"] == most]
    return sorted(point(r, key) for r in rows)


# ---- Drawing ----

def nice_step(top, count):
    """A step of 1, 2 or 5 times a power of ten that goes into top about count times."""
    raw = max(top, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


def number(x):
    return "%d" % x if x == int(x) else "%g" % x


def text(x, y, words, anchor="middle", size=12, extra=""):
    return ('<text x="%.1f" y="%.1f" text-anchor="%s" font-size="%d"%s>%s</text>'
            % (x, y, anchor, size, extra, escape(words)))


class Chart:
    """One chart at (x0, 0): places its points evenly by order of x, counts y from 0."""

    def __init__(self, x0, lines):
        self.x0, self.lines = x0, lines
        self.xs = sorted({p[0] for line in lines for p in line})
        top = max((p[3] for line in lines for p in line), default=1.0)
        self.step = nice_step(top, 5)
        self.top = math.ceil(top / self.step * 0.9999) * self.step

    def x(self, value):
        width = WIDTH - LEFT - RIGHT
        return self.x0 + LEFT + width * (self.xs.index(value) + 0.5) / len(self.xs)

    def y(self, value):
        return TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - value / self.top)

    def axes(self, title, label):
        left, right = self.x0 + LEFT, self.x0 + WIDTH - RIGHT
        out = [text((left + right) / 2, TOP - 18, title, size=14),
               text((left + right) / 2, HEIGHT - 8, label)]
        for i in range(int(round(self.top / self.step)) + 1):
            y = self.y(i * self.step)
            out.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#ddd"/>'
                       % (left, y, right, y))
            out.append(text(left - 6, y + 4, number(i * self.step), "end", 11))
        out += [text(self.x(x), HEIGHT - BOTTOM + 16, number(x), size=11) for x in self.xs]
        return out

    def line(self, points, colour):
        path = " ".join("%.1f,%.1f" % (self.x(p[0]), self.y(p[1])) for p in points)
        out = ['<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>' % (path, colour)]
        for x, median, least, most in points:
            out.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>'
                       % (self.x(x), self.y(least), self.x(x), self.y(most), colour))
            out.append('<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>'
                       % (self.x(x), self.y(median), colour))
        return out


CHARTS = [("decode", "threads", "decode, tokens/s", "threads"),
          ("decode", "depth", "decode, tokens/s", "tokens before"),
          ("prefill", "threads", "prefill, tokens/s", "threads")]


def draw(results, labels, title):
    """The SVG text."""
    body, x0 = [], 0
    for kind, key, heading, axis in CHARTS:
        lines = [series(r, kind, key) for r in results]
        if not any(lines):
            continue
        chart = Chart(x0, lines)
        body += chart.axes(heading, axis)
        for i, points in enumerate(lines):
            if points:
                body += chart.line(points, COLOURS[i % len(COLOURS)])
        x0 += WIDTH
    height = HEIGHT + 10 + LEGEND_ROW * (len(labels) + bool(title))
    y = HEIGHT + LEGEND_ROW
    if title:
        body.append(text(LEFT, y, title, "start"))
        y += LEGEND_ROW
    for i, label in enumerate(labels):
        colour = COLOURS[i % len(COLOURS)]
        body.append('<rect x="%d" y="%d" width="22" height="4" fill="%s"/>' % (LEFT, y - 6, colour))
        body.append(text(LEFT + 30, y, label, "start"))
        y += LEGEND_ROW
    head = ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" '
            'viewBox="0 0 %d %d" font-family="sans-serif">' % (x0, height, x0, height))
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>'] + body
                     + ["</svg>", ""])


def machine(results):
    """CPU and bandwidth of the first file that tells them."""
    for r in results:
        if "cpu" in r:
            return "%s, %s; reading %.1f GB/s" % (r["cpu"], r["isa"], r["read_gb_s"])
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument("-o", "--output", default="bench.svg")
    parser.add_argument("--title", help="below the charts (CPU and read bandwidth)")
    args = parser.parse_args()
    if not args.output.lower().endswith(".svg"):
        fail("%s: only SVG is written" % args.output)
    results = [load(path) for path in args.files]
    labels = [os.path.splitext(os.path.basename(path))[0] for path in args.files]
    picture = draw(results, labels, machine(results) if args.title is None else args.title)
    try:
        with open(args.output, "w", encoding="utf-8") as f:
            f.write(picture)
    except OSError as e:
        fail("%s: %s" % (args.output, e.strerror))


if __name__ == "__main__":
    main()
