"""What the manifests share with other files: ``python -m deploy.kubernetes.generate`` writes it.

The rules of ``deploy/prometheus`` become a PrometheusRule, word for word; Envoy's configuration
keeps all but its two addresses.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent
_RULES: Final = _HERE.parent / "prometheus" / "rules" / "normgate.yml"
_ENVOY: Final = _HERE.parent / "envoy" / "envoy.yaml"
_NOTE: Final = "# Made by `make kubernetes` from {}; change that file.\n"
_RULE: Final = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: normgate
  labels:
    app.kubernetes.io/name: normgate
spec:
"""
_ADDRESSES: Final = {
    "address: 127.0.0.1, port_value: 8000": "address: normgate-pods, port_value: 8000",
    "address: 127.0.0.1, port_value: 9000": "address: classifier, port_value: 9000",
}


def main() -> None:
    """Write the files."""
    for path, text in files().items():
        path.write_text(text)


def files() -> Mapping[Path, str]:
    """The text of each file."""
    return {
        _HERE / "components/monitoring/prometheusrule.yaml": _prometheus_rule(),
        _HERE / "components/envoy/envoy.yaml": _envoy(),
    }


def _prometheus_rule() -> str:
    note = _NOTE.format("deploy/prometheus/rules/normgate.yml")
    return note + _RULE + textwrap.indent(_RULES.read_text(), "  ")


def _envoy() -> str:
    text = _ENVOY.read_text()
    for old, new in _ADDRESSES.items():
        if text.count(old) != 1:
            raise ValueError(f"{_ENVOY} has {old!r} {text.count(old)} times; it must have it once")
        text = text.replace(old, new)
    return _NOTE.format("deploy/envoy/envoy.yaml") + text


if __name__ == "__main__":
    main()
