"""What the text of the alert rules must agree with: their tests, the runbooks, the reasons."""

import re
from typing import Final

import pytest

from app.serving.metrics import REJECT_REASONS
from deploy.grafana import dashboard
from tests.test_server import ROOT

RULES: Final = (ROOT / "deploy/prometheus/rules/normgate.yml").read_text()
ALERTS: Final = re.findall(r"- alert: (\w+)", RULES)
TESTS: Final = "".join(
    file.read_text() for file in sorted((ROOT / "deploy/prometheus/tests").glob("*.yml"))
)
SENDERS_FAULT: Final = {
    "malformed",
    "too_large",
    "unsupported",
    "undecodable",
    "unauthorized",
    "abandoned",
}
"""Refusals that spend none of the service's budget."""


@pytest.mark.parametrize("alert", ALERTS)
def test_runbooks(alert: str) -> None:
    """Each alert links to a section of its own, which exists."""
    [rule] = re.findall(rf"- alert: {alert}\n(.*?)(?=\n      - |\n\n|\Z)", RULES, re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/monitoring.md").read_text(), re.MULTILINE)

    assert f"runbook_url: docs/monitoring.md#{alert.lower()}" in rule
    assert alert in headings
    assert re.search(r"severity: (page|ticket)\n", rule)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tested(alert: str) -> None:
    """The rules' tests hold a moment when it fires, and one when it does not."""
    checks = re.findall(
        rf"- alertname: {alert}\n(.*?)(?=\n      - alertname|\n  - name|\Z)", TESTS, re.DOTALL
    )

    assert any("exp_alerts:" in check for check in checks)
    assert any("exp_alerts:" not in check for check in checks) or (
        f'ALERTS{{alertname=~"{alert[:14]}.*"}}' in TESTS
    )


@pytest.mark.parametrize("text", [RULES, dashboard.as_json()], ids=["rules", "dashboard"])
def test_reasons(text: str) -> None:
    """A refusal either spends the budget or is its sender's fault; the lists know each reason."""
    listed = {found for found in re.findall(r'reason=~\\?"([a-z_|]+)\\?"', text)}

    assert [set(one.split("|")) for one in listed] == [set(REJECT_REASONS) - SENDERS_FAULT]
