"""Pictures of a run of bench/gpu, each as SVG and PNG."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402: the backend is chosen first

import gpu_report  # noqa: E402

OURS, QUIET, MISSED = "#1f6f8b", "#777777", "#b5403a"
COLOURS = {"fi_tc": "#e0a458", "fi_cuda": "#c98bb9", "xqa": "#7a5195", "holistic": "#4f8f4f",
           "cudnn": "#b5403a", "sdpa": "#999999", "cascade": "#8f6b2f", "fa2": "#c9c05a",
           "fa3": "#e0a458", "fmha_v2": "#7a5195"}

plt.rcParams.update({
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    "svg.hashsalt": "attnd", "figure.constrained_layout.use": True,
})


def save(figure, run, out, name):
    machine = run["machine"]
    figure.supxlabel(f"{machine['device']}; commit {machine['commit']}, {machine['date'][:10]}",
                     x=0.995, ha="right", fontsize=7, color=QUIET)
    for kind in ("svg", "png"):
        figure.savefig(os.path.join(out, f"{name}.{kind}"), dpi=130)
    plt.close(figure)
    return name


def draw_decode(run, out):
    """Part of the read limit over the bytes of a batch: ours, and the best peer of each point."""
    rows = [row for row in run["rows"] if row["kind"] in ("decode", "skewed", "sparse")]
    if not run["limits"].get("read") or not any(gpu_report.counts(row["ours"]) for row in rows):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    panels = (("Requests of one length", ("decode",)),
              ("Skewed lengths, sparse lists", ("skewed", "sparse")))
    for axis, (title, kinds) in zip(axes, panels):
        mine = [row for row in rows if row["kind"] in kinds]
        best = [(row, gpu_report.best_of(row)) for row in mine]
        for name, colour in COLOURS.items():
            points = [(row["bytes"] / 1e6, gpu_report.fraction(row, side[1], run["limits"]))
                      for row, side in best if side is not None and side[0] == name]
            if points:
                axis.plot(*zip(*points), "o", ms=6, mfc="none", mew=1.5, mec=colour, label=name)
        points = [(row["bytes"] / 1e6, gpu_report.fraction(row, row["ours"], run["limits"]))
                  for row in mine if gpu_report.counts(row["ours"])]
        if points:
            axis.plot(*zip(*points), "D", ms=4, color=OURS, label="attnd")
        axis.axhline(1, color="black", lw=1, ls="--")
        axis.set_xscale("log")
        axis.set_ylim(0, 1.05)
        axis.set_xlabel("MB of K and V in the batch")
        axis.set_title(title)
        if mine:
            axis.legend(fontsize=8, ncols=2, loc="lower right")
    axes[0].set_ylabel(f"of the read limit, {run['limits']['read'] / 1e12:.2f} TB/s")
    return save(figure, run, out, "gpu-decode")


def draw_prefill(run, out):
    rows = [row for row in run["rows"] if row["kind"] == "prefill"
            and gpu_report.counts(row["ours"])]
    if not rows:
        return None
    names = [name for name in gpu_report.OF_KIND["prefill"]
             if any(gpu_report.counts(row["peers"].get(name)) for row in rows)]
    figure, axis = plt.subplots(figsize=(8.5, 1.2 + 0.4 * len(rows)))
    for y, row in enumerate(rows):
        for name in names:
            side = row["peers"].get(name)
            if gpu_report.counts(side):
                axis.plot(gpu_report.rate(row, side), y, "o", ms=7, mfc="none", mew=1.5,
                          mec=COLOURS[name])
        axis.barh(y, gpu_report.rate(row, row["ours"]), 0.6, color=OURS, alpha=0.4)
    for name in names:
        axis.plot([], [], "o", mfc="none", mew=1.5, mec=COLOURS[name], label=name)
    axis.barh(0, 0, color=OURS, alpha=0.4, label="attnd")
    if run["limits"].get("matmul"):
        axis.axvline(run["limits"]["matmul"] / 1e12, color="black", lw=1, ls="--")
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("TFLOP/s; dashed: a product of matrices in this run")
    axis.set_title("Causal prefill over pages; cuDNN and PyTorch read contiguous KV")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, run, out, "gpu-prefill")


def draw_ratios(run, out):
    """How many times as fast as the best peer, point by point."""
    rows = [(row, gpu_report.ratio(row)) for row in run["rows"]]
    rows = [(row, ratio) for row, ratio in rows if ratio is not None]
    if not rows:
        return None
    size = 8 if len(rows) <= 60 else 6
    figure, axis = plt.subplots(figsize=(8.5, 1.2 + len(rows) * (0.24 if size == 8 else 0.15)))
    for y, (row, ratio) in enumerate(rows):
        colour = OURS if ratio >= 1 else MISSED
        axis.barh(y, ratio - 1, left=1, height=0.7, color=colour)
        axis.annotate(f"{ratio:.2f} {gpu_report.best_of(row)[0]}", (max(ratio, 1), y),
                      xytext=(3, 0), textcoords="offset points", va="center", fontsize=size)
    axis.axvline(1, color="black", lw=1)
    axis.set_yticks(range(len(rows)), [row["case"] for row, _ in rows], fontsize=size)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, max(1.1, max(ratio for _, ratio in rows)) * 1.12)
    axis.set_xlabel("time of the best peer / ours")
    axis.set_title("Beside the fastest of all peers at each point")
    return save(figure, run, out, "gpu-ratio")


def draw(run, out):
    """All pictures that the run allows. Returns their names."""
    pictures = [draw_one(run, out) for draw_one in (draw_decode, draw_prefill, draw_ratios)]
    return [picture for picture in pictures if picture is not None]
