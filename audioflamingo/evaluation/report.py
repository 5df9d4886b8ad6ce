"""One page about a run, in HTML: scores, plots, what could not be read, what went wrong. It needs nothing beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audioflamingo.evaluation.scoring import ItemResult
from audioflamingo.figures import new_figure
from audioflamingo.files import write_whole

REPORT_FILE = "report.html"
MAX_LISTED = 50  # items of each list
MAX_BARS = 30
_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; } th, td { padding: .2rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; } td.text { text-align: left; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; } .note { color: #666; }
</style>
<h1>{{ title }}</h1>
<p>{{ headline }}</p>
<table><tr><th></th><th>items</th><th>WER</th><th>right</th><th>official</th><th>unparsed</th><th>failed</th></tr>
{% for name, row in rows %}<tr><td>{{ name }}</td><td>{{ row.num_items }}</td><td>{{ number(row.wer) }}</td>
<td>{{ number(row.accuracy) }}</td><td>{{ number(row.official_accuracy) }}</td><td>{{ row.num_unparsed }}</td>
<td>{{ row.num_failed }}</td></tr>
{% endfor %}</table>
<p class="note">"right": by our rule, text first, then letter; "official": by the benchmark's own. Answers that name no
option and questions that could not be asked count as wrong. Intervals: 95 %, bootstrap over items.</p>
{% for picture in pictures %}<img alt="plot" src="data:image/png;base64,{{ picture }}">{% endfor %}
{% for heading, items in lists if items %}<h2>{{ heading }} ({{ items|length }})</h2>
<table><tr><th>id</th><th>expected</th><th>answered</th></tr>
{% for item in items[:limit] %}<tr><td>{{ item.id }}</td><td class="text">{{ item.expected }}</td>
<td class="text">{{ item.error or item.answer }}</td></tr>
{% endfor %}</table>{% endfor %}
<h2>What the answers depend on</h2><pre>{{ manifest }}</pre></html>
"""


def write_report(
    folder: Path, manifest: dict[str, Any], scores: dict[str, Any], items: Sequence[ItemResult]
) -> Path:
    """Writes `report.html`.

    Args:
        folder: of the run.
        manifest: of the run.
        scores: `Evaluation.to_dict`.
        items: of the run.

    Raises:
        OutputError: it cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    from jinja2 import Environment

    rows = [("all", scores["all"])]
    for name, parts in scores["groups"].items():
        if len(parts) > 1:
            rows += [(f"{name}: {value}", part) for value, part in parts.items()]
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    text = template.render(
        title=f"Evaluation: {manifest['suite'] or 'conversations'}",
        headline=headline(scores["all"]),
        rows=rows,
        pictures=[picture for picture in (_bars(rows), _word_errors(items)) if picture is not None],
        lists=[
            ("Could not be asked", [item for item in items if item.error is not None]),
            ("Name no option", [item for item in items if item.is_unparsed and item.error is None]),
            ("Wrong", [item for item in items if _is_wrong(item)]),
        ],
        limit=MAX_LISTED,
        number=lambda value: "" if value is None else f"{value:.4f}",
        manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
    )
    path = folder / REPORT_FILE
    write_whole(path, text.encode())
    return path


def headline(summary: dict[str, Any]) -> str:
    """The scores in a sentence."""
    parts = [f"{summary['num_items']} questions"]
    for name, key in (("word error rate", "wer"), ("right", "accuracy")):
        if summary[key] is not None:
            interval = summary[f"{key}_interval"]
            low_high = "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"
            parts.append(f"{name} {summary[key]:.4f}{low_high}")
    if summary["official_accuracy"] is not None:
        parts.append(f"right by the benchmark's rule {summary['official_accuracy']:.4f}")
    if summary["rtfx"] is not None:
        parts.append(f"{summary['rtfx']:.1f} s of audio a second")
    for name, key in (
        ("without a key", "num_unscored"),
        ("unparsed", "num_unparsed"),
        ("failed", "num_failed"),
    ):
        if summary[key]:
            parts.append(f"{summary[key]} {name}")
    return "; ".join(parts) + "."


def _is_wrong(item: ItemResult) -> bool:
    is_other = item.error is not None or item.is_unparsed or item.scoring == "unscored"
    return not item.is_correct and not is_other


def _bars(rows: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    """Shares that are right (or word error rates) with their intervals."""
    key = "accuracy" if rows[0][1]["accuracy"] is not None else "wer"
    shown = [(name, row) for name, row in rows if row[key] is not None][:MAX_BARS]
    if not shown:
        return None
    figure = new_figure(8, 1 + 0.3 * len(shown))
    axes = figure.add_subplot()
    values = [row[key] for _, row in shown]
    intervals = [row[f"{key}_interval"] or (row[key], row[key]) for _, row in shown]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)]
    axes.barh(range(len(shown)), values, xerr=[below, above], color="#5b8db8", ecolor="#333", capsize=2)
    axes.set_yticks(range(len(shown)), [f"{name} ({row['num_items']})" for name, row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("right" if key == "accuracy" else "word error rate")
    axes.set_xlim(left=0)
    return _png(figure)


def _word_errors(items: Sequence[ItemResult]) -> str | None:
    """How many transcripts have which word error rate."""
    rates = [item.num_errors / max(1, item.num_words) for item in items if item.scoring == "transcription"]
    if not rates:
        return None
    figure = new_figure(8, 3)
    axes = figure.add_subplot()
    axes.hist([min(rate, 1.5) for rate in rates], bins=[i / 20 for i in range(31)], color="#5b8db8")
    axes.set_xlabel("word error rate of a recording (1.5: and more)")
    axes.set_ylabel("recordings")
    return _png(figure)


def _png(figure: Any) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return base64.b64encode(content.getvalue()).decode()
