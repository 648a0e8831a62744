"""What a run of bench/gpu says: ratios, verdicts, lines and tables. Pure functions of its JSON.

A run is {"machine", "limits": {"read", "matmul", ...}, "absent": {what: why}, "rows": [row]}. A row
is a point (its "case", "kind", "bytes", "flops", ...) with "ours": {"us", "error", ...} and "peers":
{name: the same}. A side that has no "us" says why: {"refused": why} or {"absent": why}.
"""

# How far an answer may be from sums in float64, |got - want| / |want|: weights and answers are
# rounded to bf16, which is some 0.002 to 0.005.
ERROR_MAX = 0.02

PEERS = {
    "cascade": "FlashInfer's cascade", "fi_tc": "FlashInfer's decode, tensor cores",
    "fi_cuda": "FlashInfer's decode, CUDA cores", "xqa": "XQA, by FlashInfer",
    "holistic": "FlashInfer's BatchAttention", "fa2": "FlashInfer's prefill, FA2",
    "fa3": "FlashInfer's prefill, FA3", "fmha_v2": "TensorRT-LLM's prefill, by FlashInfer",
    "cudnn": "cuDNN, contiguous KV", "sdpa": "PyTorch's FlashAttention, contiguous KV",
}
KINDS = {
    "decode": "Decode", "skewed": "Decode, skewed lengths", "shared": "Shared prefix",
    "sparse": "Sparse page lists", "prefill": "Prefill, causal",
}
OF_KIND = {
    "decode": ("fi_tc", "fi_cuda", "xqa", "holistic", "cudnn", "sdpa"),
    "prefill": ("fa2", "fa3", "fmha_v2", "cudnn", "sdpa"),
}
OF_KIND["skewed"] = OF_KIND["sparse"] = OF_KIND["decode"]
OF_KIND["shared"] = ("cascade", *OF_KIND["decode"])
PAGED_PREFILL = ("fa2", "fa3", "fmha_v2")

LARGE = 512 << 10  # tokens of a batch from which on the launch does not count


# ---- one row ----

def counts(side):
    """Is it a time of a right answer?"""
    error = (side or {}).get("error")
    return bool(side) and "us" in side and error is not None and error <= ERROR_MAX


def rate(row, side):
    """TB/s, or TFLOP/s where arithmetic is the limit."""
    return row["flops" if row["kind"] == "prefill" else "bytes"] / side["us"] / 1e6


def unit(row):
    return "TFLOP/s" if row["kind"] == "prefill" else "TB/s"


def limit_of(row, limits):
    """Of the unit, or None where it was not measured."""
    value = limits.get("matmul" if row["kind"] == "prefill" else "read")
    return value / 1e12 if value else None


def fraction(row, side, limits):
    limit = limit_of(row, limits)
    return rate(row, side) / limit if limit else None


def over(row, limits):
    """Microseconds that ours takes more than its bytes do at the read limit."""
    return row["ours"]["us"] - row["bytes"] / limits["read"] * 1e6


def best_of(row, names=None):
    """(name, side) of the fastest peer with a right answer, or None."""
    right = [(side["us"], name) for name, side in row["peers"].items()
             if counts(side) and (names is None or name in names)]
    return (min(right)[1], row["peers"][min(right)[1]]) if right else None


def ratio(row, names=None):
    """How many times as fast as the best peer ours is, or None."""
    best = best_of(row, names)
    return best[1]["us"] / row["ours"]["us"] if best and counts(row["ours"]) else None


# ---- verdicts ----

def targets_of(row, limits, by_case):
    """(what, value, bound, at least?): what is wanted of a row, where both sides are there."""
    if not counts(row["ours"]):
        return
    tokens = row["bytes"] / (4.0 * row["kv_heads"] * row["d"])
    best = ratio(row)
    case, kind = row["case"], row["kind"]
    if kind == "prefill":
        dense, paged = ratio(row, ("cudnn",)), ratio(row, PAGED_PREFILL)
        if dense is not None:
            yield "of cuDNN's dense", dense, 0.95, True
        if paged is not None:
            yield "of the best paged peer", paged, 1.0, True
        if row["n"] == 1 and case.startswith("prefill 1 x 1k on 32k"):
            yield "TFLOP/s", rate(row, row["ours"]), 600.0, True
        other = by_case.get(case.removesuffix(" page 1") + " page 64")
        if case.endswith(" page 1") and other is not None and counts(other["ours"]):
            yield "of the time with pages of 64", row["ours"]["us"] / other["ours"]["us"], 1.03, False
        return
    if kind == "shared":
        if best is not None and row["n"] >= 16 and row["shared"] >= 8192:
            yield "of the best peer", best, 3.0, True
        return
    if limits.get("read"):
        if tokens >= LARGE:
            yield "of the read limit", fraction(row, row["ours"], limits), 0.97, True
        else:
            yield "us over its bytes", over(row, limits), 5.0, False
        if case == "decode b64 zipf 4k":
            yield "of the read limit", fraction(row, row["ours"], limits), 0.95, True
    if best is not None:
        yield "of the best peer", best, 1.25 if case == "decode b16 zipf 1k" else 1.0, True


def verdicts(run):
    """(case, what, value, bound, at least?, met?) of all rows."""
    by_case = {row["case"]: row for row in run["rows"]}
    found = []
    for row in run["rows"]:
        for what, value, bound, least in targets_of(row, run["limits"], by_case):
            met = value >= bound if least else value <= bound
            found.append((row["case"], what, value, bound, least, met))
    return found


