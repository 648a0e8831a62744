"""Runs bench/gpu: our kernels and others', point by point in turns, each in its own process.

A process that breaks (or takes too long) is started again for what is left of its point, and who
broke it is written down; a peer that breaks three times is asked no more.
"""

import argparse
import collections
import datetime
import glob
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile

import gpu_report

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
START_S, OURS_S, PEER_S = 120, 60, 60  # at most: to answer for the limits, a point, a peer
BREAKS_MAX = 3
MEASURE_S = {True: 150, False: 490}  # for the points, quick and all


# ---- a process that answers ----

class Side:
    """A process that takes a line and answers with lines of JSON."""

    def __init__(self, command, environment=None):
        self.command, self.environment = command, environment
        self.process, self.lines, self.reader, self.log = None, None, None, None

    def start(self):
        self.stop()
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, **(self.environment or {})}, start_new_session=True)
        self.lines = queue.SimpleQueue()
        self.reader = threading.Thread(target=self.read, args=(self.process.stdout, self.lines),
                                       daemon=True)
        self.reader.start()

    @staticmethod
    def read(output, lines):
        for line in output:
            try:
                lines.put(json.loads(line))
            except ValueError:
                pass  # what a library prints beside
        lines.put(None)

    def ask(self, text, seconds, is_last=lambda row: True):
        """Yields the rows of an answer. A process that ends or takes longer than `seconds` for a
        row is stopped, and BrokenPipeError says why."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()
            while True:
                row = self.lines.get(timeout=seconds)
                if row is None:
                    raise BrokenPipeError
                yield row
                if is_last(row):
                    return
        except queue.Empty:
            self.stop()
            raise BrokenPipeError(f"no answer in {seconds} s") from None
        except BrokenPipeError:
            raise BrokenPipeError(self.last_words()) from None

    def last_words(self):
        """Why it ended."""
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:  # its output ended, it did not
            self.process.kill()
            code = self.process.wait()
        self.log.seek(0)
        said = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        self.stop()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{said[-1][:200] if said else 'said nothing'} ({how})"

    def stop(self):
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # what it did not read
        self.process = None
        self.log.close()


# ---- ours ----

def find_ours():
    """bench_gpu: beside this file, or built."""
    packed = os.path.join(HERE, "bench_gpu")
    if os.access(packed, os.X_OK):
        return packed
    build = os.environ.get("ATTN_BUILD", os.path.join(ROOT, "build-bench"))
    os.makedirs(build, exist_ok=True)
    log = os.path.join(build, "bench.log")
    with open(log, "w", encoding="utf-8") as out:
        for command in (["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DATTN_CUDA=ON",
                         *([] if os.path.exists(os.path.join(build, "CMakeCache.txt")) else
                           ["-DCMAKE_BUILD_TYPE=Release", "-DATTN_TESTS=OFF"])],
                        ["ninja", "-C", build, "bench_gpu"]):
            if subprocess.run(command, stdout=out, stderr=out, check=False).returncode != 0:
                sys.exit(f"bench/gpu: {command[0]} failed: see {log}")
    return os.path.join(build, "bench", "bench_gpu")


def points_of(program, options):
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
    points = [json.loads(line) for line in listed.stdout.splitlines()]
    names = {point["case"] for point in points}

    def is_meant(case):
        return not options.points or any(case == word if word in names else case.startswith(word)
                                         for word in options.points)
    chosen = [point for point in points
              if (point["quick"] or not options.quick) and is_meant(point["case"])]
    if not chosen:
        sys.exit("bench/gpu: no point is called so; see bench/gpu --list")
    return chosen


def ask_ours(ours, point, absent):
    """Our row of a point."""
    if "attnd" in absent:
        return {"absent": absent["attnd"]}
    try:
        row = next(iter(ours.ask(point["case"], OURS_S)))
    except BrokenPipeError as reason:
        return {"refused": str(reason)}
    return {key: value for key, value in row.items() if key not in ("bench", "case")}


# ---- others ----

def unpack_flashinfer(folder, into):
    """What gpu_pack made of FlashInfer, for a host without network: where Python finds it."""
    site = os.path.join(into, "site")
    for path in glob.glob(os.path.join(folder, "*.tar.xz")):
        with tarfile.open(path) as packed:
            packed.extractall(site)
    for path in glob.glob(os.path.join(folder, "*.whl")):
        with zipfile.ZipFile(path) as packed:
            packed.extractall(site)
    if not os.path.isdir(os.path.join(site, "flashinfer")):
        sys.exit(f"bench/gpu: {folder} has no FlashInfer in it: see bench/gpu_pack")
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "FLASHINFER_WORKSPACE_BASE": into,
            "FLASHINFER_CUDA_ARCH_LIST": "9.0a"}


def peers_environment(options, work):
    environment = {"FLASHINFER_DISABLE_VERSION_CHECK": "1", "FLASHINFER_LOGGING_LEVEL": "error",
                   "PYTHONUNBUFFERED": "1"}
    if not options.compile:  # a kernel takes minutes
        environment["FLASHINFER_DISABLE_JIT"] = "1"
    if options.flashinfer:
        environment.update(unpack_flashinfer(options.flashinfer, work))
    return environment


def ask_peers(peers, point, names, broken):
    """{name: row} of those peers on a point."""
    rows, left = {}, []
    for name in names:
        if broken[name] >= BREAKS_MAX:
            rows[name] = {"absent": f"broke {BREAKS_MAX} times"}
        else:
            left.append(name)
    while left:
        now = None
        request = json.dumps({"point": point, "peers": left})
        try:
            for row in peers.ask(request, PEER_S, lambda row: "done" in row):
                if "began" in row:
                    now = row["peer"]
                elif "peer" in row:
                    rows[row["peer"]] = {key: value for key, value in row.items()
                                         if key not in ("case", "peer")}
            break
        except BrokenPipeError as reason:
            if now is None:  # not even begun: none of them will
                rows.update({name: {"refused": str(reason)} for name in left if name not in rows})
                break
            broken[now] += 1
            rows.setdefault(now, {"refused": str(reason)})
            left = [name for name in left if name not in rows]
    return {name: rows.get(name, {"refused": "no answer"}) for name in names}


# ---- a run ----

def describe():
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT,
                            capture_output=True, text=True, check=False).stdout.strip()
    stamp = os.path.join(HERE, "commit")  # of a pack
    if os.path.exists(stamp):
        with open(stamp, encoding="utf-8") as file:
            commit = file.read().strip()
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"commit": commit or "unknown", "date": now.isoformat(timespec="seconds")}


def ask_limits(ours, peers, run):
    """Both processes say what the GPU can do, or are absent."""
    try:
        row = next(iter(ours.ask("limit", START_S)))
        run["machine"].update(device=row["device"], kind=row["kind"], memory=row["memory"])
        run["limits"].update({key: row[key] for key in ("read", "loads", "bulk", "tile", "slots")})
    except BrokenPipeError as reason:
        run["absent"]["attnd"] = str(reason)
    try:
        row = next(iter(peers.ask(json.dumps({"limit": True}), START_S)))
        run["machine"].setdefault("device", row["device"])
        run["machine"].update(versions=row["versions"])
        run["limits"].update(matmul=row["matmul"], read_sum=row["read_sum"])
        run["absent"].update(row["absent"])
    except BrokenPipeError as reason:
        run["absent"]["all peers"] = str(reason)
    run["machine"].setdefault("kind", "no attnd")
    if {"attnd", "all peers"} <= set(run["absent"]):
        for what, why in run["absent"].items():
            print(f"bench/gpu: {what}: {why}", file=sys.stderr)
        sys.exit(1)


def peer_names(point, absent, without):
    """Who is asked about a point, and why the others are not."""
    names, rows = [], {}
    for name in gpu_report.OF_KIND[point["kind"]]:
        mine = name in ("cudnn", "sdpa")
        if name in without:
            rows[name] = {"absent": "not wanted in this run"}
        elif "all peers" in absent:
            rows[name] = {"absent": absent["all peers"]}
        elif not mine and "FlashInfer" in absent:
            rows[name] = {"absent": absent["FlashInfer"]}
        else:
            names.append(name)
    return names, rows


def measure(run, points, ours, peers, options):
    """All points, while there is time."""
    end = time.monotonic() + options.seconds
    broken = collections.Counter()
    for i, point in enumerate(points):
        if time.monotonic() > end:
            run["unreached"] = [left["case"] for left in points[i:]]
            print(f"bench/gpu: {options.seconds} s are over: {len(points) - i} points not measured")
            break
        row = {key: value for key, value in point.items() if key not in ("lengths", "queries")}
        names, row["peers"] = peer_names(point, run["absent"], options.without)
        row["ours"] = ask_ours(ours, point, run["absent"])
        row["peers"].update(ask_peers(peers, point, names, broken))
        run["rows"].append(row)
        print(gpu_report.line(row, run["limits"]), flush=True)
        if i % 10 == 9:
            save(run, options.out)


def save(run, out):
    path = os.path.join(out, "gpu.json")
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(run, file, indent=1)
    os.replace(path + ".new", path)


def report(run, out):
    """Tables and pictures, and a summary."""
    with open(os.path.join(out, "gpu.md"), "w", encoding="utf-8") as file:
        file.write(gpu_report.markdown(run))
    try:
        import gpu_plots  # wants matplotlib
        pictures = gpu_plots.draw(run, out)
    except ImportError as reason:
        pictures = [f"none ({reason})"]
    print("\n" + gpu_report.setting(run))
    judged = gpu_report.verdicts(run)
    print(f"{sum(verdict[-1] for verdict in judged)} of {len(judged)} targets met")
    for what, why in run["absent"].items():
        print(f"not there: {what}: {why}")
    print(f"{os.path.join(out, 'gpu.json')}, gpu.md; pictures: {', '.join(pictures) or 'none'}")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="bench/gpu", description="Times attnd's GPU kernels "
                                     "beside others' on this machine's GPU.")
    parser.add_argument("points", nargs="*", metavar="POINT", help="that one, or those whose name begins so")
    parser.add_argument("--quick", action="store_true", help="the points that have a target")
    parser.add_argument("--out", default=os.path.join(HERE, "out"), metavar="DIR",
                        help="for gpu.json, gpu.md and the pictures; default: bench/out")
    parser.add_argument("--seconds", type=int, metavar="S", help="begin no point after so many: "
                        f"default {MEASURE_S[True]} with --quick, {MEASURE_S[False]} without")
    parser.add_argument("--without", type=lambda text: text.split(","), default=[],
                        metavar="PEER,...", help=", ".join(gpu_report.PEERS))
    packed = os.path.join(HERE, "flashinfer")
    parser.add_argument("--flashinfer", metavar="DIR", help="FlashInfer as bench/gpu_pack packs it; "
                        "default: what lies beside this script, else Python's own",
                        default=packed if os.path.isdir(packed) else None)
    parser.add_argument("--compile", action="store_true", help="let FlashInfer compile kernels that "
                        "it lacks: minutes each, once; give --seconds, too")
    parser.add_argument("--list", action="store_true", help="show the points and stop")
    parser.add_argument("--report", metavar="FILE", help="tables and pictures of that gpu.json")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.without if name not in gpu_report.PEERS]
    if unknown:
        parser.error(f"no peer is called {unknown[0]}: there are {', '.join(gpu_report.PEERS)}")
    options.seconds = options.seconds or MEASURE_S[options.quick]
    return options


def run_all(options, work):
    program = find_ours()
    points = points_of(program, options)
    if options.list:
        for point in points:
            print(point["case"] + ("  (quick)" if point["quick"] else ""))
        return 0
    run = {"machine": describe(), "limits": {}, "absent": {}, "quick": options.quick, "rows": []}
    ours = Side([program, "--serve"])
    peers = Side([sys.executable, os.path.join(HERE, "gpu_peers.py")],
                 peers_environment(options, work))
    start = time.monotonic()
    try:
        ask_limits(ours, peers, run)
        print(gpu_report.setting(run))
        for what, why in run["absent"].items():
            print(f"not there: {what}: {why}")
        measure(run, points, ours, peers, options)
        if "attnd" not in run["absent"]:
            run["limits"]["read_after"] = next(iter(ours.ask("limit", START_S)))["read"]
    except BrokenPipeError as reason:
        print(f"bench/gpu: the limit was not measured again: {reason}", file=sys.stderr)
    finally:
        ours.stop()
        peers.stop()
        run["seconds"] = round(time.monotonic() - start, 1)
        save(run, options.out)
    report(run, options.out)
    return 0


def main():
    options = parse(sys.argv[1:])
    if not options.list:
        os.makedirs(options.out, exist_ok=True)
    if options.report:
        with open(options.report, encoding="utf-8") as file:
            report(json.load(file), options.out)
        return 0
    work = tempfile.mkdtemp(prefix="bench-gpu-")
    try:
        return run_all(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench/gpu: interrupted")
