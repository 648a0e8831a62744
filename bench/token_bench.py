"""A token of examples/runner: attention in its own process, on four workers over gRPC and through
shared memory, and what a bare fan-out of the same bytes takes, in turns, on the same machine.

The target: a token through four workers takes at most the local one plus, for every layer, 1.5
round trips of the bare echo to four processes.
"""

import os
import re
import signal
import statistics
import subprocess
import tempfile
import time

WORKERS = 4
TARGET = 1.5
CHUNK = 256
QUESTION = "Who was the last keeper of the lighthouse, and when did he leave the rock?"

# SmolLM2-135M: 30 layers, 9 query heads and 3 KV heads of 64; q in float32, one partial per head
# (an exponent, a sum and 64 floats) from each worker; the messages' heads beside.
LAYERS = 30
REQUEST = 9 * 64 * 4 + 24
REPLY = 9 * (8 + 64 * 4) + 26


def start_cluster(build, folder):
    ready = os.path.join(folder, "ready")
    with open(os.path.join(folder, "cluster.log"), "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [os.path.join(build, "daemon", "attnd"), "dev", "--workers", str(WORKERS), "--listen",
             "127.0.0.1:0", "--slab", "512MiB", "--ready-file", ready],
            stdout=log, stderr=log, start_new_session=True)
    for _ in range(300):
        if os.path.exists(ready):
            with open(ready, encoding="utf-8") as file:
                return process, file.read().strip()
        if process.poll() is not None:
            break
        time.sleep(0.1)
    stop_cluster(process)
    return None, None


def stop_cluster(process):
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_model(build, root, model, target, tokens, transport):
    """One run of the runner: its row `generation`, in microseconds a token."""
    command = [os.path.join(build, "examples", "runner", "runner"), "--model", model, "--target",
               target, "--chunk", str(CHUNK), "--spread", "--prompt-file",
               os.path.join(root, "examples", "runner", "document.txt"), "--question", QUESTION,
               "--max-tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "ATTN_TRANSPORT": transport})
    row = re.search(r"^  generation +(.*)$", done.stdout, re.M)
    if done.returncode != 0 or row is None:
        return None
    n, seconds, _, p50, p99, mean, computed, edges = (float(x) for x in row.group(1).split())
    return {"token": seconds / n * 1e6, "run_p50": p50, "run_p99": p99, "run": mean * LAYERS,
            "computed": computed * LAYERS, "edges": edges / n * 1e3}


def run_echo(build, rounds, pause_us):
    """The median of the bare fan-out, in microseconds."""
    command = [os.path.join(build, "bench", "bench_echo"), "fan", str(WORKERS), str(rounds),
               str(REQUEST), str(REPLY), "50", str(pause_us)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"p50 ([0-9.]+) us", done.stdout)
    return float(found.group(1)) if done.returncode == 0 and found else None


def middle(rows, key):
    return statistics.median(row[key] for row in rows)


def record(case, value, unit="us", **more):
    return {"bench": "token", "case": case, "value": value, "unit": unit, **more}


def report(local, remote, shared, busy, idle):
    token_local, token = middle(local, "token"), middle(remote, "token")
    allowed = token_local + LAYERS * TARGET * busy
    over = (token - token_local) / LAYERS
    print(f"  a token: local {token_local / 1e3:.1f} ms, four workers {token / 1e3:.1f} ms; "
          f"allowed {allowed / 1e3:.1f} ms")
    print(f"  a layer: four workers take {over:.0f} us more than local; a bare fan-out {busy:.0f} us"
          f" between two layers of computing, {idle:.0f} us back to back")
    beside = (middle(shared, "token") - token_local) / LAYERS if shared else None
    if shared:
        print(f"  through shared memory: {middle(shared, 'token') / 1e3:.1f} ms, "
              f"{beside:.0f} us a layer more than local")
    results = [
        record("four workers, over local, a layer", over, bound=busy, ratio=over / busy,
               target=TARGET),
        record("four workers, over local, back to back", over, bound=idle, ratio=over / idle),
        record("local", token_local),
        record("four workers", token, bound=allowed),
        record("bare fan-out, cores busy between", busy),
        record("bare fan-out, back to back", idle),
    ]
    if shared:
        results.append(record("shared memory, over local, a layer", beside))
        results.append(record("shared memory", middle(shared, "token")))
    for name, rows in (("local", local), ("four workers", remote), ("shared memory", shared)):
        if not rows:
            continue
        computed, run, edges = (middle(rows, key) for key in ("computed", "run", "edges"))
        model = middle(rows, "token") - run - edges
        results.append(record(f"{name}: run p50", middle(rows, "run_p50")))
        results.append(record(f"{name}: run p99", middle(rows, "run_p99")))
        print(f"  {name:<13} model {model / 1e3:5.1f} ms, attention {computed / 1e3:5.1f}, rest of "
              f"run {(run - computed) / 1e3:5.1f}, begin and commit {edges / 1e3:5.1f}; "
              f"run p50 {middle(rows, 'run_p50'):.0f} us")
        for part, value in (("model", model), ("attention", computed),
                            ("rest of run", run - computed), ("begin and commit", edges)):
            results.append(record(f"{name}: {part}", value, part=part, of=name))
    return results


def run(root, build, quick):
    fetched = subprocess.run([os.path.join(root, "deploy", "fetch-model"), build],
                             capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        return None, "no model: " + fetched.stderr.strip()
    model = fetched.stdout.strip().split("\n")[-1]
    local, remote, shared, busy, idle = [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        cluster, address = start_cluster(build, folder)
        if cluster is None:
            return None, "the cluster did not come up"
        try:
            for _ in range(1 if quick else 3):
                tokens = 24 if quick else 64
                local.append(run_model(build, root, model, "inproc://cpu", tokens, "auto"))
                remote.append(run_model(build, root, model, address, tokens, "grpc"))
                shared.append(run_model(build, root, model, address, tokens, "ucx"))
                if local[-1] is None or remote[-1] is None:
                    return None, "the runner failed"
                # As long as the model computes between two layers.
                pause = (local[-1]["token"] - local[-1]["run"] - local[-1]["edges"]) / LAYERS
                idle.append(run_echo(build, 500 if quick else 3000, 0))
                busy.append(run_echo(build, 500 if quick else 2000, int(pause)))
        finally:
            stop_cluster(cluster)
    if None in idle or None in busy:
        return None, "bench_echo failed"
    # Without UCX here there is nothing to show of it.
    shared = [row for row in shared if row is not None]
    return report(local, remote, shared, statistics.median(busy), statistics.median(idle)), None
