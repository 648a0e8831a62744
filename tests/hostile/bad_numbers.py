"""NaN, infinities and what lies near them, in q, k and v, as docs/numerics.md has it: by each dtype
and each road of the wire. bad_numbers_test.c asks libattn the same."""

import itertools

import numpy as np

import client
import direct
import oracle
from client import Entry, pb
from hostile import CONFLICT, GEOMETRY, INCOMPLETE, NUMERIC, Hostile
from oracle import BF16, F16, F32

DTYPES = {"f32": F32, "f16": F16, "bf16": BF16}

# Bits of each dtype: what is refused in k and v, and what is not.
BITS = {F32: dict(nan=0x7fc00000, negative_nan=0xffc00000, signalling_nan=0x7f800001, inf=0x7f800000,
                  negative_inf=0xff800000, largest=0x7f7fffff, subnormal=1, minus_zero=0x80000000),
        F16: dict(nan=0x7e00, negative_nan=0xfe00, signalling_nan=0x7c01, inf=0x7c00,
                  negative_inf=0xfc00, largest=0x7bff, subnormal=1, minus_zero=0x8000),
        BF16: dict(nan=0x7fc0, negative_nan=0xffc0, signalling_nan=0x7f81, inf=0x7f80,
                   negative_inf=0xff80, largest=0x7f7f, subnormal=1, minus_zero=0x8000)}
BAD = ("nan", "negative_nan", "signalling_nan", "inf", "negative_inf")


def put(data, dtype, at, name):
    """The tensor with element `at` replaced by the bits of that name."""
    size = oracle.SIZE[dtype]
    return (data[:at * size] + BITS[dtype][name].to_bytes(size, "little")
            + data[(at + 1) * size:])


