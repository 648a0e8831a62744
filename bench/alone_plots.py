"""Pictures of bench/scaling and bench/latency, each as SVG and PNG."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402: the backend is chosen first

import latency_report  # noqa: E402
import scaling_report  # noqa: E402

OURS, KERNEL, STEP, QUIET, MISSED = "#1f6f8b", "#e0a458", "#7a5195", "#777777", "#b5403a"
LINES = ("#1f6f8b", "#e0a458", "#7a5195", "#4f8f4f", "#b5403a", "#555555", "#8fc1d4")

plt.rcParams.update({
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    "svg.hashsalt": "attnd", "figure.constrained_layout.use": True,
})


def save(figure, run, out, name):
    figure.supxlabel(scaling_report.setting(run), x=0.995, ha="right", fontsize=7, color=QUIET)
    for kind in ("svg", "png"):
        figure.savefig(os.path.join(out, f"{name}.{kind}"), dpi=130)
    plt.close(figure)
    return name


def plain_ticks(axis, values):
    axis.set_xticks(values, [str(value) for value in values])
    axis.minorticks_off()


# ---- scaling ----

def draw_times(axis, best):
    for (case, rows), colour in zip(best.items(), LINES * 2):
        axis.plot([row["workers"] for row in rows], [row["value"] for row in rows], "o-", ms=5,
                  color=colour, label=case)
        said = [row for row in rows if row["predicted"]]
        axis.plot([row["workers"] for row in said], [row["predicted"] for row in said], "_", ms=14,
                  mew=2, color=colour)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("workers")
    axis.set_ylabel("microseconds a layer")
    axis.set_title("Time; dashes: what the cost model said")
    axis.legend(fontsize=8)


def draw_speedups(axis, run, best):
    for (case, rows), colour in zip(best.items(), LINES * 2):
        points = [(row["workers"], scaling_report.speedup(run, case, row["workers"]))
                  for row in rows]
        points = [(n, times) for n, times in points if times is not None]
        if points:
            axis.plot(*zip(*points), "o-", ms=5, color=colour)
        for n, bound in scaling_report.SPEEDUPS.get(case, {}).items():
            axis.plot(n, bound, "_", ms=14, mew=2, color=colour)
    top = max((row["workers"] for rows in best.values() for row in rows), default=1)
    axis.plot([1, top], [1, top], color="black", lw=1, ls="--")
    axis.set_xlabel("workers")
    axis.set_title("Speed-up over the best of one; dashes: targets")
    axis.set_ylim(0)


def draw_parts(axis, best):
    """Where the time goes, as part of a layer with its share of the step."""
    bars = [(case, row) for case, rows in best.items() for row in rows]
    for y, (case, row) in enumerate(bars):
        step = row["begin"] + row["commit"]
        whole = row["value"] + step
        left = 0.0
        for part, colour in ((row["computed"], KERNEL),
                             (max(0.0, scaling_report.beside(row)), OURS), (step, STEP)):
            axis.barh(y, 100 * part / whole, left=left, height=0.7, color=colour)
            left += 100 * part / whole
        axis.annotate(f"{scaling_report.us(whole)} us", (100, y), xytext=(4, 0), fontsize=7,
                      textcoords="offset points", va="center")
    axis.set_yticks(range(len(bars)), [f"{case}, {row['workers']}" for case, row in bars],
                    fontsize=7)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, 112)
    axis.set_xlabel("% of a layer with a step's begin and commit")
    axis.set_title("Where the time goes")
    for colour, label in ((KERNEL, "computed"), (OURS, "way and merging"),
                          (STEP, "begin and commit")):
        axis.barh(0, 0, color=colour, label=label)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def draw_hops(axis, run):
    """What is beside computing, by who merges; and the exchange alone, where GPUs did it."""
    rows = [row for row in run["rows"] if "value" in row and row["kind"] == "decode"]
    for grouped, colour, label in ((False, OURS, "the client merges"),
                                   (True, STEP, "workers merge")):
        mine = [row for row in rows if row["grouped"] == grouped]
        axis.plot([row["workers"] for row in mine],
                  [max(0.1, scaling_report.beside(row)) for row in mine], "o", ms=5, mfc="none",
                  color=colour, label=label)
    hops = [row for row in run.get("exchange", []) if "us" in row]
    for count, style in zip(sorted({row["rows"] for row in hops}), ("D-", "s--", "^:")):
        mine = [row for row in hops if row["rows"] == count]
        axis.plot([row["workers"] for row in mine], [row["us"] for row in mine], style, ms=4,
                  color=KERNEL, label=f"exchange alone, {count} rows")
    axis.set_yscale("log")
    axis.set_xlabel("workers")
    axis.set_ylabel("microseconds")
    axis.set_title("Beside what workers compute, decode")
    axis.legend(fontsize=8)


def draw_scaling(run, out):
    counts = sorted({row["workers"] for row in run["rows"] if "value" in row})
    best = {case: [row for row in (scaling_report.fastest(run, case, n) for n in counts) if row]
            for case in scaling_report.cases(run)}
    best = {case: rows for case, rows in best.items() if rows}
    if not best:
        return []
    bars = sum(len(rows) for rows in best.values())
    figure, axes = plt.subplots(2, 2, figsize=(13, 7 + 0.12 * bars),
                                height_ratios=(4, max(4, 0.2 * bars)))
    draw_times(axes[0][0], best)
    draw_speedups(axes[0][1], run, best)
    draw_parts(axes[1][0], best)
    draw_hops(axes[1][1], run)
    for axis in (axes[0][0], axes[0][1], axes[1][1]):
        plain_ticks(axis, counts)
    return [save(figure, run, out, "scaling")]


# ---- latency ----

def draw_latency(run, out):
    shapes = latency_report.shapes(run)
    rows = {shape: [row for row in latency_report.rungs(run)
                    if row["shape"] == shape and "value" in row] for shape in shapes}
    if not shapes:
        return []
    longest = max(len(mine) for mine in rows.values())
    lines = -(-len(shapes) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(13, 0.6 + lines * (1.2 + 0.3 * longest)),
                                squeeze=False)
    for axis in axes.flat[len(shapes):]:
        axis.set_axis_off()
    for axis, shape in zip(axes.flat, shapes):
        for y, row in enumerate(rows[shape]):
            low, p50 = 0.05, max(0.05, row["value"])
            axis.barh(y, p50 - low, left=low, height=0.62, color=OURS)
            for value, width in ((row["p99"], 2.5), (row["p999"], 1.2)):
                axis.plot([max(low, value)] * 2, [y - 0.3, y + 0.3], color=MISSED, lw=width)
            if row["computed"]:
                axis.plot(row["computed"], y, "D", ms=5, color=KERNEL, mec="black", mew=0.5)
        axis.set_xscale("log")
        axis.set_yticks(range(len(rows[shape])),
                        [f"{row['rung']}  {row['value']:.1f}" for row in rows[shape]], fontsize=8)
        axis.set_ylim(len(rows[shape]) - 0.4, -0.6)
        axis.set_xlabel("microseconds without what was computed")
        axis.set_title(f"{shape} of q")
    figure.suptitle("A layer's way: bar p50, thick line p99, thin p99.9, diamond: computed", x=0.01,
                    ha="left", fontsize=12)
    return [save(figure, run, out, "latency")]


def draw(name, run, out):
    """All pictures that the run allows. Returns their names."""
    return {"scaling": draw_scaling, "latency": draw_latency}[name](run, out)
