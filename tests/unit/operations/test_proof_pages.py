"""A proof as a page and as JUnit: readable by machines whatever the names hold."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from knockwood.integrity.check import CheckResult
from knockwood.integrity.compare import Comparison, TableResult
from knockwood.integrity.run import Report
from knockwood.model import Claim, Finding, Location, Lsn, Proof, Severity, Timeline, Verdict
from knockwood.operations.proof_pages import COMPARED, as_html, as_json, as_junit, without_rows

MOMENT = datetime(2026, 11, 21, tzinfo=UTC)
CLAIMS = st.lists(st.builds(Claim, st.text(), st.sampled_from(Verdict), st.text()))


def proof(claims: list[Claim], cluster: str = "shop") -> Proof:
    return Proof(
        id="20261121T000000Z-abcd",
        cluster=cluster,
        backup="20261120T000000Z-full",
        system_identifier=7,
        timeline=Timeline(1),
        reached_lsn=Lsn(0x3000028),
        last_commit=None,
        missing_commits=None,
        claims=tuple(claims),
        rto_seconds=1.5,
        rpo_seconds=None,
        taken_at=MOMENT,
        valid_until=MOMENT + timedelta(days=7),
    )


@given(CLAIMS, st.text())
def test_junit_is_xml_with_a_case_per_claim(claims: list[Claim], cluster: str) -> None:
    suite = ElementTree.fromstring(as_junit(proof(claims, cluster)))
    assert len(suite) == len(claims)
    assert int(suite.attrib["failures"]) == len(suite.findall(".//failure"))
    assert int(suite.attrib["skipped"]) == len(suite.findall(".//skipped"))


@given(CLAIMS)
def test_no_name_can_put_markup_into_the_page(claims: list[Claim]) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.seen.add(tag)

    parser = Tags()
    bad = Claim("<script>alert(1)</script>", Verdict.BROKEN, "<img src=x>")
    table = TableResult("<b>", "<i>", Verdict.NOT_CHECKED, reason="<u>")
    parser.feed(as_html(proof([*claims, bad]), None, Comparison(Lsn(1), (table,), 0.1)))
    known = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "span",
        "table",
        "tr",
        "th",
        "td",
    }
    assert parser.seen <= known


def test_a_proof_of_nothing_is_not_checked() -> None:
    assert as_json(proof([]), None, None)["verdict"] == "not_checked"
    assert "Not everything could be checked" in as_html(proof([]), None, None)


def test_the_plain_proof_of_an_encrypted_repository_holds_no_row_data() -> None:
    finding = Finding(
        "compare",
        Severity.CRITICAL,
        Location(database="d", relation="public.t", key="id=secret"),
        "row id=secret of public.t differs",
        evidence={"columns": {"note": {"primary": "secret", "copy": "other secret"}}},
    )
    table = TableResult("d", "public.t", Verdict.BROKEN, findings=(finding,))
    report = Report((CheckResult("invariants", (finding,), (), 0.1),))
    claims = [
        Claim(COMPARED, Verdict.BROKEN, finding.summary),
        Claim("check invariants", Verdict.BROKEN, finding.summary),
        Claim("backups and WAL verified", Verdict.HELD, "3 backups"),
    ]
    parts = without_rows(proof(claims), report, Comparison(Lsn(1), (table,), 0.1))
    told = json.dumps(as_json(*parts)) + as_html(*parts) + as_junit(parts[0])
    assert "secret" not in told
    assert "public.t" in told
    assert "3 backups" in told
    assert parts[0].verdict is Verdict.BROKEN
