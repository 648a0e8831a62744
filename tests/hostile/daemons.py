"""A coordinator and its workers as processes of their own, so that a test can give each its limits,
stop one, and look at what it holds: memory, descriptors, threads."""

import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time

ATTND = None  # set by test_hostile.py
SANITIZED = bool(os.environ.get("ATTN_SANITIZED"))
START_SECONDS = 20
STOP_SECONDS = 10

# What no log may hold, however wrong the requests were: errors are the daemon's own. A store whose
# numbers are wrong is logged as one (--check-store).
COMPLAINT = re.compile(r"level=error|runtime error:|Sanitizer|Assertion")


def wait_until(what, condition, seconds=START_SECONDS):
    """The first true value of condition(), or a failure that says what did not come."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not after {seconds} s")
        time.sleep(0.02)


class Daemon:
    """One attnd process. descriptors: its hard limit; stderr: instead of its log."""

    def __init__(self, folder, role, *options, descriptors=None, stderr=None):
        self.role, self.log = role, os.path.join(folder, f"{role}-{time.monotonic_ns()}.log")

        def limit():
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [ATTND, role, "--listen", "127.0.0.1:0", *options], stdout=log,
                stderr=log if stderr is None else stderr,
                preexec_fn=limit if descriptors else None)
        self.address = None
        if stderr is None:
            serving = re.compile(rf"event={role}\.serving .*address=(\S+)")
            self.address = wait_until(self.tail, lambda: self.find(serving))[1]

    def find(self, pattern):
        if self.process.poll() is not None:
            raise AssertionError(f"{self.role} ended with {self.process.returncode}\n{self.tail()}")
        with open(self.log) as f:
            return re.search(pattern, f.read())

    def tail(self):
        with open(self.log) as f:
            return "".join(f.readlines()[-40:])

    def alive(self):
        return self.process.poll() is None

    def rss(self):
        """MiB of memory in use, but for what is shared with clients: slabs have a size, and keep
        what was once used of it (--ucx-memory)."""
        with open(f"/proc/{self.process.pid}/status") as f:
            text = f.read()
        return sum(int(re.search(rf"Rss{kind}:\s+(\d+)", text)[1]) for kind in ("Anon", "File")) / 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def listening_port(self):
        """Of a daemon whose log cannot be read: from the kernel."""
        inodes = set()
        for name in os.listdir(f"/proc/{self.process.pid}/fd"):
            try:
                inodes.add(os.readlink(f"/proc/{self.process.pid}/fd/{name}"))
            except OSError:
                pass
        for table in ("tcp", "tcp6"):
            with open(f"/proc/{self.process.pid}/net/{table}") as f:
                for line in f.readlines()[1:]:
                    cells = line.split()
                    if cells[3] == "0A" and f"socket:[{cells[9]}]" in inodes:
                        return int(cells[1].rsplit(":", 1)[1], 16)
        return None

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self):
        """SIGTERM. It must drain and end well, having complained of nothing; returns what is wrong."""
        if self.alive():
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            status = "killed, since SIGTERM did not end it"
            self.process.kill()
            self.process.wait()
        with open(self.log) as f:
            complaints = [line for line in f if COMPLAINT.search(line)]
        if status != 0 or complaints:
            return f"{self.role} ended with {status}\n{''.join(complaints)}---\n{self.tail()}"
        return ""


class Daemons:
    """A coordinator and n workers, all joined."""

    def __init__(self, n=2, coordinator=(), worker=(), **limits):
        self.folder = tempfile.mkdtemp(prefix="attn-hostile-")
        self.all = []
        try:
            self.coordinator = Daemon(self.folder, "coordinator", *coordinator, **limits)
            self.all.append(self.coordinator)
            self.address = self.coordinator.address
            self.workers = []
            for _ in range(n):
                self.workers.append(Daemon(self.folder, "worker", "--coordinator", self.address,
                                           "--slab", "64MiB", "--check-store", *worker, **limits))
                self.all.append(self.workers[-1])
            joined = re.compile(r"event=member.joined[^$]*" * n)
            wait_until("all workers", lambda: self.coordinator.find(joined))
        except BaseException:
            for daemon in self.all:
                daemon.process.kill()
                daemon.process.wait()
            raise

    def worker_at(self, address):
        return next(w for w in self.workers if w.address == address)

    def stop(self):
        wrong = "".join([daemon.stop() for daemon in reversed(self.all)])
        shutil.rmtree(self.folder, ignore_errors=True)
        if wrong:
            raise AssertionError(wrong)
