"""The page of the report, with everything in it."""

import html
import math
import pathlib
import string

from fpnas_keras.architecture import Head, Stem, expanded_filters
from fpnas_keras.cost import format_cost
from fpnas_keras.errors import UserError
from fpnas_keras.report.plots import DARK, LIGHT
from fpnas_keras.runs.search_run import PHASES, Search

_LABELS = {
    "num_architectures": "architectures in the space",
    "num_logits": "logits",
    "total_samples": "samples drawn",
    "total_evaluated": "samples evaluated (equal ones of a step once)",
    "entropy": "entropy at the end (nats)",
    "expected_cost": "expected cost at the end",
    "found_cost": "cost of the derived network",
    "derivation_log_prob": "log p of the derived network (nats)",
    "derivation_least": "least cost that was asked for",
    "derivation_gap": "log p that a better one might have more (nats)",
    "macs": "MACs of the derived network",
    "params": "parameters of the derived network",
    "mode_validation_loss": "loss of the most probable network, shared weights",
    "mode_validation_accuracy": "accuracy of the most probable network, shared weights",
    "mode_macs": "MACs of the most probable network, whatever it costs",
    "wall_seconds": "time (seconds)",
    "cpu_seconds": "CPU time (seconds)",
    "peak_memory_mb": "peak memory (MB)",
}


def make_page(search: Search, pictures: dict[str, tuple[str, str, int]]) -> str:
    """The HTML of the page.

    Args:
        search: What it tells of.
        pictures: By name, the plot for light and for dark as data URIs, and its width in pixels.
    """
    name = pathlib.Path(search.flags["space"]).stem
    sections = [
        ("course", "Course of the search", _course_section(search, pictures)),
        ("network", "The network that was found", _network_section(search)),
        ("ranking", "Accuracy against cost", _ranking_section(search, pictures)),
        ("probabilities", "Probability of each choice", _probability_section(search, pictures)),
        ("totals", "Totals", _totals_section(search)),
        ("flags", "Flags", _table(("flag", "value"), sorted(search.flags.items()))),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{content}</section>\n'
        for key, title, content in sections
    )
    colors = [
        "".join(f"--{key.replace('_', '-')}:{value};" for key, value in theme.items())
        for theme in (LIGHT, DARK)
    ]
    return _PAGE.substitute(
        title=html.escape(f"Search of {name}"),
        style=_STYLE.substitute(light=colors[0], dark=colors[1]),
        summary=_summary_section(search, name),
        links=links,
        sections=body,
    )


def _summary_section(search, name):
    """Title, one sentence and the totals that matter most."""
    last, summary = search.epochs[-1], search.summary
    where = f"on {search.flags['data']}, {search.directory.resolve().name}"
    done = f"{last['epoch']:,} of {search.planned_epochs:,} epochs"
    if summary:
        cost, label = summary["found_cost"], "found cost"
        tiles = [
            ("samples", summary["total_samples"], f"{summary['total_evaluated']:,} evaluated"),
            ("steps", summary["steps"], done),
        ]
        usage = [
            (
                "time",
                _duration(summary["wall_seconds"]),
                f"{_duration(summary['cpu_seconds'])} CPU",
            ),
            ("memory", f"{summary['peak_memory_mb'] / 1000:.1f} GB", "at its peak"),
        ]
    else:
        cost, label = last["expected_cost"], "expected cost"
        tiles = [("samples", last["total_samples"], ""), ("steps", last["step"], done)]
        usage = [("time", _duration(last["seconds"]), "")]
    target = "no target"
    if search.target is not None:
        target = f"{cost / search.target:.1%} of the target {format_cost(search.target)}"
    tiles = [(label, f"{format_cost(cost)} {search.unit}", target)] + [
        (label, f"{value:,}", note) for label, value, note in tiles
    ]
    return (
        f"<h1>Search of {html.escape(name)}</h1><p>{html.escape(where)}</p>"
        f"{_left_out(search)}<dl class=tiles>{''.join(_tile(*each) for each in tiles + usage)}</dl>"
    )


def _tile(label, value, note):
    label, value, note = map(html.escape, (label, value, note))
    return f"<div><dt>{label}</dt><dd>{value}</dd><dd class=note>{note}</dd></div>"


def _left_out(search):
    """What the page lacks, and why."""
    notes = []
    if search.summary is None:
        notes.append("The search has not ended: this is how it stands after its last epoch.")
    missing = [
        f"{what} (no {file})"
        for what, file, content in (
            ("the network that was found", "architecture.json", search.architecture),
            ("accuracy against cost", "ranking.json", search.ranking),
            ("the probabilities", "probabilities.jsonl", search.probabilities),
        )
        if not content
    ]
    if missing:
        notes.append(f"Left out: {', '.join(missing)}.")
    return f"<p class=notice>{' '.join(notes)}</p>" if notes else ""


