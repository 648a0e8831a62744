"""Real processes: `attnd dev` on a free port, and its end."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

START_SECONDS = 20
STOP_SECONDS = 10

# What no log may hold, however wrong the requests were: errors are the daemon's own.
COMPLAINT = re.compile(r"level=error|runtime error:|Sanitizer|Assertion")


class Cluster:
    """A coordinator and its workers; address is the coordinator's HOST:PORT. certs: a
    folder of deploy/make-test-certs, for mTLS."""

    def __init__(self, attnd, workers, slab="64MiB", certs=None):
        self.folder, self.killed = tempfile.mkdtemp(prefix="attn-cluster-"), False
        ready = os.path.join(self.folder, "ready")
        self.log = os.path.join(self.folder, "log")
        tls = [] if certs is None else ["--tls-cert", f"{certs}/server.pem", "--tls-key",
                                        f"{certs}/server.key", "--tls-ca", f"{certs}/ca.pem"]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [attnd, "dev", "--workers", str(workers), "--listen", "127.0.0.1:0",
                 "--ready-file", ready, "--slab", slab, *tls], stdout=log, stderr=log)
        try:
            self.address = self.wait_for(ready)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def wait_for(self, ready):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"attnd ended with {self.process.returncode}:\n{self.tail()}")
            if os.path.exists(ready):
                with open(ready) as f:
                    text = f.read()
                if text.endswith("\n"):
                    return text.split()[0]
            time.sleep(0.02)
        raise RuntimeError(f"attnd is not ready after {START_SECONDS} s:\n{self.tail()}")

    def tail(self):
        with open(self.log) as f:
            return "".join(f.readlines()[-40:])

    def kill_worker(self, address):
        """SIGKILL to the worker that listens there. `attnd dev` does not replace it."""
        rows = []
        for table in ("tcp", "tcp6"):
            with open(f"/proc/net/{table}") as f:
                rows += [line.split() for line in f.readlines()[1:]]
        inode = next(row[9] for row in rows if row[3] == "0A" and  # it listens
                     int(row[1].split(":")[1], 16) == int(address.rsplit(":", 1)[1]))
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with open(children) as f:
            pid = next(pid for pid in f.read().split() if f"socket:[{inode}]" in (
                os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")))
        self.killed = True
        os.kill(int(pid), signal.SIGKILL)

    def stop(self):
        """SIGTERM. Everything must drain and end, having complained of nothing meanwhile."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = "killed, since SIGTERM did not end it"
        tail = self.tail()
        with open(self.log) as f:
            complaints = [line for line in f if COMPLAINT.search(line) and
                          not (self.killed and "event=dev.child_ended" in line)]
        shutil.rmtree(self.folder, ignore_errors=True)
        if (status != 0 and not self.killed) or complaints:
            raise AssertionError(f"attnd ended with {status}\n{''.join(complaints)}---\n{tail}")
