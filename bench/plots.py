"""Pictures of the results, each as SVG and PNG."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402: the backend is chosen first

OURS, BARE, KERNEL, MISSED, QUIET = "#1f6f8b", "#b9b9b9", "#e0a458", "#b5403a", "#777777"
PARTS = {"model": "#d9d9d9", "attention": KERNEL, "rest of run": OURS,
         "begin and commit": "#7a5195"}

plt.rcParams.update({
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    "svg.hashsalt": "attnd", "figure.constrained_layout.use": True,
})


def save(figure, out, name, machine):
    note = f"{machine['cpu']}, {machine['cores']} cores; commit {machine['commit']}, " \
           f"{machine['date'][:10]}"
    figure.text(0.995, 0.003, note, ha="right", va="bottom", fontsize=7, color=QUIET)
    for kind in ("svg", "png"):
        figure.savefig(os.path.join(out, f"{name}.{kind}"), dpi=130)
    plt.close(figure)
    return name


def of_bench(results, *names):
    return [result for result in results if result["bench"] in names]


# ---- a remote layer ----

def draw_layer(results, machine, out):
    rows = of_bench(results, "layer")
    groups = [("stream", "spins"), ("stream", "sleeps"), ("unary", "spins"), ("unary", "sleeps")]
    groups = [group for group in groups
              if any(row["case"].startswith(" ".join(group)) for row in rows)]
    if not groups:
        return None
    figure, axes = plt.subplots(1, len(groups), figsize=(3.1 * len(groups), 4.2), sharey=True,
                                squeeze=False)
    for axis, group in zip(axes[0], groups):
        prefix = " ".join(group) + " "
        mine = [row for row in rows if row["case"].startswith(prefix)]
        for i, row in enumerate(mine):
            bars = ((-0.2, row["bound"], row["bound_p99"], BARE),
                    (0.2, row["value"], row["p99"], OURS))
            for shift, p50, p99, colour in bars:
                axis.bar(i + shift, p50, 0.38, color=colour)
                axis.plot([i + shift - 0.12, i + shift + 0.12], [p99, p99], color=colour, lw=2)
                axis.plot([i + shift] * 2, [p50, p99], color=colour, lw=1)
            met = row["ratio"] <= row["target"]
            axis.text(i, max(row["p99"], row["bound_p99"]) * 1.12, f"{row['ratio']:.2f}x",
                      ha="center", color="black" if met else MISSED,
                      fontweight="normal" if met else "bold")
        axis.set_yscale("log")
        axis.set_xticks(range(len(mine)), [row["case"][len(prefix):] for row in mine])
        axis.set_title(f"{group[0]}, {group[1]}")
    axes[0][0].set_ylabel("microseconds: bar p50, dash p99")
    figure.suptitle("A remote layer without its kernel, beside a bare gRPC echo of the same bytes "
                    f"(target: {rows[0]['target']}x at p50)", x=0.01, ha="left", fontsize=12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (BARE, OURS)]
    axes[0][-1].legend(handles, ["bare echo", "attnd"], loc="upper left")
    return save(figure, out, "layer", machine)


# ---- a token ----

def draw_token(results, machine, out):
    rows = of_bench(results, "token")
    parts = [row for row in rows if "part" in row]
    if not parts:
        return None
    by_case = {row["case"]: row for row in rows}
    figure, axis = plt.subplots(figsize=(8.5, 3.2))
    names = ["local", "four workers"]
    for y, name in enumerate(names):
        left = 0.0
        for part, colour in PARTS.items():
            value = next(row["value"] for row in parts
                         if row["of"] == name and row["part"] == part) / 1e3
            axis.barh(y, value, left=left, color=colour, height=0.55)
            if value > 1.2:
                axis.text(left + value / 2, y, f"{value:.1f}", ha="center", va="center",
                          color="white" if part != "model" else "black")
            left += value
    allowed = by_case["four workers"]["bound"] / 1e3
    axis.axvline(allowed, color=MISSED, lw=1.5, ls="--")
    axis.text(allowed, 1.36, f" allowed: {allowed:.1f} ms", color=MISSED, va="bottom")
    axis.set_yticks(range(len(names)), ["attention in\nthe process", "four worker\nprocesses"])
    axis.set_xlabel("milliseconds a token")
    axis.set_ylim(-0.5, 1.75)
    axis.set_title("Where a generated token's time goes: SmolLM2-135M, 2,700 tokens of context",
                   pad=26)
    axis.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PARTS.values()],
                list(PARTS), ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    return save(figure, out, "token", machine)


# ---- rates ----

def draw_ratios(results, machine, out):
    """Ratios to a roofline, bar by bar."""
    rows = [row for row in of_bench(results, "decode", "prefill", "attend")
            if row.get("ratio") is not None]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(max(6.0, 0.5 * len(rows) + 2), 4.4))
    for i, row in enumerate(rows):
        met = row.get("target") is None or row["ratio"] >= row["target"]
        axis.bar(i, row["ratio"], color=OURS if met else MISSED, width=0.7)
        axis.text(i, row["ratio"] + 0.01, f"{row['ratio'] * 100:.0f}", ha="center", fontsize=8)
        if row.get("target"):
            axis.plot([i - 0.4, i + 0.4], [row["target"]] * 2, color="black", lw=1)
    axis.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=45, ha="right")
    axis.set_ylim(0, max(1.0, max(row["ratio"] for row in rows) * 1.1))
    axis.set_ylabel("share of the roofline of the same run")
    axis.set_title("CPU kernels; the line is the target, red misses it")
    return save(figure, out, "decode", machine)


def draw_lines(results, machine, out, bench, x, label, title, ylabel, by=None):
    """Values over a number that results carry under `x`, log-log, a line for each `by`; results
    without it are for the tables."""
    rows = [row for row in of_bench(results, bench) if row.get(x) and (by is None or by in row)]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    lines = {}
    for row in rows:
        lines.setdefault(row[by] if by else row["case"], []).append(row)
    for name, line in lines.items():
        line.sort(key=lambda row: row[x])
        drawn, = axis.plot([row[x] for row in line], [row["value"] for row in line], "o-", ms=4,
                           label=str(name))
        for row in line:
            if row.get("target") and row.get("bound"):
                axis.plot(row[x], row["bound"], "_", ms=16, mew=2, color=drawn.get_color())
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel(ylabel)
    axis.set_title(title)
    axis.legend()
    return save(figure, out, bench, machine)


def draw(results, machine, out):
    """All pictures that the results allow. Returns their names."""
    pictures = [
        draw_ratios(results, machine, out),
        draw_layer(results, machine, out),
        draw_lines(results, machine, out, "begin", "sequences", "sequences of the batch",
                   "begin of a step, 32k tokens each; dashes are the targets", "microseconds", by="of"),
        draw_lines(results, machine, out, "throughput", "outstanding", "calls outstanding",
                   "Throughput as load grows", "calls a second", by="clients"),
        draw_token(results, machine, out),
    ]
    return [picture for picture in pictures if picture is not None]
