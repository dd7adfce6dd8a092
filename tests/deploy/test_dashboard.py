"""Grafana's dashboard: the file is what its script makes, and each panel explains itself."""

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import pytest

from deploy.grafana import dashboard

SHIPPED: Final = json.loads(dashboard.FILE.read_text())
PANELS: Final = [panel for panel in SHIPPED["panels"] if panel["type"] != "row"]


def test_the_file_is_current() -> None:
    """``make dashboard`` has been run since the script was last changed."""
    assert dashboard.FILE.read_text() == dashboard.as_json()


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_panel(panel: Mapping[str, Any]) -> None:
    """A panel says what its values mean, and asks for what the viewer has chosen."""
    assert len(panel["description"]) > 80
    assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
    assert [target["refId"] for target in panel["targets"]] == sorted(
        {target["refId"] for target in panel["targets"]}
    )
    for target in panel["targets"]:
        selectors = re.findall(r"normgate_\w+{([^}]*)}|process_\w+{([^}]*)}", target["expr"])
        assert selectors
        for of_ours, of_process in selectors:
            assert 'job=~"$job", instance=~"$instance"' in of_ours + of_process


def test_ids_and_titles_differ() -> None:
    """No two panels share an id or a title."""
    everything = SHIPPED["panels"]

    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)


def test_layout() -> None:
    """No panel lies on another, and none leaves the 24 columns."""
    cells = [
        {
            (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + line)
            for column in range(panel["gridPos"]["w"])
            for line in range(panel["gridPos"]["h"])
        }
        for panel in SHIPPED["panels"]
    ]

    assert not any(one & other for one, other in itertools.combinations(cells, 2))
    assert max(column for column, _ in set().union(*cells)) == 23


def test_variables() -> None:
    """Model, version, job and instance may each be several or all; the data source is chosen."""
    variables = {variable["name"]: variable for variable in SHIPPED["templating"]["list"]}

    assert set(variables) == {"source", "job", "instance", "model", "version", "window"}
    for name in ("job", "instance", "model", "version"):
        assert variables[name]["multi"]
        assert variables[name]["includeAll"]
