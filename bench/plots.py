"""Pictures of the results, each as SVG and PNG."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402: the backend is chosen first

OURS, BARE, KERNEL, MISSED, QUIET = "#1f6f8b", "#b9b9b9", "#e0a458", "#b5403a", "#777777"
SHADES = ("#8fc1d4", "#4b94ae", "#1f6f8b", "#0f3f52")
LINES = ("#1f6f8b", "#e0a458", "#7a5195", "#4f8f4f", "#b5403a", "#555555", "#8fc1d4", "#c98bb9")
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
    figure.supxlabel(note, x=0.995, ha="right", fontsize=7, color=QUIET)
    for kind in ("svg", "png"):
        figure.savefig(os.path.join(out, f"{name}.{kind}"), dpi=130)
    plt.close(figure)
    return name


def of_bench(results, *names):
    return [result for result in results if result["bench"] in names]


def swatches(axis, colours, labels, **where):
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in zip(colours, labels)]
    axis.legend(handles, labels, **where)


def plain_ticks(axis, values):
    """The numbers of a logarithmic axis as they are, not as powers of two."""
    axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.minorticks_off()


# ---- a remote layer ----

def draw_layer(results, machine, out):
    rows = of_bench(results, "layer")
    groups = [(kind, waits) for kind in ("stream", "unary")
              for waits in ("spins", "sleeps", "sleeps-1")]
    groups = [group for group in groups
              if any(row["case"].startswith(" ".join(group) + " ") for row in rows)]
    if not groups:
        return None
    figure, axes = plt.subplots(1, len(groups), figsize=(3.1 * len(groups), 4.4), sharey=True,
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
    swatches(figure, (BARE, OURS), ("bare echo", "attnd"), loc="outside upper right", ncols=2)
    return save(figure, out, "layer", machine)


# ---- a layer over several workers ----

def draw_fan(results, machine, out):
    rows = of_bench(results, "fan")
    if not rows:
        return None
    figure, axes = plt.subplots(len(rows), 1, figsize=(8.5, 0.9 + 1.9 * len(rows)), squeeze=False)
    for axis, row in zip(axes[:, 0], rows):
        over = row["target"] * row["bound"]
        bars = (("attnd", ((row["local"], KERNEL), (row["value"], OURS))),
                ("allowed", ((row["local"], KERNEL), (over, BARE))))
        for y, (_, parts) in enumerate(bars):
            left = 0.0
            for value, colour in parts:
                axis.barh(y, value, left=left, color=colour, height=0.6)
                if value > 0:
                    axis.text(left + value / 2, y, f"{value:.0f}", ha="center", va="center",
                              color="white" if colour == OURS else "black")
                left += value
        axis.set_yticks(range(2), [name for name, _ in bars])
        axis.set_title(f"A layer over {row['case'].split(',')[0]}: {row['ratio']:.2f} bare "
                       f"fan-outs more than a local one (target: {row['target']})",
                       color="black" if row["ratio"] <= row["target"] else MISSED, pad=26)
    axes[-1][0].set_xlabel("microseconds at p50")
    swatches(axes[0][0], (KERNEL, OURS, BARE),
             ("a local layer", "what attnd takes more",
              f"{rows[0]['target']} bare fan-outs of the same bytes"),
             loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, fontsize=9)
    return save(figure, out, "fan", machine)


# ---- a token ----

def draw_token(results, machine, out):
    rows = of_bench(results, "token")
    parts = [row for row in rows if "part" in row]
    if not parts:
        return None
    by_case = {row["case"]: row for row in rows}
    figure, axis = plt.subplots(figsize=(8.5, 3.4))
    names = ["local", "four workers"]
    for y, name in enumerate(names):
        left = 0.0
        for part, colour in PARTS.items():
            value = next(row["value"] for row in parts
                         if row["of"] == name and row["part"] == part) / 1e3
            axis.barh(y, value, left=left, color=colour, height=0.55)
            if value > 1.2:
                axis.text(left + value / 2, y, f"{value:.1f}", ha="center", va="center",
                          color="white" if part == "rest of run" else "black")
            left += value
        axis.text(left, y, f" {left:.1f}", va="center", fontweight="bold")
    allowed = by_case["four workers"]["bound"] / 1e3
    axis.axvline(allowed, color=MISSED, lw=1.5, ls="--")
    axis.text(allowed, 1.36, f" allowed: {allowed:.1f} ms", color=MISSED, va="bottom")
    axis.set_yticks(range(len(names)), ["attention in\nthe process", "four worker\nprocesses"])
    axis.set_xlabel("milliseconds a token")
    axis.set_ylim(-0.5, 1.75)
    axis.set_xlim(0, max(axis.get_xlim()[1], allowed * 1.15))
    axis.set_title("Where a generated token's time goes: SmolLM2-135M, 2,700 tokens of context",
                   pad=26)
    swatches(axis, PARTS.values(), list(PARTS), ncols=4, loc="lower left",
             bbox_to_anchor=(0, 1.0))
    return save(figure, out, "token", machine)


# ---- CPU kernels ----

def draw_panel(axis, rows, key, top, number):
    """Bars of `top` threads by dtype, one for each value of `key`; rings of fewer threads.
    `number` makes a percentage of a ratio."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    values = sorted({row[key] for row in rows})
    width  = 0.8 / len(values)
    for row in rows:
        x = dtypes.index(row["dtype"]) + (values.index(row[key]) - (len(values) - 1) / 2) * width
        if row["threads"] != top:
            axis.plot(x, number(row["ratio"]), "o", ms=4, mfc="white", mec="black", zorder=3)
            continue
        met = row["ratio"] <= row["target"] if row["sense"] == "most" else \
            row["ratio"] >= row["target"]
        axis.bar(x, number(row["ratio"]), width * 0.92,
                 color=SHADES[values.index(row[key]) % len(SHADES)])
        highest = max(number(other["ratio"]) for other in rows
                      if other["dtype"] == row["dtype"] and other[key] == row[key])
        text = f"{number(row['ratio']):.0f}" if row["sense"] == "least" else \
            f"{number(row['ratio']):.1f}"
        axis.annotate(text, (x, max(highest, 0)), xytext=(0, 4), textcoords="offset points",
                      ha="center", fontsize=8, color="black" if met else MISSED,
                      fontweight="normal" if met else "bold")
    axis.axhline(number(rows[0]["target"]), color="black", lw=1, ls="--")
    axis.margins(y=0.12)
    axis.set_xticks(range(len(dtypes)), dtypes)
    return values