class Numbers(Hostile):
    numbers = itertools.count()
    ROWS = 300  # over two chunks, and so over two workers

    def roads(self):
        """begin() of thin clients, by unary calls and streams, and of direct ones."""
        for steps in (self.thin.unary(), self.thin.stream()):
            yield lambda *a, s=steps, **o: self.thin.begin(s, *a, **o)
            steps.close()
        for streams in (False, True):
            road = direct.Direct(self.thin, streams)
            yield road.begin
            road.close()

    def cases(self, **geometry):
        """(begin, cache, dtype): each dtype by each road, in a cache of its own."""
        for name, dtype in DTYPES.items():
            cache = self.thin.open_cache(f"{self.id()}-{name}-{next(self.numbers)}"[-120:], **dict(
                GEOMETRY, kv_dtype=dtype, layers=1, **geometry))
            for begin in self.roads():
                yield begin, cache, dtype
            self.thin.close_cache(cache)

    def data(self, dtype, n_q, n_new):
        return [oracle.encode(self.rng.standard_normal(shape), dtype)
                for shape in ((n_q, 4, 32), (n_new, 2, 32), (n_new, 2, 40))]

    def filled(self, begin, cache, dtype):
        """A sequence of ROWS tokens whose answers are known: v is 1 everywhere."""
        seq = self.thin.create(cache)
        _, k, _ = self.data(dtype, 0, self.ROWS)
        step = begin(cache, [Entry(seq, 0, 0, self.ROWS)], q_dtype=dtype)
        step.run(0, b"", k, oracle.encode(np.ones((self.ROWS, 2, 40)), dtype))
        step.commit()
        return seq

    def test_bad_k_and_v_are_refused_and_nothing_is_stored(self):
        """In the first, a middle and the last row; the layer can be sent again, and must be."""
        for begin, cache, dtype in self.cases():
            seq, n = self.thin.create(cache), self.ROWS
            q, k, v = self.data(dtype, n, n)
            places = [("k", 64, 0), ("k", 64, 299 * 64 + 63), ("v", 80, 150 * 80 + 79), ("v", 80, 0)]
            for (name, row, at), bad in zip(itertools.cycle(places), BAD):
                wrong = {"k": k, "v": v}
                wrong[name] = put(wrong[name], dtype, at, bad)
                step = begin(cache, [Entry(seq, 0, n, n)], q_dtype=dtype)
                self.refused(NUMERIC, f"{name} token NaN layer",
                             lambda: step.run(0, q, wrong["k"], wrong["v"]))
                if isinstance(step, client.Step):  # each worker commits what it stored
                    self.refused(INCOMPLETE, "layer 0", step.commit)
                first = step.run(0, q, k, v)
                if bad != BAD[-1]:
                    step.abort()
            # Once stored, a run is compared with what is there: a NaN is another value.
            self.refused(CONFLICT, "differ", lambda: step.run(0, q, put(k, dtype, 5, "nan"), v))
            self.assertEqual(step.run(0, q, k, v), first)
            step.commit()
            self.thin.free(cache, seq)

    def test_signs_of_zero_and_subnormals_are_kept_bit_for_bit(self):
        """v comes back as it was where one token is seen, subnormals unflushed; -0 as the sum that it
        is, +0. Stored are all bits."""
        for begin, cache, dtype in self.cases(layer_table=[pb.Layer(window=1)]):
            seq = self.thin.create(cache)
            q, k, v = self.data(dtype, 1, 1)
            for at, name in enumerate(("minus_zero", "subnormal", "largest")):
                v = put(v, dtype, at, name)
                k = put(k, dtype, at, name if name != "largest" else "minus_zero")
            step = begin(cache, [Entry(seq, 0, 1, 1)], q_dtype=dtype, o_dtype=dtype)
            o, _ = step.run(0, q, k, v)
            size = oracle.SIZE[dtype]
            want = bytes(size) + v[size:40 * size]
            if dtype == F32:  # O = A / l rounds; with 16 bits it is exact
                gap = np.frombuffer(o[:160], "<i4") - np.frombuffer(want, "<i4")
                self.assertLessEqual(np.abs(gap).max(), 2)
            else:
                self.assertEqual(o[:40 * size], want)
            # The sign of a zero is part of its bits: another one is another value.
            self.refused(CONFLICT, "differ", lambda: step.run(
                0, q, b"\0" * size + k[size:], v))
            step.commit()
            self.thin.free(cache, seq)

    def test_bad_q_is_refused_where_it_sees_a_token(self):
        """Naming entry, query and head; dense and sparse, one row of many; then asked again."""
        for begin, cache, dtype in self.cases():
            seq = self.filled(begin, cache, dtype)
            for sparse, bad in (((), "nan"), ((), "inf"), ([[0, 3]], "negative_nan"),
                                ([[0], [2]], "negative_inf")):
                step = begin(cache, [Entry(seq, self.ROWS, 3, 0, sparse)], q_dtype=dtype)
                q, _, _ = self.data(dtype, 3, 0)
                wrong = put(q, dtype, 2 * 128 + 3 * 32 + 31, bad)  # query 2, head 3, its last
                self.refused(NUMERIC, "entry query 2, head 3: layer",
                             lambda: step.run(0, wrong, no_kv=True))
                o, _ = step.run(0, q, no_kv=True)
                ones = oracle.decode(o, dtype, (3, 4, 40))
                self.assertLess(np.abs(ones - 1).max(), oracle.TOLERANCE[dtype])
                step.abort()
            self.thin.free(cache, seq)

    def test_q_that_sees_nothing_may_hold_anything(self):
        """An empty list and no new tokens: O is 0 and the LSE -inf, whatever q is."""
        for begin, cache, dtype in self.cases():
            seq = self.filled(begin, cache, dtype)
            step = begin(cache, [Entry(seq, self.ROWS, 2, 0, [[]])], q_dtype=dtype, want_lse=True)
            q = put(self.data(dtype, 2, 0)[0], dtype, 7, "nan")
            o, lse = step.run(0, q, no_kv=True)
            self.assertEqual(o, bytes(len(o)))
            self.assertTrue(np.isneginf(np.frombuffer(lse, "<f4")).all())
            step.abort()
            self.thin.free(cache, seq)

    def test_masked_tokens_do_not_matter(self):
        """The largest finite numbers in pages and positions that a query does not see."""
        for begin, cache, dtype in self.cases():
            seq, n = self.thin.create(cache), self.ROWS
            q, k, v = self.data(dtype, 2, n)
            size = oracle.SIZE[dtype]
            for at in range(64 * 16, 64 * 32):  # page 1
                k = put(k, dtype, at, "largest")
            for at in range(80 * 16, 80 * 32):
                v = put(v, dtype, at, "largest")
            step = begin(cache, [Entry(seq, 0, 0, n)], q_dtype=dtype)
            step.run(0, b"", k, v)
            step.commit()
            step = begin(cache, [Entry(seq, n, 2, 0, [[0, 2, 17]])], q_dtype=dtype)
            o, _ = step.run(0, q, no_kv=True)
            numbers = [oracle.decode(t, dtype, s) for t, s in
                       ((q, (2, 4, 32)), (k, (n, 2, 32)), (v, (n, 2, 40)))]
            seen = np.abs(numbers[2][32:]).max()
            want_o, want_lse, kappa = oracle.attend(*numbers, oracle.Layer(), n, [[0, 2, 17]], 16, 256)
            np.nan_to_num(kappa, copy=False, posinf=0)
            error = np.abs(oracle.decode(o, dtype, (2, 4, 40)) - want_o).max()
            self.assertLess(error, oracle.TOLERANCE[dtype] * max(seen, 1) * 4)
            step.abort()
            self.assertEqual(len(v), n * 80 * size)
            self.thin.free(cache, seq)

    def test_logits_out_of_range(self):
        """|y| above 2^30 is refused; with a soft cap it is what the cap makes of it, but a NaN."""
        big = np.full((1, 4, 32), 3e4, "f4")
        for begin, cache, dtype in self.cases(layer_table=[pb.Layer(scale=1e6)]):
            seq = self.thin.create(cache)
            step = begin(cache, [Entry(seq, 0, 1, 1)], q_dtype=dtype)
            self.refused(NUMERIC, "2^30", lambda: step.run(0, *[
                oracle.encode(x, dtype) for x in (big, big[:, :2], np.ones((1, 2, 40)))]))
            step.abort()
            self.thin.free(cache, seq)
        for begin, cache, dtype in self.cases(layer_table=[pb.Layer(softcap=20, scale=1e6)]):
            seq = self.thin.create(cache)
            step = begin(cache, [Entry(seq, 0, 1, 1)], q_dtype=dtype, want_lse=True)
            q = oracle.encode(big, dtype)
            _, lse = step.run(0, q, oracle.encode(big[:, :2], dtype),
                              oracle.encode(np.ones((1, 2, 40)), dtype))
            self.assertLess(np.abs(np.frombuffer(lse, "<f4") - 20).max(), 1e-4)
            _, lse = step.run(0, put(q, dtype, 0, "inf"), no_kv=True)
            self.assertLess(np.abs(np.frombuffer(lse, "<f4") - 20).max(), 1e-4)
            self.refused(NUMERIC, "NaN", lambda: step.run(0, put(q, dtype, 0, "nan"), no_kv=True))
            step.abort()
            self.thin.free(cache, seq)

    def test_conversions_to_a_narrower_output(self):
        """Beyond f16's 65504 O is an infinity, as IEEE 754 rounds it; bf16 keeps f32's range."""
        cache = self.thin.open_cache("narrow", **dict(GEOMETRY, layers=1))
        for begin in self.roads():
            seq = self.thin.create(cache)
            q, k, _ = self.data(F32, 1, 1)
            v = np.zeros((1, 2, 40), "f4")
            v[..., :6] = [65504, 65519, 65520, -1e30, 1e-8, 3e38]
            for dtype, want in ((F16, [65504, 65504, np.inf, -np.inf, 0, np.inf]),
                                (BF16, [65536, 65536, 65536, -1e30, 1e-8, 3e38])):
                step = begin(cache, [Entry(seq, 0, 1, 1)], q_dtype=F32, o_dtype=dtype)
                o, _ = step.run(0, q, k, v.tobytes())
                np.testing.assert_allclose(oracle.decode(o, dtype, (4, 40))[0, :6], want, rtol=4e-3)
                step.abort()
            self.thin.free(cache, seq)
        self.thin.close_cache(cache)