def _course_section(search, pictures):
    first, last = search.epochs[0], search.epochs[-1]
    phases = ", ".join(
        f'<span class="phase" style="background:var(--{name.replace("_", "-")})">{PHASES[name]}'
        f"</span> to step {end:,}"
        for name, _, end in search.phases
    )

    def course(column, digits=".3g"):
        return f"from {first[column]:{digits}} to {last[column]:{digits}}"

    costs = f"from {format_cost(first['expected_cost'])} to {format_cost(last['expected_cost'])} {search.unit}"
    target = f", target {format_cost(search.target)}" if search.target is not None else ""
    plots = {
        "entropy": (
            "Entropy and samples",
            f"Entropy {course('entropy')} nats; samples a step {course('samples')}.",
        ),
        "cost": ("Expected cost", f"Expected cost {costs}{target}."),
        "loss": (
            "Loss and accuracy, means of the samples",
            f"Loss of the weights part {course('train_loss')}, of the architecture part "
            f"{course('validation_loss')}.",
        ),
    }
    figures = "".join(
        f"<figure><figcaption>{title}</figcaption>{_picture(pictures[name], alt)}</figure>"
        for name, (title, alt) in plots.items()
    )
    return f"<p>Phases: {phases}.</p><div class=course>{figures}</div>"


def _picture(picture, alt):
    light, dark, width = picture
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" width="{width}" alt="{html.escape(alt)}"></picture>'
    )


def _wide(content, label):
    """A box that scrolls on its own where the page is narrower."""
    return (
        f'<div class=wide tabindex=0 role=region aria-label="{html.escape(label)}">{content}</div>'
    )


def _network_section(search):
    if search.architecture is None:
        return ""
    parts = search.architecture.parts()
    try:
        costs = [search.cost(part) for part in parts]
    except KeyError as error:
        raise UserError(
            f"architecture.json in {search.directory} has a part that its latency table lacks: "
            f"{error}"
        ) from None
    unit, total, largest = search.cost.unit, sum(costs), max(costs)
    names = ["stem", *(f"block {index}" for index in range(len(parts) - 2)), "head"]
    rows = []
    for name, part, cost in zip(names, parts, costs):
        kind = "skipped" if getattr(part.layers, "skip", False) else "part"
        rows.append(
            f"<li class=tensor>{_shape(part)}</li>"
            f"<li class={kind}><b>{name}</b> <span class=what>{_describe(part)}</span> "
            f"<i class=bar><i style='width:{100 * cost / (largest or 1):.1f}%'></i></i> "
            f"<span class=cost>{format_cost(cost)} {unit}</span> "
            f"<span class=share>{cost / (total or 1):.1%}</span></li>"
        )
    return (
        f"<p>{format_cost(total)} {unit} in all. Bars: {unit} of each part. Between the parts: height x "
        f"width x channels.</p><ol class=network>{''.join(rows)}"
        f"<li class=tensor>{search.architecture.num_classes:,} classes</li></ol>"
    )


def _shape(part):
    return f"{part.size[0]} &times; {part.size[1]} &times; {part.channels}"


def _describe(part):
    """What a part computes, for people."""
    layers = part.layers
    if isinstance(layers, Head):
        dense = f", dense layer of {layers.dense_units}" if layers.dense_units else ""
        return (
            f"1&times;1 to {layers.filters} channels, {layers.activation}, average pooling{dense}"
        )
    stride = f", stride {layers.strides}" if layers.strides > 1 else ""
    kernel = f"{layers.kernel_size}&times;{layers.kernel_size}"
    if isinstance(layers, Stem):
        return f"{kernel} convolution{stride}, {layers.activation}"
    keeps_shape = layers.strides == 1 and layers.filters == part.channels
    if layers.skip:
        return "skipped" if keeps_shape else f"skipped, with a 1&times;1 projection{stride}"
    if layers.expansion != 1:
        expanded = expanded_filters(part.channels, layers.expansion)
        kernel += f", expansion {layers.expansion:g} to {expanded} channels"
    attention = {0: "", 1: ", squeeze-excite"}.get(
        layers.splits, f", split-attention over {layers.splits}"
    )
    adds_input = ", adds its input" if keeps_shape else ""
    return f"{kernel}, {layers.activation}{attention}{stride}{adds_input}"


def _ranking_section(search, pictures):
    if "pareto" not in pictures:
        return ""
    networks, images = search.ranking["architectures"], search.ranking["images"]
    best = max(networks, key=lambda each: each["accuracy"])
    alt = (
        f"{len(networks)} networks, cost against accuracy; the best, {best['name']}, reaches "
        f"{best['accuracy']:.2%} at {format_cost(best['cost'])} {search.ranking['cost_unit']}."
    )
    head = ("rank", "network", "accuracy", "loss", f"cost ({search.ranking['cost_unit']})")
    head += ("MACs", "parameters", "log p", "on the Pareto front")
    rows = [
        (
            *(str(each["rank"]), each["name"], f"{each['accuracy']:.2%}", f"{each['loss']:.4f}"),
            *(format_cost(each["cost"]), f"{each['macs']:,}", f"{each['params']:,}"),
            "" if each["log_prob"] is None else f"{each['log_prob']:.2f}",
            "yes" if each["pareto"] else "",
        )
        for each in sorted(networks, key=lambda each: each["rank"])
    ]
    return (
        f"<p>{len(networks):,} networks with the shared weights, on {images:,} images. "
        "Pareto front: nothing cheaper is as accurate.</p>"
        f"{_wide(_picture(pictures['pareto'], alt), 'Plot of accuracy against cost')}"
        f"<details><summary>All {len(networks):,}, as a table</summary>"
        f"{_table(head, rows)}</details>"
    )


