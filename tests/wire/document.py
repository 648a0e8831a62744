"""docs/wire.md stays true: its hex is what protobuf makes, its table what base/status.c has."""

import os
import re
import unittest

import states
from client import HERE, pb

ROOT = os.path.join(HERE, "..", "..")


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as f:
        return f.read()


class Document(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.text = read("docs", "wire.md")
        cls.hex = {name: cls.bytes_of(body)
                   for name, body in re.findall(r"```hex (\w+)\n(.*?)```", cls.text, re.S)}

    @staticmethod
    def bytes_of(body):
        """The pairs of hex digits that each line begins with."""
        pairs = [re.match(r"(?:[0-9a-f]{2} )+", line).group() for line in body.splitlines()]
        return bytes.fromhex("".join(pairs))

    def test_begin(self):
        want = pb.BeginStepRequest(cache_id=1, q_dtype=pb.DTYPE_BF16, o_dtype=pb.DTYPE_F32,
                                   want_lse=True, timeout_ms=5000)
        want.entries.add(seq=0x100000007, base_position=300, n_q=1, n_new=1)
        self.assertEqual(self.hex["begin"].hex(" "), want.SerializeToString().hex(" "))

    def test_run(self):
        want = pb.StepRequest(run=pb.RunRequest(step_id=9, layer=2, total=192), data=bytes(192))
        self.assertEqual((self.hex["run"] + bytes(192)).hex(" "), want.SerializeToString().hex(" "))

    def test_worker_begin(self):
        want = pb.WorkerBeginRequest(epoch=5, cache_id=1, step_id=0x1234, q_dtype=pb.DTYPE_BF16,
                                     o_dtype=pb.DTYPE_F32, want_lse=True, timeout_ms=5000)
        entry = want.entries.add(seq=0x100000007, base_position=300, n_q=1, n_new=1)
        entry.chunks.add(number=1, chunk=12, generation=1, length=44, n_new=1)
        (level, index), = states.frontier([1], [0])
        entry.nodes.add(level=level, index=index)
        self.assertEqual(self.hex["worker_begin"].hex(" "), want.SerializeToString().hex(" "))

    def test_worker_replies(self):
        self.assertEqual(self.hex["worker_begin_reply"],
                         pb.WorkerBeginReply(states=1).SerializeToString())
        want = pb.StepReply(run=pb.RunReply(step_id=0x1234, layer=2, total=136, compute_ns=120000),
                            data=bytes(136))
        self.assertEqual(self.hex["worker_run_reply"] + bytes(136), want.SerializeToString())

    def test_busy(self):
        reply = pb.StepReply.FromString(self.hex["busy"])
        self.assertEqual(reply.status.code, -24)
        self.assertEqual(reply.SerializeToString(), self.hex["busy"])

    def test_table_of_errors(self):
        numbers = dict(re.findall(r"ATTN_ERR_(\w+)\s*= (-\d+)", read("base", "attn_types.h")))
        codes = dict(re.findall(r"\{ATTN_ERR_(\w+), (\d+),", read("base", "status.c")))
        rows = re.findall(r"^\| (-\d+) \| (\w+) \| (\d+) ", self.text, re.M)
        self.assertGreater(len(rows), 15)
        self.assertEqual({name: (number, codes[name]) for name, number in numbers.items()},
                         {name: (number, code) for number, name, code in rows})
