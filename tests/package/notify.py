"""Plays systemd: starts a coordinator and a worker with NOTIFY_SOCKET and listens.

    notify.py ATTND

A coordinator is ready when it serves. A worker is ready before it has found its coordinator, says
what it waits for, and later that it joined. Both tell that they stop.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

SECONDS = 30


class Daemon:
    def __init__(self, folder, *arguments):
        path = os.path.join(folder, arguments[1])
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.socket.settimeout(SECONDS)
        self.heard = ""
        self.process = subprocess.Popen(
            arguments, env={**os.environ, "NOTIFY_SOCKET": path}, stderr=subprocess.DEVNULL)

    def wait_for(self, pattern):
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.heard, re.M)):
            assert time.monotonic() < end, f"no {pattern} in {self.heard!r}"
            self.heard += self.socket.recv(4096).decode() + "\n"
        return found

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.wait_for(r"^STOPPING=1$")
        assert self.process.wait(SECONDS) == 0


def main(attnd):
    with tempfile.TemporaryDirectory() as folder:
        started = []
        try:
            probe = socket.create_server(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
            probe.close()
            worker = Daemon(folder, attnd, "worker", "--slab=16MiB", f"--coordinator={address}")
            started.append(worker)
            worker.wait_for(r"^READY=1$")
            worker.wait_for(rf"^STATUS=.*{re.escape(address)}.*")
            coordinator = Daemon(folder, attnd, "coordinator", f"--listen={address}")
            started.append(coordinator)
            coordinator.wait_for(r"^READY=1$")
            coordinator.wait_for(rf"^STATUS=serving on {re.escape(address)}$")
            worker.wait_for(rf"^STATUS=worker 1 of {re.escape(address)}$")
            assert "STOPPING" not in worker.heard + coordinator.heard
            coordinator.stop()
            worker.wait_for(r"^STATUS=waiting for .*\n(?s:.*)STATUS=worker 1 of (?s:.*)STATUS=waiting for ")
            worker.stop()
        finally:
            for daemon in started:
                daemon.process.kill()
                daemon.process.wait()


if __name__ == "__main__":
    main(sys.argv[1])
