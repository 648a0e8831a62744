"""What a run of bench/latency says: its ladder as a table. Pure functions of its JSON, as
scaling_report. A row is a rung of a shape: "value" is p50 of what is left of a layer without what the
worker computed, or "absent" says why it is not there."""

from scaling_report import setting


def rungs(run):
    return [row for row in run["rows"] if "rung" in row]


def shapes(run):
    return list(dict.fromkeys(row["shape"] for row in rungs(run) if "value" in row))


def number(value):
    return f"{value:.2f}" if value else ""


def table(run, shape):
    lines = ["| rung | p50 | p99 | p99.9 | computed | hop | send | of the bare one |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rungs(run):
        if row["shape"] == shape and "value" in row:
            ratio = "" if not row["target"] else (
                f"{row['ratio']:.2f}, at most {row['target']:g}: "
                f"{'met' if row['ratio'] <= row['target'] else '**missed**'}")
            lines.append("| " + " | ".join((
                row["rung"], f"{row['value']:.2f}", f"{row['p99']:.2f}", f"{row['p999']:.2f}",
                number(row["computed"]), number(row["hop"]), number(row["send"]), ratio)) + " |")
    return lines


def left_out(run):
    reasons = {}
    for row in rungs(run):
        if "absent" in row:
            reasons.setdefault(row["absent"], []).append(f"{row['rung']} ({row['shape']})")
    return [f"- {', '.join(which)}: {why}" for why, which in reasons.items()]


def summary(run):
    judged = [row for row in run["rows"] if row.get("target")]
    met = sum(row["ratio"] <= row["target"] for row in judged)
    return "\n".join((setting(run), f"{met} of {len(judged)} targets met", *left_out(run)))


def markdown(run):
    lines = ["# bench/latency", "", setting(run), "",
             "Microseconds of a layer without what the worker computed, which is beside it. hop, send: "
             "what the client's own meter says of a run's way there and back, and of it its thread's "
             "sending. Rungs are of so many bytes of q.", ""]
    for shape in shapes(run):
        lines += [f"## {shape}", "", *table(run, shape), ""]
    absent = left_out(run)
    return "\n".join(lines + (["## Left out", "", *absent, ""] if absent else []))