def draw_kernels(results, machine, out):
    rows = of_bench(results, "attend")
    if not rows:
        return None
    top = max(row["threads"] for row in rows)
    kinds = {}
    for row in rows:
        decode = row["kind"] == "decode"
        panel = ("decode", row["context"]) if decode else (row["kind"], row["of"])
        kinds.setdefault(panel, []).append(row)
    panels = sorted(kinds, key=lambda panel: (("decode", "prefill", "order").index(panel[0]),
                                              str(panel[1]).rjust(9)))
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.3 * columns, 3.5 * lines + 0.6),
                                squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels):
        mine, (kind, of) = kinds[panel], panel
        key = "context" if kind == "prefill" else "group"
        if kind == "order":
            values = draw_panel(axis, mine, key, top, lambda ratio: (ratio - 1) * 100)
            axis.set_title(f"{of}: % that the fixed order takes more")
        else:
            values = draw_panel(axis, mine, key, top, lambda ratio: ratio * 100)
            axis.set_title(f"decode, {of // 1024}k tokens: % of the roofline" if kind == "decode"
                           else "prefill: % of the f32 FMA rate")
        names = [f"{value // 1024}k" if key == "context" else f"{value}" for value in values]
        swatches(axis, SHADES, names, ncols=len(names), fontsize=8, title_fontsize=8,
                 title="tokens" if key == "context" else "query heads a KV head",
                 loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.suptitle(f"CPU kernels ({rows[0]['isa']}): bars of {top} threads, rings of fewer; "
                    "dashed: the target, red misses it", x=0.01, ha="left", fontsize=12)
    return save(figure, out, "decode", machine)


# ---- lines over a number ----

def draw_begin(results, machine, out):
    rows = [row for row in of_bench(results, "begin") if "of" in row]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(8.5, 4.8))
    for name, colour in zip(dict.fromkeys(row["of"] for row in rows), LINES):
        line = sorted((row for row in rows if row["of"] == name), key=lambda row: row["sequences"])
        axis.plot([row["sequences"] for row in line], [row["value"] for row in line], "o-", ms=4,
                  color=colour)
        for row in line:
            if row.get("target"):
                axis.plot(row["sequences"], row["target"], "_", ms=18, mew=2.5, color=colour)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    plain_ticks(axis, sorted({row["sequences"] for row in rows}))
    axis.set_xlabel("sequences of the batch")
    axis.set_ylabel("microseconds")
    axis.set_title("The begin of a step, 32k tokens each; dashes are the targets")
    swatches(axis, LINES, list(dict.fromkeys(row["of"] for row in rows)), loc="center left",
             bbox_to_anchor=(1.01, 0.5))
    return save(figure, out, "begin", machine)


