"""Peers that send without a pause what no window holds back. They cost the CPU that it takes to read
it; everybody else is served meanwhile, no worker is lost, and memory stays where it was."""

import socket
import time

from daemons import SANITIZED
from flood import GREETING, KINDS, PING, UNKNOWN, Flood, frame
from hostile import LIMITS, Hostile

SLOW = 4 if SANITIZED else 1   # an honest step may take so many times as long as otherwise
LOST = 2.0                     # seconds without a heartbeat after which a worker is lost
GROWTH = 64                    # MiB that a flooded daemon may use beyond what it did
ROUND = (1 << 31) + (1 << 27)  # bytes: C core counts what it reads in one go in an int


class Floods(Hostile):

    COORDINATOR = ["--lost-ms", str(int(LOST * 1000)), "--lease-ms", "600s", *LIMITS]

    def alive(self):
        return sorted(w.id for w in self.thin.status().workers if w.alive)

    def meanwhile(self, floods, condition, seconds):
        """Honest steps until the condition holds, for at most some seconds; the slowest."""
        slowest, grown, end = 0, 0, time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), end, f"{[f.count() for f in floods]} bytes were taken")
            slowest = max(slowest, self.good(timeout_ms=4000))
            grown = max(grown, *[d.rss() - self.before[d][0] for d in self.daemons.all])
            time.sleep(0.01)
        return slowest, grown

    def flood(self, kind, daemons, condition, seconds):
        workers = self.alive()
        floods = [Flood(daemon, kind) for daemon in daemons]
        try:
            slowest, grown = self.meanwhile(floods, lambda: condition(floods), seconds)
            sent, ended = (sum(f.count()[i] for f in floods) for i in (1, 2))
        finally:
            for flood in floods:
                flood.stop()
        print(f"  {kind}: {sent >> 20} MiB, {ended}"
              f" times hung up on; slowest honest step {slowest * 1000:.0f} ms; {grown:.0f} MiB more",
              flush=True)
        self.assertLess(slowest, SLOW * 1.0)
        if not SANITIZED:
            self.assertLess(grown, GROWTH)
        self.assertEqual(self.alive(), workers, "a worker was lost")

    def test_frames_that_no_window_holds_back(self):
        """On the coordinator and a worker at once."""
        for kind in KINDS:
            end = time.monotonic() + 1
            self.flood(kind, [self.daemons.coordinator, self.daemons.workers[0]],
                       lambda floods: time.monotonic() > end, 10)

    def test_longer_than_a_heartbeat_may_take(self):
        """Nothing that lasts makes it worse, and what was read in one go is counted for itself: after
        2 GiB without a pause C core would have asked for a buffer of a negative size."""
        end = time.monotonic() + 5 * LOST
        self.flood("headers without end", [self.daemons.coordinator],
                   lambda floods: time.monotonic() > end and floods[0].count()[0] > ROUND, 60)

    def test_pings_in_one_go(self):
        """Memory of each is not a matter of how many came with it. What comes before has buffers grow."""
        for _ in range(5):
            other = socket.create_connection(self.address.split(":"))
            self.addCleanup(other.close)
            other.sendall(GREETING + frame(UNKNOWN, payload=bytes(16000)) * 5000)
            time.sleep(0.2)
            try:
                for _ in range(2):
                    other.sendall(frame(PING, payload=bytes(8)) * 100000)
            except OSError:  # hung up on
                pass
            peak = max(self.daemons.coordinator.rss() for _ in range(20) if not time.sleep(0.02))
            self.assertLess(self.good(), SLOW * 1.0)
            if not SANITIZED:
                self.assertLess(peak - self.before[self.daemons.coordinator][0], GROWTH)

    def test_many_at_once(self):
        end = time.monotonic() + 2 * LOST
        self.flood("headers without end", [self.daemons.coordinator] * 8 + [self.daemons.workers[0]] * 8,
                   lambda floods: time.monotonic() > end, 20)
