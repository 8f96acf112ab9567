"""The report as one page of HTML: it opens offline, asks nobody for anything, and is light, dark, or printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from broadcaster.core.errors import OutputError
from broadcaster.core.files import whole_file
from broadcaster.core.text import printable
from broadcaster.loadtest.report.outcome import Outcome
from broadcaster.loadtest.report.page.drawing import Picture
from broadcaster.loadtest.report.page.pictures import pictures
from broadcaster.loadtest.report.text import columns, rows, schedule

_TEMPLATE: Final = Path(__file__).with_name("template.html")


def write_page(outcome: Outcome, path: Path) -> None:
    """Write the page of a run.

    Raises:
        OutputError: The file cannot be written.
    """
    html = page(outcome)
    try:
        with whole_file(path) as file:
            file.write(html)
    except OSError as error:
        raise OutputError(path, error) from None


def page(outcome: Outcome) -> str:
    """The whole page."""
    body = [
        _head(outcome),
        *map(_section, pictures(outcome)),
        _limits(outcome),
        _figures(outcome),
        _named(
            "Rig", _rig(outcome), "What the run has measured of itself between first publish and last delivery."
        ),
        _named("Hub", outcome.hub, "Its own counters, when the run had ended."),
        _named("Machine and versions", outcome.machine, ""),
        f"<h2>Settings</h2>\n<p class=muted>SHA-256 {outcome.settings_sha256[:16]}…</p>\n"
        f"{_folded('broadcaster.toml of the run', f'<pre>{_text(outcome.settings)}</pre>')}",
    ]
    html = _TEMPLATE.read_text(encoding="utf-8")
    return html.replace("{{title}}", _text(f"Load test {outcome.name}")).replace("{{body}}", "\n".join(body))


def _text(value: object) -> str:
    """A value as text that is no markup, and has no control characters but line ends."""
    return "\n".join(escape(printable(line)) for line in str(value).split("\n"))


def _head(outcome: Outcome) -> str:
    validity, whole = outcome.validity, outcome.whole
    words = [(outcome.verdict, outcome.verdict == "PASSED"), (validity.word, not validity.reasons)]
    marks = "".join(f'<li class="{"good" if good else "bad"}">{word}</li>' for word, good in words)
    reasons = [*(f"INVALID: {reason}." for reason in validity.reasons), *(f"{each}." for each in outcome.broken)]
    tiles = {
        "p50": _ms(whole.p50_ms),
        "p99": _ms(whole.p99_ms),
        "max": _ms(whole.max_ms),
        "p50 to the last subscriber": _ms(whole.last_p50_ms),
        "received deliveries": f"{whole.received:,}",
        "expected deliveries": f"{whole.expected:,}",
    }
    shown = "".join(f"<div><span class=muted>{name}</span><b>{value}</b></div>" for name, value in tiles.items())
    return (
        f"<h1>Load test {_text(outcome.name)}</h1>\n<ul class=words>{marks}</ul>\n"
        + (f"<ul class=reasons>{''.join(f'<li>{_text(each)}</li>' for each in reasons)}</ul>\n" if reasons else "")
        + f"<p>{whole.clients:,} subscribers, {whole.events:,} events, {_text(schedule(outcome))}. "
        "A latency counts from the moment an event was due to the return of the read that brought it.</p>\n"
        f"<div class=tiles>{shown}</div>"
    )


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ms"


def _section(picture: Picture) -> str:
    data = json.dumps(picture.points, ensure_ascii=False).replace("<", "\\u003c")
    script = f'<script type="application/json">{data}</script>' if picture.points else ""
    label = _text(f"{picture.title}. {picture.description}")
    drawings = "".join(
        f'<div class="drawing {name}" role="img" aria-label="{label}">{svg}</div>'
        for name, svg in (("wide", picture.wide), ("narrow", picture.narrow))
    )
    return (
        f'<h2 id="{picture.name}">{_text(picture.title)}</h2>\n'
        f"<figure><figcaption>{_text(picture.description)}</figcaption>{drawings}{script}</figure>\n"
        f"{_folded('Its figures as a table', _table(picture.heads, picture.rows))}"
    )


def _folded(title: str, html: str) -> str:
    return f"<details><summary>{title}</summary>{html}</details>"


def _table(heads: Sequence[object], lines: Iterable[Sequence[object]], kind: str = "") -> str:
    head = "".join(f"<th>{_text(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in line)}</tr>" for line in lines)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide-table"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _limits(outcome: Outcome) -> str:
    lines = "".join(
        f'<li class="{"good" if limit.holds else "bad"}">{_text(limit.line)}</li>' for limit in outcome.limits
    )
    notes = "".join(f"<p>{_text(note)}</p>" for note in outcome.validity.notes)
    return f'<h2>Limits</h2>\n<ul class="limits">{lines}</ul>{notes}'


def _figures(outcome: Outcome) -> str:
    scopes = columns(outcome)
    return f"<h2>Figures</h2>\n{_table(['', *scopes], [(name, *values) for name, values in rows(outcome)])}"


def _rig(outcome: Outcome) -> dict[str, Any]:
    rig = outcome.validity.rig
    cpu = {f"CPU of {role} (% of a core)": pct for role, pct in rig.cpu_pct.items()}
    stalls = {f"longest stall of {name} (ms)": stall_ms for name, stall_ms in rig.stalls_ms.items()}
    still = {f"stalls of {name} (% of the time)": pct for name, pct in rig.still_pct.items()}
    lags = {f"usual lag of {name} (ms)": lag_ms for name, lag_ms in rig.lags_ms.items()}
    return {
        "CPU of others (% of the machine)": rig.others_cpu_pct,
        "steal (% of the machine)": rig.steal_pct,
        **cpu,
        **stalls,
        **still,
        **lags,
        "latest publish through its own fault (ms)": rig.late_ms,
        "largest step of the wall clock (ms)": rig.wall_step_ms,
        "rows that are missing": rig.lost_rows,
        "deliveries before their event was due": rig.too_early,
    }


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_said(part)}" for name, part in value.items()) or "none"
    return "not known" if value is None else str(value)


def _named(title: str, values: dict[str, Any], description: str) -> str:
    lines = [(name, _said(value)) for name, value in values.items()]
    about = f"<p class=muted>{description}</p>\n" if description else ""
    return f"<h2>{title}</h2>\n{about}{_table((), lines, 'text')}"