def draw_throughput(results, machine, out):
    rows = of_bench(results, "throughput")
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(8.5, 4.4))
    names = sorted({row["clients"] for row in rows})
    for clients, colour in zip(names, LINES):
        line = sorted((row for row in rows if row["clients"] == clients),
                      key=lambda row: row["outstanding"])
        axis.plot([row["outstanding"] for row in line], [row["value"] for row in line], "-",
                  color=colour)
        for row in line:
            met = row["ratio"] >= row["target"]
            axis.plot(row["outstanding"], row["value"], "o", ms=6, mec=colour, mew=1.5,
                      mfc=colour if met else "white")
    axis.set_xscale("log", base=2)
    plain_ticks(axis, sorted({row["outstanding"] for row in rows}))
    axis.set_ylim(0)
    axis.set_xlabel("calls outstanding")
    axis.set_ylabel("steps a second")
    axis.set_title("Throughput as load grows; a hollow point has less than "
                   f"{rows[0]['target']} of the best with no more load")
    swatches(axis, LINES, [f"{n} client{'s' if n > 1 else ''}" for n in names], loc="center left",
             bbox_to_anchor=(1.01, 0.5))
    return save(figure, out, "throughput", machine)


def draw_balance(results, machine, out):
    rows = of_bench(results, "balance")
    if not rows:
        return None
    panels = (("most loaded worker over the mean",
               (("filled_bytes_max_mean", "KV, filled"),
                ("churned_bytes_max_mean", "KV, after churn"),
                ("churned_batch_reads_max_mean", "reads of a step, after churn"))),
              ("microseconds a placement (p99: at most 100)",
               (("placement_p50", "p50"), ("placement_p99", "p99"))),
              ("bytes of the table a chunk (at most 100)",
               (("filled_bytes_per_chunk", "filled"), ("churned_bytes_per_chunk", "after churn"))))
    sizes = sorted({row["sequences"] for row in rows})
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.0))
    for axis, (title, lines) in zip(axes, panels):
        for (of, label), colour in zip(lines, LINES):
            line = sorted((row for row in rows if row["of"] == of),
                          key=lambda row: row["sequences"])
            axis.plot([row["sequences"] for row in line], [row["value"] for row in line], "o-",
                      ms=5, color=colour, label=label)
        axis.set_xscale("log")
        plain_ticks(axis, sizes)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.05)
        axis.set_xlabel("sequences")
        axis.set_title(title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), fontsize=8, ncols=len(lines))
    figure.suptitle(f"Placement on {rows[0]['workers']:,} simulated workers", x=0.01, ha="left",
                    fontsize=12)
    return save(figure, out, "balance", machine)


def draw(results, machine, out):
    """All pictures that the results allow. Returns their names."""
    pictures = [draw_one(results, machine, out) for draw_one in (
        draw_kernels, draw_layer, draw_fan, draw_begin, draw_balance, draw_throughput, draw_token)]
    return [picture for picture in pictures if picture is not None]
