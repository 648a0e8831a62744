"""mTLS as a foreign client speaks it: grpc.ssl_channel_credentials over the certificates of
deploy/make-test-certs, thin and direct, and who is not let in.
"""

import os
import shutil
import subprocess
import tempfile
import unittest

import grpc
import numpy as np

import client
import direct
import refusals
from client import Entry, health_pb, health_stubs
from cluster import Cluster

MAKE = os.path.join(client.HERE, "..", "..", "deploy", "make-test-certs")


class Transport(unittest.TestCase):
    N = 300  # tokens, in chunks on both workers

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="attn-certs-")
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        subprocess.run([MAKE, cls.folder], check=True)
        cls.cluster = Cluster(refusals.ATTND, 2, certs=cls.folder)
        cls.addClassCleanup(cls.cluster.stop)

    def read(self, name):
        with open(os.path.join(self.folder, name), "rb") as f:
            return f.read()

    def credentials(self):
        return grpc.ssl_channel_credentials(self.read("ca.pem"), self.read("client.key"),
                                            self.read("client.pem"))

    def test_thin_and_direct(self):
        thin = client.Client(self.cluster.address, credentials=self.credentials())
        cache = thin.open_cache("tls", **refusals.GEOMETRY)
        seq = thin.create(cache)
        rng = np.random.default_rng(3)
        q, k, v = (rng.standard_normal((self.N, h, d)).astype("f4").tobytes()
                   for h, d in ((4, 32), (2, 32), (2, 40)))
        road = direct.Direct(thin, streams=True)
        step = road.begin(cache, [Entry(seq, 0, self.N, self.N)], q_dtype=1, want_lse=True)
        self.assertEqual(len(step.shares), 2)
        answers = [[step.run(layer, q, k, v) for layer in range(2)]]
        step.commit()
        for steps in (thin.unary(), thin.stream()):
            step = thin.begin(steps, cache, [Entry(seq, self.N, self.N, 0)], q_dtype=1,
                              want_lse=True)
            answers.append([step.run(layer, q) for layer in range(2)])
            step.abort()
            steps.close()
        self.assertEqual(answers[0], answers[1])
        self.assertEqual(answers[0], answers[2])
        for worker in thin.status().workers:
            with client.connect(worker.address, self.credentials()) as channel:
                reply = health_stubs.HealthStub(channel).Check(health_pb.HealthCheckRequest(),
                                                               timeout=5)
                self.assertEqual(reply.status, reply.SERVING)
        road.close()
        thin.close()

    def test_others_stay_outside(self):
        for credentials in (None, grpc.ssl_channel_credentials(self.read("ca.pem"))):
            with self.subTest(tls=credentials is not None):
                with self.assertRaises(client.AttnError) as caught:
                    client.Client(self.cluster.address, credentials=credentials)
                self.assertEqual(caught.exception.code, grpc.StatusCode.UNAVAILABLE)
