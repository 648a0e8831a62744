"""Partials in Python: the merge, the fixed tree and the finish, as docs/wire.md has them.

A state is (e, l, A): e int32 and l float32 of shape [rows], A float32 [rows][d_v], meaning
sum exp(x) v = A * 2^e and sum exp(x) = l * 2^e. All arithmetic is float32, one rounding an
operation, so the results are the daemons' own bits.
"""

import math

import numpy as np

EMPTY = np.iinfo(np.int32).min  # the e of a row that saw nothing
ROOT = (32, 0)


def key(chunk):
    """The chunk's place in the tree: its lane (chunk % 64) in reversed bits, then the rest."""
    lane = int(f"{chunk % 64:06b}"[::-1], 2)
    return lane << 26 | chunk // 64


def frontier(mine, others):
    """The nodes that an owner of the chunks `mine` answers with, when `others` lie elsewhere.

    Of each chunk the highest node that holds none of the others, ascending in key."""
    if not others:
        return [ROOT] if mine else []
    other_keys = [key(c) for c in others]
    nodes = set()
    for own in map(key, mine):
        level = min((own ^ other).bit_length() for other in other_keys) - 1
        nodes.add((level, own >> level))
    return sorted(nodes, key=lambda node: node[1] << node[0])


def merge(one, two):
    """The state over the union of what two states saw."""
    (ea, la, aa), (eb, lb, ab) = one, two
    gap = ea.astype(np.int64) - eb
    keep_a = (lb == 0) | (la != 0) & (gap > 126)
    keep_b = (la == 0) | (lb != 0) & (gap < -126)
    sa, sb = power(np.where(keep_a | keep_b, 0, gap)), power(np.where(keep_a | keep_b, 0, -gap))
    with np.errstate(invalid="ignore"):  # an empty state's A may hold anything, and is not taken
        l = la * sa + lb * sb
        a = aa * sa[:, None] + ab * sb[:, None]
    pick = lambda mine, other, both, where: np.where(where(keep_a), mine,
                                                     np.where(where(keep_b), other, both))
    return (pick(ea, eb, np.maximum(ea, eb), lambda row: row), pick(la, lb, l, lambda row: row),
            pick(aa, ab, a, lambda row: row[:, None]))


def power(gap):
    """2^min(gap, 0), exactly: what scales a state whose exponent is `gap` above the other's."""
    return np.ldexp(np.float32(1), np.minimum(gap, 0).astype(np.int32)).astype(np.float32)


def root(nodes):
    """Merge {(level, index): state} of disjoint nodes up to the root of the tree."""
    nodes = dict(nodes)
    for level in range(32):
        for node in sorted(n for n in nodes if n[0] == level):
            parent = (level + 1, node[1] >> 1)
            state = nodes.pop(node)
            nodes[parent] = merge(nodes[parent], state) if parent in nodes else state
    return nodes[ROOT]


def log2(x):
    """log2 of positive float32 numbers by the operations that every attnd uses (docs/wire.md)."""
    small = x < np.float32(2 ** -126)
    x = np.where(small, x * np.float32(2 ** 24), x)
    above = x.view(np.uint32) - np.uint32(0x3F3504F3)  # bits of sqrt(1/2)
    k = np.where(small, -24, 0) + (above.view(np.int32) >> 23)
    m = ((above & np.uint32(0x007FFFFF)) + np.uint32(0x3F3504F3)).view(np.float32)
    one = np.float32(1)
    s = (m - one) / (m + one)
    z = s * s
    p = np.float32(0.43173612)
    for c in (0.57671437, 0.96179885, 2.88539008):
        p = p * z + np.float32(c)
    return k.astype(np.float32) + p * s


def exp_as_state(x):
    """e^x of a float32 number as (e, l) with l in [1, 2), by attnd's operations in float64."""
    y = float(np.float32(x)) * 1.4426950408889634
    if y > 1 << 30:
        return 1 << 30, np.float32(1)
    if y < -(1 << 30):
        return EMPTY, np.float32(0)
    e = math.floor(y)
    f = y - e
    t, r = (f if f <= 0.5 else f - 1.0) * 0.69314718055994530942, 1.0
    for i in range(13, 0, -1):
        r = 1.0 + r * (t * (1.0 / i))
    l = np.float32(r if f <= 0.5 else 2.0 * r)
    return (e, l) if l < 2 else (e + 1, np.float32(1))


def finish(state, sinks=()):
    """o [rows][d_v] and lse [rows], float32, of states over [queries][heads] flattened.

    Sinks join last, and only the denominator of o; the LSE is without them."""
    e, l, a = state
    seen = l != 0
    safe = np.where(seen, l, np.float32(1))
    lse = (e.astype(np.float32) + log2(safe)) * np.float32(0.693147180559945309)
    lse = np.where(seen, lse, np.float32("-inf"))
    scale = np.ones_like(l)
    if len(sinks):
        each = [exp_as_state(sink) for sink in sinks] * (len(e) // len(sinks))
        se = np.array([e for e, _ in each], np.int32)
        sl = np.array([l for _, l in each], np.float32)
        gap = e.astype(np.int64) - se
        power_of_gap = np.where(gap < -126, np.float32(0), power(np.maximum(gap, -126)))
        scale = np.where(sl == 0, scale, power_of_gap)
        none = np.zeros((len(e), 0), np.float32)
        _, safe, _ = merge((e, safe, none), (se, sl, none))
    o = np.where((seen & (scale != 0))[:, None], a * scale[:, None] / safe[:, None], np.float32(0))
    return o.astype(np.float32), lse
