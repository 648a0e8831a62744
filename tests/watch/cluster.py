"""Clusters of real processes, and what their metrics' ports tell. Python's own library alone."""
import atexit
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

TYPES = {"counter", "gauge", "histogram"}


def wrong(*what):
    print("WRONG:", *what)
    for daemon in Daemon.all:
        print("----", " ".join(daemon.argv[1:]))
        print(open(daemon.log).read())
    sys.exit(1)


def expect(condition, *what):
    if not condition:
        wrong(*what)


def until(condition, what, seconds=10):
    """Wait until condition() is something, and return that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    wrong("not within", seconds, "s:", what)


class Daemon:
    all = []
    folder = tempfile.TemporaryDirectory()

    def __init__(self, *argv, env=None):
        self.argv = [str(word) for word in argv]
        self.log = os.path.join(self.folder.name, "%d.log" % len(self.all))
        self.all.append(self)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log,
                                            env={**os.environ, **(env or {})})

    def field(self, event, name):
        """A field of the first line that logs the event."""
        def look():
            if self.process.poll() is not None:
                wrong("ended with", self.process.returncode, *self.argv)
            found = re.search(r"event=%s .*?\b%s=(\S+)" % (re.escape(event), name),
                              open(self.log).read())
            return found and found[1]
        return until(look, "%s of %s" % (name, event), 20)

    def signal(self, number):
        self.process.send_signal(number)

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@atexit.register
def end_all():
    for daemon in Daemon.all:
        daemon.end()


class Cluster:
    def __init__(self, attnd, workers=2, slab="64MiB", coordinator=(), worker=(), envs=None):
        self.attnd = attnd
        self.coordinator = Daemon(
            attnd, "coordinator", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
            "--lost-ms", 4000, "--heartbeat-ms", 100, *coordinator)
        self.address = self.coordinator.field("coordinator.serving", "address")
        self.url = self.coordinator.field("monitor.serving", "url")
        self.workers = [
            Daemon(attnd, "worker", "--coordinator", self.address, "--metrics-listen",
                   "127.0.0.1:0", "--slab", slab, "--threads", 1, "--name", "w%d" % i, *worker,
                   env=(envs or {}).get(i)) for i in range(workers)]
        for one in self.workers:
            one.address = one.field("worker.joined", "worker") and \
                one.field("worker.serving", "address")
            one.url = one.field("monitor.serving", "url")


def get(url, context=None, method="GET", data=None):
    """Status, headers, text."""
    request = urllib.request.Request(url, method=method, data=data)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def tls_context(ca, certificate=None, key=None):
    context = ssl.create_default_context(cafile=ca)
    if certificate:
        context.load_cert_chain(certificate, key)
    return context


SAMPLE = re.compile(r'^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+)\})? '
                    r'([0-9.eE+-]+)$')
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


def parse(text):
    """{(name, ((label, value), ...)): number} and {family: type}, of text that is well formed."""
    samples, families, family = {}, {}, None
    expect(text.endswith("\n"), "no end of line at the end")
    helped = None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            helped = line.split(" ")[2]
            expect(line.endswith("."), "no sentence:", line)
            continue
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            expect(kind in TYPES and helped == family and family not in families, line)
            expect((kind == "counter") == family.endswith("_total"), "name and type:", line)
            families[family] = kind
            continue
        found = SAMPLE.match(line)
        expect(found, "no sample:", line)
        name, labels = found[1], tuple(LABEL.findall(found[2] or ""))
        of = re.sub("_(bucket|sum|count)$", "", name) if families[family] == "histogram" else name
        expect(of == family, line, "in the family", family)
        expect(float(found[3]) >= 0, line)
        expect((name, labels) not in samples, "twice:", line)
        samples[name, labels] = float(found[3])
    for name, kind in families.items():
        if kind == "histogram":
            check_histogram(name, samples)
    return samples, families


def check_histogram(name, samples):
    buckets = [(float(labels[0][1]), n) for (of, labels), n in samples.items()
               if of == name + "_bucket"]
    expect(len(buckets) > 10 and buckets[-1][0] == float("inf"), name, buckets)
    for (low, fewer), (high, more) in zip(buckets, buckets[1:]):
        expect(low < high and fewer <= more, name, buckets)
    expect(buckets[-1][1] == samples[name + "_count", ()], name, "and its count")


def metrics(url):
    """The samples, by name with labels as in the text: 'name' or 'name{a="b"}'."""
    status, headers, text = get(url + "metrics")
    expect(status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4"),
           status, headers)
    samples, _ = parse(text)
    return {name + ("{%s}" % ",".join('%s="%s"' % l for l in labels) if labels else ""): n
            for (name, labels), n in samples.items()}


def status(url):
    code, headers, text = get(url + "status.json")
    expect(code == 200 and headers["Content-Type"] == "application/json", code, headers)
    return json.loads(text)


def bench(attnctl, address, *more, env=None):
    """A load that verifies what it is answered."""
    run = subprocess.run([attnctl, "--target", address, "bench", "--context", "300", "--chunk",
                          "256", "--steps", "40", "--layers", "2", *more], capture_output=True,
                         text=True, timeout=60, env={**os.environ, **(env or {})})
    expect(run.returncode == 0 and ", 0 wrong" in run.stdout, "bench", more, run.stdout, run.stderr)
