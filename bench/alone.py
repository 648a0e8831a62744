"""A benchmark that runs by itself, here or where deploy/bundle -b was unpacked: bench/scaling and
bench/latency. Finds or builds its program, runs it, and leaves NAME.json, NAME.md and pictures."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile

import latency_report
import scaling_report

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
REPORTS = {"scaling": scaling_report, "latency": latency_report}
EXCHANGE_S = 60


def build(program):
    """Its path: beside this file, or built."""
    packed = os.path.join(HERE, program)
    if os.access(packed, os.X_OK):
        return packed
    folder = os.environ.get("ATTN_BUILD", os.path.join(ROOT, "build-bench"))
    os.makedirs(folder, exist_ok=True)
    log = os.path.join(folder, "bench.log")
    new = [] if os.path.exists(os.path.join(folder, "CMakeCache.txt")) else [
        "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DATTN_TESTS=OFF"]
    with open(log, "w", encoding="utf-8") as out:
        for command in (["cmake", "-S", ROOT, "-B", folder, *new],
                        ["ninja", "-C", folder, "attnd", program]):
            if subprocess.run(command, stdout=out, stderr=out, check=False).returncode != 0:
                sys.exit(f"{command[0]} failed: see {log}")
    return os.path.join(folder, "bench", program)


def output_of(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    except OSError:
        return ""


def describe_machine():
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        cpu = next((line.split(":", 1)[1].strip() for line in lines
                    if line.startswith("model name")), platform.machine())
    stamp = os.path.join(HERE, "commit")  # of a bundle
    if os.path.exists(stamp):
        with open(stamp, encoding="utf-8") as file:
            commit = file.read().strip()
    else:
        commit = output_of("git", "describe", "--always", "--dirty", "--abbrev=12")
    gpus = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"cpu": cpu, "cores": os.cpu_count(), "gpus": gpus, "commit": commit or "unknown",
            "date": now.isoformat(timespec="seconds")}


def run_program(program, arguments):
    """Its rows, its output shown as it comes; what it wrote before it failed counts."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        code = subprocess.run([program, "--json", file.name, *arguments], check=False).returncode
        with open(file.name, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    if code == 2:
        sys.exit(2)  # it said how it is used
    return rows, code


def run_exchange(program, n):
    """The exchange between n GPUs alone, with its merge: rows, and why there are none."""
    try:
        done = subprocess.run([program, str(n)], capture_output=True, text=True,
                              timeout=EXCHANGE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as reason:
        return [], str(reason)
    found = re.findall(r"exchange and merge, (\d+) GPUs, (\d+) rows: ([\d.]+) us", done.stdout)
    why = (done.stderr or done.stdout).strip().splitlines()
    return ([{"workers": int(k), "rows": int(rows), "us": float(us)} for k, rows, us in found],
            "" if found else why[-1] if why else f"ended with {done.returncode}")


def exchanges(gpus):
    """What the merge hop takes on the GPUs alone."""
    program = build("bench_exchange")
    rows, absent = [], []
    for n in (2, 4, 8):
        if n > gpus:
            absent.append({"workers": n, "absent": f"{gpus} GPU{'s' if gpus > 1 else ''} here"})
            continue
        found, why = run_exchange(program, n)
        rows += found
        absent += [{"workers": n, "absent": why}] if why else []
    return rows + absent


def report(name, run, out):
    """Table, verdicts and pictures."""
    text = REPORTS[name].markdown(run)
    with open(os.path.join(out, f"{name}.md"), "w", encoding="utf-8") as file:
        file.write(text)
    print("\n" + REPORTS[name].summary(run))
    try:
        import alone_plots  # wants matplotlib
        pictures = alone_plots.draw(name, run, out)
    except ImportError as reason:
        pictures = [f"none ({reason}); bench/{name} --report draws them elsewhere"]
    print(f"{os.path.join(out, name)}.json, {name}.md; pictures: {', '.join(pictures) or 'none'}")


def measure(name, arguments, out):
    rows, code = run_program(build(f"bench_{name}"), arguments)
    run = {"machine": describe_machine(), "arguments": arguments, "code": code, "rows": rows}
    if name == "scaling" and run["machine"]["gpus"] and "--cpu" not in arguments:
        run["exchange"] = exchanges(len(run["machine"]["gpus"]))
    with open(os.path.join(out, f"{name}.json"), "w", encoding="utf-8") as file:
        json.dump(run, file, indent=1)
    return run


def main():
    name = sys.argv[1]
    parser = argparse.ArgumentParser(prog=f"bench/{name}", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--out", default=os.path.join(HERE, "out"))
    parser.add_argument("--report")
    options, arguments = parser.parse_known_args(sys.argv[2:])
    if options.help:
        with open(os.path.join(HERE, name), encoding="utf-8") as script:
            print("".join(line.lstrip("# ") if line == "#\n" else line[2:]
                          for line in list(script)[1:] if line.startswith("#")), end="")
        return 0
    os.makedirs(options.out, exist_ok=True)
    if options.report:
        with open(options.report, encoding="utf-8") as file:
            run = json.load(file)
    else:
        run = measure(name, arguments, options.out)
    report(name, run, options.out)
    wrong = any(row.get("bits") == "DIFFER" for row in run["rows"])
    return 1 if wrong or run.get("code", 0) != 0 or not run["rows"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(f"bench/{sys.argv[1]}: interrupted")
