"""What a run of bench/scaling says: speed-ups, verdicts, tables. Pure functions of its JSON.

A run is {"machine", "arguments", "rows": [row], "exchange": [row]}. A row is of a case, so many
workers, a place of merging and a way of its tensors: with "value" (microseconds a layer, p50),
"computed", "begin", "commit", "predicted", "bits", ..., or with "absent": why there is none. Rows of
the exchange are of GPUs alone: {"workers", "rows", "us"} or {"workers", "absent"}.
"""

# Speed-up over one worker, at least; and microseconds of the exchange with its merge, at most.
SPEEDUPS = {
    "decode 1 x 1M": {2: 1.9, 4: 3.7, 8: 7.0},
    "decode 1 x 4M": {8: 7.6},
    "decode 64 x 32k": {2: 1.9, 4: 3.7},
    "prefill 128k": {2: 1.8, 4: 3.4},
}
HOPS = {(2, 32): 4, (2, 256): 4, (2, 2048): 8, (4, 32): 5, (4, 256): 5, (4, 2048): 8, (8, 32): 7,
        (8, 256): 7}


def counts(row):
    """Is it a time, of right answers, of workers that had a device each?"""
    return "value" in row and not row["shared"] and row["bits"] != "DIFFER"


def cases(run):
    return list(dict.fromkeys(row["case"] for row in run["rows"]))


def fastest(run, case, workers):
    """The row that a user would choose: merging and tensors as they are fastest."""
    rows = [row for row in run["rows"]
            if row["case"] == case and row["workers"] == workers and counts(row)]
    return min(rows, key=lambda row: row["value"]) if rows else None


def speedup(run, case, workers):
    """The best of so many workers against the best of one, or None."""
    one, row = fastest(run, case, 1), fastest(run, case, workers)
    return one["value"] / row["value"] if one and row else None


def beside(row):
    """Of a layer, what workers did not compute: the way there and back, and merging here."""
    return row["value"] - row["computed"]


def merge_hop(run, row):
    """What more workers and the client's merging take beside computing, over one worker asked in the
    same way; None where nothing is merged here, or there is no such row."""
    if row["workers"] == 1 or row["grouped"] or not row["computed"] or row.get("lies") == "whole":
        return None
    one = next((other for other in run["rows"]
                if other["case"] == row["case"] and other["workers"] == 1
                and other["way"] == row["way"] and "value" in other), None)
    return beside(row) - beside(one) if one else None


def verdicts(run):
    """(what, value or None, bound, at least?, met or None, why not) of all targets."""
    found = []
    for case, bounds in SPEEDUPS.items():
        for workers, bound in bounds.items():
            value = speedup(run, case, workers)
            mine = [row for row in run["rows"] if row["case"] == case]
            why = "" if value is not None else next(
                (row["absent"] for row in mine if row["workers"] in (workers, 1)
                 and "absent" in row), "not asked for")
            found.append((f"{case} on {workers}, speed-up", value, bound, True,
                          None if value is None else value >= bound, why))
    for (workers, rows), bound in HOPS.items():
        hops = [row for row in run.get("exchange", []) if row["workers"] == workers]
        value = next((row["us"] for row in hops if row.get("rows") == rows), None)
        why = "" if value is not None else next(
            (row["absent"] for row in hops if "absent" in row), "no GPUs here")
        found.append((f"merge hop of {rows} rows on {workers}, us", value, bound, False,
                      None if value is None else value <= bound, why))
    return found


# ---- words ----

def us(value):
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def table(run, case):
    lines = ["| workers | merged by | tensors | p50 | p99 | computed | beside | merge hop | "
             "begin + commit | speed-up | efficiency | predicted | measured / predicted | bits |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    one = fastest(run, case, 1)
    for row in run["rows"]:
        if row["case"] != case or "value" not in row:
            continue
        times = one["value"] / row["value"] if one and not row["shared"] else None
        said, hop = row["predicted"], merge_hop(run, row)
        lines.append("| " + " | ".join((
            str(row["workers"]) + (" (sharing GPUs)" if row["shared"] else ""),
            "workers" if row["grouped"] else "-" if row["workers"] == 1 else "client",
            row["way"], us(row["value"]), us(row["p99"]), us(row["computed"]) if row["computed"] else "-",
            us(beside(row)) if row["computed"] else "-", us(hop) if hop is not None else "-",
            us(row["begin"] + row["commit"]), f"{times:.2f}" if times else "-",
            f"{100 * times / row['workers']:.0f} %" if times else "-",
            us(said) if said else "-", f"{row['value'] / said:.2f}" if said else "-",
            "**differ**" if row["bits"] == "DIFFER" else row["bits"])) + " |")
    return lines if len(lines) > 2 else []


def left_out(run):
    """{why: [which]} of what is not there."""
    reasons = {}
    for row in run["rows"]:
        if "absent" in row:
            which = f"{row['case']} on {row['workers']}"
            which += "" if row["way"] == "host" else f", {row['way']}"
            reasons.setdefault(row["absent"], []).append(which)
    for row in run.get("exchange", []):
        if "absent" in row:
            reasons.setdefault(row["absent"], []).append(f"merge hop on {row['workers']}")
    return reasons


def setting(run):
    machine = run["machine"]
    gpus = machine.get("gpus") or []
    what = f"{len(gpus)} x {gpus[0]}, " if gpus else ""
    return (f"{what}{machine['cpu']}, {machine['cores']} cores; commit {machine['commit']}, "
            f"{machine['date'][:16]}")


def judged_lines(run):
    for what, value, bound, least, met, why in verdicts(run):
        of = f"at {'least' if least else 'most'} {bound:g}"
        if value is None:
            yield f"- {what}: not measured ({why}); {of}"
        else:
            yield f"- {what}: {value:.2f}, {of}: {'met' if met else '**missed**'}"


def summary(run):
    judged = [verdict for verdict in verdicts(run) if verdict[4] is not None]
    rows = [row for row in run["rows"] if "value" in row]
    wrong = sum(row["bits"] == "DIFFER" for row in rows)
    return "\n".join((
        setting(run),
        f"{len(rows)} rows, {wrong} with other bits than one worker's",
        f"{sum(verdict[4] for verdict in judged)} of {len(judged)} targets met, "
        f"{len(verdicts(run)) - len(judged)} not measured"))


def markdown(run):
    lines = ["# bench/scaling", "", setting(run), "",
             "Microseconds a layer as the client sees it (prefill: of the whole sequence). computed: "
             "of it the slowest worker, storing, attending and, in a group, merging; beside: the "
             "rest, which is the way there and back and the client's merging; merge hop: how much more "
             "that is than with one worker, where the client merges. Speed-up: against the "
             "fastest row of one worker. predicted: by the cost model, before it was measured.", ""]
    for case in cases(run):
        rows = table(run, case)
        lines += [f"## {case}", "", *rows, ""] if rows else []
    hops = [row for row in run.get("exchange", []) if "us" in row]
    if hops:
        lines += ["## The merge hop", "", "Exchange between GPUs and its merge, from a CUDA graph, "
                  "p50 of the slowest GPU.", "", "| GPUs | rows | us |", "|---|---|---|",
                  *(f"| {row['workers']} | {row['rows']} | {row['us']:.2f} |" for row in hops), ""]
    lines += ["## Targets", "", *judged_lines(run), ""]
    reasons = left_out(run)
    if reasons:
        lines += ["## Left out", ""]
        lines += [f"- {why}: {'; '.join(which)}" for why, which in reasons.items()] + [""]
    return "\n".join(lines)
