"""A proof as people and machines read it: JSON, a page of HTML that needs nothing else, and JUnit XML."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from typing import Any, Final
from xml.sax.saxutils import quoteattr

from knockwood.integrity.compare import Comparison
from knockwood.integrity.run import Report
from knockwood.model import Claim, Finding, Proof, Verdict
from knockwood.repository.repository import Repository

FOLDER: Final = "proofs/"
_WORDS: Final = {Verdict.HELD: "held", Verdict.BROKEN: "broken", Verdict.NOT_CHECKED: "not checked"}
_HEADLINES: Final = {
    Verdict.HELD: "This backup can be restored, and it was",
    Verdict.BROKEN: "Something is broken",
    Verdict.NOT_CHECKED: "Not everything could be checked",
}
_TABLES_SHOWN: Final = 500
COMPARED: Final = "tables equal to the primary"
"""The name of the claim that the comparison makes."""

_Parts = tuple[Proof, Report | None, Comparison | None]

_STYLE: Final = """
:root { color-scheme: light dark; --held: #1a7f37; --broken: #c62828; --not_checked: #9a6700; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; overflow-wrap: anywhere; }
.verdict { font-weight: 600; white-space: nowrap; } .held { color: var(--held); }
.broken { color: var(--broken); } .not_checked { color: var(--not_checked); }
"""


def as_json(proof: Proof, report: Report | None, comparison: Comparison | None) -> dict[str, Any]:
    """The proof with everything that was found."""
    value: dict[str, Any] = {"schema": "knockwood/1"} | proof.as_json()
    value["findings"] = [finding.as_json() for finding in report.findings] if report else []
    value["not_checked"] = [gap.as_json() for gap in report.not_checked] if report else []
    value["tables"] = [table.as_json() for table in comparison.tables] if comparison else []
    return value


def as_html(proof: Proof, report: Report | None, comparison: Comparison | None) -> str:
    """One page, without scripts and without anything from elsewhere."""
    verdict = proof.verdict
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Proof {escape(proof.id)} of {escape(proof.cluster)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{_HEADLINES[verdict]}</h1>",
        f"<p>Cluster {escape(proof.cluster)}: {_badge(verdict)}</p>",
        _facts(proof),
        "<h2>Claims</h2><table><tr><th>claim</th><th>verdict</th><th>detail</th></tr>",
        *(_claim_row(claim) for claim in proof.claims),
        "</table>",
    ]
    findings = [*(report.findings if report else ()), *(comparison.findings if comparison else ())]
    if findings:
        parts.append("<h2>Findings</h2>")
        parts += [
            f"<p><strong>{escape(finding.summary)}</strong> ({escape(str(finding.location))})<br>"
            f"What it means: {escape(finding.meaning)}.<br>What to do: {escape(finding.remedy)}</p>"
            for finding in findings[:_TABLES_SHOWN]
        ]
    if comparison is not None:
        parts += _tables(comparison)
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _facts(proof: Proof) -> str:
    last = proof.last_commit
    lost = "unknown" if proof.missing_commits is None else str(proof.missing_commits)
    exposed = "unknown" if proof.rpo_seconds is None else f"{proof.rpo_seconds:.1f} s"
    pairs = {
        "Backup": proof.backup,
        "Last transaction contained": f"{last.xid} at {last.lsn}, {last.time.isoformat()}"
        if last
        else "none",
        "Restored to": f"{proof.reached_lsn} on timeline {proof.timeline}",
        "Transactions missing": lost,
        "Time to restore (RTO)": f"{proof.rto_seconds:.1f} s",
        "Time the archive lags behind (RPO)": exposed,
        "Proved at": proof.taken_at.isoformat(),
        "Valid until": proof.valid_until.isoformat(),
        "System identifier": str(proof.system_identifier),
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs.items()
    )
    return f"<table>{rows}</table>"


def _badge(verdict: Verdict) -> str:
    return f'<span class="verdict {verdict}">{_WORDS[verdict]}</span>'


def _claim_row(claim: Claim) -> str:
    cells = (escape(claim.name), _badge(claim.verdict), escape(claim.detail))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _tables(comparison: Comparison) -> list[str]:
    order = {Verdict.BROKEN: 0, Verdict.NOT_CHECKED: 1, Verdict.HELD: 2}
    tables = sorted(comparison.tables, key=lambda t: (order[t.verdict], t.database, t.table))
    rows = [
        f"<tr><td>{escape(t.database)}</td><td>{escape(t.table)}</td><td>{t.rows}</td>"
        f"<td>{_badge(t.verdict)}</td><td>{escape(t.reason)}</td></tr>"
        for t in tables[:_TABLES_SHOWN]
    ]
    left = len(tables) - len(rows)
    more = [f"<p>and {left} more, in the JSON</p>"] if left else []
    head = "<tr><th>database</th><th>table</th><th>rows</th><th>verdict</th><th>reason</th></tr>"
    return [f"<h2>Tables compared at {comparison.lsn}</h2><table>{head}", *rows, "</table>", *more]


def as_junit(proof: Proof) -> str:
    """A test suite with one case per claim: broken is a failure, not checked is skipped."""
    count = {verdict: sum(claim.verdict is verdict for claim in proof.claims) for verdict in Verdict}
    suite = (
        f"<testsuite name={_attribute('knockwood prove ' + proof.cluster)}"
        f' tests="{len(proof.claims)}" failures="{count[Verdict.BROKEN]}"'
        f' skipped="{count[Verdict.NOT_CHECKED]}" errors="0" time="{proof.rto_seconds:.3f}"'
        f' timestamp="{proof.taken_at.isoformat()}">'
    )
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', suite]
    for claim in proof.claims:
        head = f"<testcase classname={_attribute(proof.cluster)} name={_attribute(claim.name)}"
        detail = _attribute(claim.detail)
        if claim.verdict is Verdict.BROKEN:
            lines.append(f"{head}><failure message={detail}/></testcase>")
        elif claim.verdict is Verdict.NOT_CHECKED:
            lines.append(f"{head}><skipped message={detail}/></testcase>")
        else:
            lines.append(f"{head}/>")
    return "\n".join([*lines, "</testsuite>", ""])


def _attribute(text: str) -> str:
    # XML 1.0 has no way to write most control characters.
    clean = "".join(
        c if c >= " " and not 0xD800 <= ord(c) <= 0xDFFF and c not in "\ufffe\uffff" else " " for c in text
    )
    return quoteattr(clean)


def without_rows(proof: Proof, report: Report | None, comparison: Comparison | None) -> _Parts:
    """The same proof with no value of any row in it: findings keep their check, place and severity only."""
    results = {f"check {result.name}": result.findings for result in report.results} if report else {}
    if comparison is not None:
        results[COMPARED] = comparison.findings
    claims = tuple(
        replace(claim, detail=f"{len(results[claim.name])} finding(s); the encrypted proof names them")
        if results.get(claim.name)
        else claim
        for claim in proof.claims
    )
    bare_report = report and replace(
        report,
        results=tuple(
            replace(result, findings=tuple(_bare(f) for f in result.findings)) for result in report.results
        ),
    )
    bare_comparison = comparison and replace(
        comparison,
        tables=tuple(
            replace(table, findings=tuple(_bare(f) for f in table.findings)) for table in comparison.tables
        ),
    )
    return replace(proof, claims=claims), bare_report, bare_comparison


def _bare(finding: Finding) -> Finding:
    place = finding.location.relation or finding.location.file or finding.location.database or "the cluster"
    return replace(
        finding,
        location=replace(finding.location, key=None),
        summary=f"{finding.check}: {place}",
        remedy="the encrypted proof holds the rest",
        evidence={},
    )


def store(repository: Repository, proof: Proof, report: Report | None, comparison: Comparison | None) -> None:
    """Write the three objects; the JSON last, since it alone makes the proof count.

    What is not encrypted holds no row data: in a repository that encrypts, JSON and page are stored
    whole as `<id>.full.json` and `<id>.full.html`, encrypted, and without the values in plain.
    """
    name = f"{FOLDER}{proof.id}"
    parts: _Parts = (proof, report, comparison)
    if repository.recipients:
        repository.put(f"{name}.full.html", [_html_bytes(parts)])
        repository.put(f"{name}.full.json", [json.dumps(_plain(parts), indent=1).encode()])
        parts = without_rows(*parts)
    repository.storage.put_new(f"{name}.html", [_html_bytes(parts)])
    repository.storage.put_new(f"{name}.xml", [as_junit(parts[0]).encode("utf-8", "replace")])
    repository.put_json(f"{name}.json", _plain(parts))


def _html_bytes(parts: _Parts) -> bytes:
    return as_html(*parts).encode("utf-8", "replace")


def _plain(parts: _Parts) -> Any:
    return json.loads(json.dumps(as_json(*parts), default=str))
