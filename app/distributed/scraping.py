"""Each replica's metrics: a listener of its own, and the list of them that Prometheus reads.

Through Serve's proxy ``/metrics`` is whichever replica the request reaches. Addresses are kept in
the cluster's own key-value store; a replica that is gone drops out with its actor.
"""

from typing import Any

import ray
from prometheus_client import CollectorRegistry, start_http_server
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.util import get_node_ip_address, list_named_actors

_NAMESPACE = b"normgate_metrics"


def listen(registry: CollectorRegistry) -> None:
    """Serve a replica's metrics on a free port of its node, and announce where."""
    host = get_node_ip_address()
    server, _ = start_http_server(0, addr=host, registry=registry)
    port = server.server_port
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    _internal_kv_put(_own_name(), address, namespace=_NAMESPACE)


def targets() -> list[dict[str, Any]]:
    """The living replicas of the caller's deployment, as Prometheus's HTTP discovery has them."""
    deployment = _own_name().rpartition("#")[0]
    # In this order: a replica that starts in between is not taken for one that is gone.
    announced = {key.decode() for key in _internal_kv_list(f"{deployment}#", namespace=_NAMESPACE)}
    alive = {actor["name"] for actor in list_named_actors(all_namespaces=True)}
    for name in announced - alive:
        _internal_kv_del(name, namespace=_NAMESPACE)
    return [_target(name) for name in sorted(alive & announced)]


def _target(name: str) -> dict[str, Any]:
    address = _internal_kv_get(name, namespace=_NAMESPACE).decode()
    return {"targets": [address], "labels": {"replica": name.rpartition("#")[2]}}


def _own_name() -> str:
    """What tells this replica's actor from all others; its last part is the replica's."""
    name = ray.get_runtime_context().get_actor_name()
    assert name is not None, "Serve names every replica's actor"
    return name
