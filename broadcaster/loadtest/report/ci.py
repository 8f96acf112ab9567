"""The report for CI and pull requests: JUnit and Markdown, a line or a test case for each limit."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from broadcaster.core.text import printable
from broadcaster.loadtest.report.outcome import Outcome


def junit(outcome: Outcome) -> str:
    """A test suite with a case for each limit, and one for the rig: INVALID is an error, not a failure.

    An INVALID run that `report.allow_invalid` lets through has a skipped case.
    """
    reasons = "; ".join(outcome.validity.reasons)
    is_error = bool(reasons) and not outcome.config["report"].allow_invalid
    suite = ElementTree.Element(
        "testsuite",
        name=f"load test {outcome.name}",
        tests=str(len(outcome.limits) + 1),
        failures=str(len(outcome.broken)),
        errors=str(int(is_error)),
        skipped=str(int(bool(reasons) and not is_error)),
    )
    for limit in outcome.limits:
        case = ElementTree.SubElement(suite, "testcase", classname="report", name=limit.name)
        ElementTree.SubElement(case, "system-out").text = printable(limit.line)
        if not limit.holds:
            ElementTree.SubElement(case, "failure", message=printable(limit.broken))
    case = ElementTree.SubElement(suite, "testcase", classname="report", name="validity")
    if reasons:
        ElementTree.SubElement(case, "error" if is_error else "skipped", message=printable(reasons))
    ElementTree.indent(suite)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suite, encoding="unicode")}\n'


def markdown(outcome: Outcome, folder: Path) -> str:
    """A comment on a pull request: the verdict, each limit, and the figures."""
    validity, whole = outcome.validity, outcome.whole
    figures = {
        "clients": f"{whole.clients:,}",
        "events": f"{whole.events:,}",
        "received": f"{whole.received:,} of {whole.expected:,}",
        "p50": _ms(whole.p50_ms),
        "p90": _ms(whole.p90_ms),
        "p95": _ms(whole.p95_ms),
        "p99": _ms(whole.p99_ms),
        "p99.9": _ms(whole.p999_ms),
        "max": _ms(whole.max_ms),
        "p50 to the last subscriber": _ms(whole.last_p50_ms),
        "p99 to the last subscriber": _ms(whole.last_p99_ms),
    }
    lines = [
        f"### {'✓' if outcome.verdict == 'PASSED' else '✗'} Load test {outcome.verdict}, {validity.word}",
        "",
        *(f"- **INVALID**: {reason}" for reason in validity.reasons),
        *(f"- {limit.line}" + (f": {_plain(limit.broken)}" if limit.broken else "") for limit in outcome.limits),
        "",
        "| figure | value |",
        "|---|---:|",
        *(f"| {name} | {value} |" for name, value in figures.items()),
        "",
        f"Run `{_plain(outcome.name)}`, commit `{outcome.machine['commit'] or 'unknown'}`, "
        f"{outcome.machine['cores']} cores, in `{_plain(str(folder))}`.",
    ]
    return "\n".join(lines) + "\n"


def _ms(value: float | None) -> str:
    return "too few samples" if value is None else f"{value:.2f} ms"


def _plain(text: str) -> str:
    """Text that is no markup: a hub may have named any cause."""
    return "".join(f"&#{ord(each)};" if each in "<>&|`*_[]" else each for each in printable(text))