# ---- words ----

def why_not(side):
    if side is None:
        return "-"
    if "us" in side:
        return "wrong"
    return "absent" if "absent" in side else "-"


def microseconds(value):
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def line(row, limits):
    """A row for people, as it is measured."""
    ours = row["ours"]
    text = f"{row['case']:<30} "
    if "us" in ours:
        share = fraction(row, ours, limits)
        of = f" {share * 100:5.1f} %" if share is not None else ""
        number = rate(row, ours)
        text += f"{ours['us']:9.2f} us {number:8.{3 if number < 10 else 1}f} {unit(row)}{of}"
    else:
        text += f"ours: {ours.get('absent') or ours.get('refused')}"
    if "us" in ours and not counts(ours):
        text += f"  WRONG by {ours.get('error')}"
    sides = [f"{name} {microseconds(side['us'])}" + ("" if counts(side) else " WRONG")
             for name, side in row["peers"].items() if "us" in side]
    text += "  | " + (", ".join(sides) or "no peer")
    best = ratio(row)
    return text + (f"  | {best:.2f} of {best_of(row)[0]}" if best is not None else "")


def cell(side):
    return microseconds(side["us"]) if counts(side) else why_not(side)


def table(run, kind):
    """Lines of a table in Markdown; the fastest peer of a row stands in bold."""
    rows = [row for row in run["rows"] if row["kind"] == kind]
    names = [name for name in OF_KIND[kind] if any("us" in row["peers"].get(name, {})
                                                   for row in rows)]
    heads = ["point", "us", unit(rows[0]), "of the limit", "of the best peer", *names]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        ours, best = row["ours"], best_of(row)
        cells = [row["case"], cell(ours), "-", "-", "-"]
        if counts(ours):
            number, share, times = rate(row, ours), fraction(row, ours, run["limits"]), ratio(row)
            cells[2] = f"{number:.{2 if number < 10 else 0}f}"
            cells[3] = f"{share:.2f}" if share is not None else "-"
            cells[4] = f"{times:.2f}" if times is not None else "-"
        for name in names:
            text = cell(row["peers"].get(name))
            cells.append(f"**{text}**" if best and best[0] == name else text)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plan_table(run):
    """Microseconds of a plan, which serves all layers of a step: ours, and theirs from Python."""
    rows = [row for row in run["rows"] if row["quick"] and "plan_us" in row["ours"]]
    names = [name for name in PEERS if any("plan_us" in row["peers"].get(name, {}) for row in rows)]
    if not rows:
        return []
    heads = ["plan of", "ours: plan + tables", *names]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        ours = row["ours"]
        cells = [row["case"], f"{ours['plan_us']:.0f} + {ours['tables_us']:.0f}"]
        for name in names:
            plan = row["peers"].get(name, {}).get("plan_us")
            cells.append(f"{plan:.0f}" if plan is not None else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def reasons(run):
    """Who did not serve what, and why: (name, why) with the points, in order. Not what is missing
    altogether."""
    found = {}
    for row in run["rows"]:
        for name, side in [("ours", row["ours"]), *row["peers"].items()]:
            why = side.get("refused") or side.get("absent")
            if "us" in side and not counts(side):
                error = side.get("error")
                why = "answered wrongly, by " + (f"{error:.2g}" if error is not None else "NaN")
            if why and why not in run["absent"].values():
                found.setdefault((name, why), []).append(row["case"])
    return found


def setting(run):
    limits, machine = run["limits"], run["machine"]
    text = f"{machine['device']}, {machine['kind']}, commit {machine['commit']}, " \
           f"{machine['date'][:10]}."
    if limits.get("read"):
        text += f" Memory reads {limits['read'] / 1e12:.3f} TB/s in this run"
        if limits.get("read_after"):
            text += f" ({limits['read_after'] / 1e12:.3f} at its end)"
        text += "."
    if limits.get("matmul"):
        text += f" A product of matrices runs at {limits['matmul'] / 1e12:.0f} TFLOP/s."
    if machine.get("versions"):
        text += " " + ", ".join(f"{name} {of}" for name, of in machine["versions"].items()) + "."
    return text


def markdown(run):
    """All tables, for docs/performance.md."""
    lines = [setting(run), ""]
    for kind, title in KINDS.items():
        if any(row["kind"] == kind for row in run["rows"]):
            lines += [f"**{title}**, us:", "", *table(run, kind), ""]
    plans = plan_table(run)
    if plans:
        lines += ["**Plans**, us:", "", *plans, ""]
    judged = verdicts(run)
    if judged:
        met = sum(verdict[-1] for verdict in judged)
        lines += [f"{met} of {len(judged)} targets met. Missed:" if met < len(judged)
                  else f"All {met} targets met.", ""]
        lines += [f"- {case}: {value:.3g} {what}, at {'least' if least else 'most'} {bound:g}"
                  for case, what, value, bound, least, ok in judged if not ok] + [""]
    for what, why in run["absent"].items():
        lines.append(f"- Not there: {what}: {why}.")
    for (name, why), cases in reasons(run).items():
        some = ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")
        lines.append(f"- {name}: {why} ({some}).")
    if run.get("unreached"):
        lines.append(f"- Out of time, not measured: {', '.join(run['unreached'])}.")
    return "\n".join(lines).rstrip() + "\n"