def _probability_section(search, pictures):
    if "probabilities" not in pictures:
        return ""
    last = search.probabilities[-1]
    rows = [
        (
            f"block {index}",
            name,
            ", ".join(
                f"{choice}: {value:.1%}"
                for choice, value in sorted(choices.items(), key=lambda item: -item[1])
            ),
        )
        for index, block in enumerate(last["blocks"])
        for name, choices in block.items()
    ]
    alt = (
        f"Heat maps over the steps, one a block, of the probability of each choice; the table "
        f"below has the values after step {last['step']:,}."
    )
    head = ("block", "variable", "choices, most probable first")
    return (
        "<p>After each epoch. For what a skipped block lacks, as its kernel size, it holds where "
        "the block is not skipped. Blocks that share their choices are one here; what has one "
        "choice alone is left out.</p>"
        f"{_wide(_picture(pictures['probabilities'], alt), 'Heat maps of the probabilities')}"
        f"<details><summary>After step {last['step']:,}, as a table</summary>"
        f"{_table(head, rows)}</details>"
    )


def _totals_section(search):
    if search.summary is None:
        return ""
    rows = [
        (_LABELS.get(key, key.replace("_", " ")), _value(value))
        for key, value in search.summary.items()
    ]
    return _table(("total", "value"), rows)


def _value(value):
    """A value of the summary, for people."""
    if isinstance(value, list):
        return " x ".join(map(_scalar, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_scalar(each)}" for key, each in value.items())
    return _scalar(value)


def _scalar(value):
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        digits = str(abs(value))
        return f"{value:,}" if len(digits) < 15 else f"{digits[0]}.{digits[1]}e{len(digits) - 1}"
    if isinstance(value, float):
        return format_cost(value)
    return value if isinstance(value, str) else "..."


def _duration(seconds):
    if not math.isfinite(seconds):
        return f"{seconds} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _table(head, rows):
    """A table of text, whose first column names the rows."""
    heads = "".join(f"<th scope=col>{html.escape(each)}</th>" for each in head)
    body = "".join(
        f"<tr><th scope=row>{html.escape(first)}</th>"
        + "".join(f"<td>{html.escape(each)}</td>" for each in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    table = f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"
    return _wide(table, f"Table: {head[0]}, {head[1]}")


_STYLE = string.Template("""
:root { color-scheme: light dark; $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 8px; }
h1 + p { color: var(--muted); margin: 4px 0 16px; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); margin-top: 32px; padding-top: 20px; }
section > p { color: var(--muted); max-width: 90ch; margin: 0 0 12px; }
a, summary { color: var(--first); }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 16px; }
:focus-visible { outline: 2px solid var(--first); outline-offset: 2px; }
.notice {
  background: var(--raised); border-left: 4px solid var(--second); padding: 8px 12px;
  margin: 0 0 16px;
}
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 0;
}
.tiles div { background: var(--raised); border-radius: 8px; padding: 12px 14px; }
.tiles dt, .tiles .note { color: var(--muted); font-size: 0.85rem; font-weight: 400; }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3; }
.phase { color: var(--ink); padding: 1px 8px; border-radius: 4px; }
.course {
  display: grid; gap: 24px 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
}
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 4px; }
img { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.wide img { max-width: none; }
summary { cursor: pointer; margin: 12px 0; }
table, .network { font-size: 0.9rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; }
th, td {
  text-align: left; vertical-align: top; padding: 5px 24px 5px 0;
  border-bottom: 1px solid var(--line);
}
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
.network { list-style: none; margin: 0; padding: 0; }
.tensor {
  color: var(--muted); font-size: 0.8rem; line-height: 22px; padding-left: 14px;
  margin-left: 20px; border-left: 2px solid var(--line);
}
.part, .skipped {
  display: grid; grid-template-columns: 4.5rem minmax(0, 1fr) 20% 8.5rem 3.5rem;
  gap: 4px 12px; align-items: center; background: var(--raised); padding: 5px 12px;
  border: 1px solid var(--line); border-left: 4px solid var(--first); border-radius: 6px;
}
.skipped { background: none; border-style: dashed; border-left: 4px solid var(--line); }
.skipped, .share { color: var(--muted); }
.bar { background: var(--ground); height: 10px; border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--first); }
.skipped .bar { background: none; }
.cost, .share { text-align: right; }
@media (max-width: 760px) {
  main { padding: 16px 14px 48px; }
  .part, .skipped { grid-template-columns: 4rem minmax(0, 1fr) auto; }
  .what { grid-row: 2; grid-column: 1 / -1; }
  .bar { grid-row: 3; grid-column: 1 / -1; }
  .skipped .bar { display: none; }
}
""")

_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
$summary
<nav aria-label="Sections">$links</nav>
</header>
$sections</main>
</body>
</html>
""")
