"""The benchmarks of attnd: which there are, how each is run, and what came of it.

A program of bench/ appends one JSON object a line to the file that --json names:
{"bench", "case", "value", "unit", "bound", "ratio", "target"}. `bound` is what the same run
measured as the limit or the peer, `ratio` is value / bound, and `target` is what the ratio (or
the value, where there is no ratio) should reach: at most, for times; at least, for everything
else, unless "sense" says "most" or "least".
"""

import argparse
import datetime
import glob
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time

import plots
import token_bench

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get("ATTN_BUILD", os.path.join(ROOT, "build-bench"))
TIMES = ("ns", "us", "ms", "s", "bytes")
LIMIT = 600  # seconds for one program

# name: (what it measures, [program of the build, argument ...]). A program that is not there is
# said to be missing.
PROGRAMS = {
    "decode": ("CPU kernels against the roofline of the same run", ["bench/bench_attend"]),
    "layer": ("a remote layer without its kernel, against a bare gRPC echo", ["bench/bench_layer"]),
    "latency": ("a layer's way rung by rung: in process, shared memory, messages, gRPC", ["bench/bench_latency"]),
    "fan": ("a layer over four workers, against local and a bare fan-out", ["bench/bench_fan"]),
    "begin": ("attn_step_begin() at the coordinator and on a worker", ["bench/bench_begin"]),
    "balance": ("placement in a large simulated cluster", ["bench/bench_balance"]),
    "copy": ("chunks from worker to worker, against bare gRPC", ["bench/bench_copy"]),
    "throughput": ("calls a second as load grows",
                   ["client/attnctl", "bench", "--dev", "2", "--sweep"]),
}
TOKEN = "a language model's token through four workers, against local attention"


# ---- the machine ----

def output_of(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        return done.stdout.strip()
    except OSError:
        return ""


def first_line(path, key):
    try:
        with open(path, encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines
                         if line.startswith(key)), "")
    except OSError:
        return ""


def describe_machine():
    flags = first_line("/proc/cpuinfo", "flags").split()
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16",
              "avx512_vnni", "amx_bf16", "amx_tile")
    return {
        "cpu": first_line("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in wanted if flag in flags],
        "memory": first_line("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "grpc": output_of("dpkg-query", "-W", "-f", "${Version}", "libgrpc-dev"),
        "compiler": output_of("cc", "--version").split("\n")[0],
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


# ---- building and running ----

def build():
    log = os.path.join(BUILD, "bench.log")
    os.makedirs(BUILD, exist_ok=True)
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                 "-DATTN_TESTS=OFF"]
    with open(log, "w", encoding="utf-8") as out:
        for command in (configure, ["ninja", "-C", BUILD]):
            if subprocess.run(command, stdout=out, stderr=out, check=False).returncode != 0:
                sys.exit(f"bench/run: {command[0]} failed: see {log}")


def run_limited(command):
    """Run a command with all it starts. Returns its exit code, or None if it took too long."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:  # too long, or interrupted
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_program(name, quick):
    """Run a program, its output shown as it comes. Returns its results, or None and a reason."""
    program = " ".join(PROGRAMS[name][1])
    command = [os.path.join(BUILD, PROGRAMS[name][1][0]), *PROGRAMS[name][1][1:]]
    if not os.access(command[0], os.X_OK):
        return None, f"{PROGRAMS[name][1][0]} is not in this build"
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        code = run_limited(command + ["--json", file.name] + (["--quick"] if quick else []))
        if code is None:
            return None, f"{program} took more than {LIMIT} s"
        if code != 0:
            return None, f"{program} ended with {code}"
        with open(file.name, encoding="utf-8") as lines:
            try:
                results = [json.loads(line) for line in lines if line.strip()]
            except ValueError as error:
                return None, f"{program} wrote what is no JSON: {error}"
    return (results, None) if results else (None, f"{program} wrote no results")


# ---- verdicts ----

def verdict(result):
    """(met, by how much in percent of the target: positive is better), or None."""
    target = result.get("target")
    measured = result["ratio"] if result.get("ratio") is not None else result.get("value")
    if target is None or measured is None or not target:
        return None
    unit_is_time = result.get("unit") in TIMES
    at_most = result.get("sense", "most" if unit_is_time else "least") == "most"
    margin = (target - measured if at_most else measured - target) / target * 100
    return margin >= 0, margin


def show_verdicts(results):
    rows = [(result, verdict(result)) for result in results]
    rows = [(result, judged) for result, judged in rows if judged is not None]
    if not rows:
        return
    print(f"\n{'bench':<10} {'case':<38} {'value':>10} {'':<8} {'ratio':>7} {'target':>7}  verdict")
    for result, (met, margin) in rows:
        ratio = "" if result.get("ratio") is None else f"{result['ratio']:.3f}"
        word = "met" if met else f"MISSED by {-margin:.1f} %"
        print(f"{result['bench']:<10} {result['case']:<38} {result['value']:>10.4g} "
              f"{result.get('unit', ''):<8} {ratio:>7} {result['target']:>7.4g}  {word}")
    print()
    of_what = [result.get("kind", result["bench"]) for result, _ in rows]
    for what in dict.fromkeys(of_what):
        mine = [met for name, (_, (met, _)) in zip(of_what, rows) if name == what]
        print(f"{what:<10} {sum(mine)} of {len(mine)} targets met")


# ---- the whole ----

def parse(arguments):
    names = [*PROGRAMS, "token"]
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that it works")
    parser.add_argument("--out", default=os.path.join(ROOT, "bench", "out"), metavar="DIR",
                        help="for results.json and the pictures; default: bench/out")
    parser.add_argument("--list", action="store_true", help="show the benchmarks and stop")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in names]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]}: there are {', '.join(names)}")
    options.names = options.names or names
    return options


def main():
    options = parse(sys.argv[1:])
    if options.list:
        for name, (what, _) in PROGRAMS.items():
            print(f"{name:<11} {what}")
        print(f"{'token':<11} {TOKEN}")
        return 0
    build()
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, "
          f"gRPC {machine['grpc']}, commit {machine['commit']}")
    results, missing = [], {}
    for name in options.names:
        what = TOKEN if name == "token" else PROGRAMS[name][0]
        print(f"\n== {name}: {what}", flush=True)
        start = time.monotonic()
        if name == "token":
            found, reason = token_bench.run(ROOT, BUILD, options.quick)
        else:
            found, reason = run_program(name, options.quick)
        if found is None:
            print(f"bench/run: {name}: {reason}")
            missing[name] = reason
        else:
            results += found
            print(f"({time.monotonic() - start:.0f} s)")
    show_verdicts(results)
    os.makedirs(options.out, exist_ok=True)
    path = os.path.join(options.out, "results.json")
    with open(path, "w", encoding="utf-8") as out:
        json.dump({"machine": machine, "quick": options.quick, "missing": missing,
                   "results": results}, out, indent=1)
    for old in glob.glob(os.path.join(options.out, "*.svg")) + glob.glob(
            os.path.join(options.out, "*.png")):
        os.remove(old)
    pictures = plots.draw(results, machine, options.out)
    print(f"\n{path}; pictures: {', '.join(pictures) if pictures else 'none'}")
    return 1 if missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench/run: interrupted")
