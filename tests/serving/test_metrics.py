"""The metrics: the families of the design, and no series a client can invent."""

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.serving.metrics import Metrics, ScoreMetrics, ShadowMetrics


def test_families() -> None:
    """Every family is named ``normgate_*`` or belongs to the process."""
    text = generate_latest(Metrics().registry).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    own = {name for name in names if name.startswith("normgate_")}

    assert {
        "normgate_images",
        "normgate_score_ratio",
        "normgate_p_value",
        "normgate_stage_seconds",
        "normgate_batch_size",
        "normgate_queue_depth",
        "normgate_in_flight",
        "normgate_rejected",
        "normgate_model_info",
        "normgate_model_load_seconds",
    } <= own
    assert all(name.startswith(("process_", "python_")) for name in names - own)


def test_observed_image() -> None:
    """One OOD image counts as such, with its ratio to the threshold and its p-value."""
    metrics = Metrics()
    model = ScoreMetrics(metrics.scores, model="m", version=3)

    model.observe(score=1.0, threshold=2.0, p_value=0.03, verdict="ood")

    labels = {"model": "m", "version": "3"}
    read = metrics.registry.get_sample_value
    assert read("normgate_images_total", labels | {"verdict": "ood"}) == 1
    assert read("normgate_images_total", labels | {"verdict": "id"}) == 0
    assert read("normgate_score_ratio_bucket", labels | {"le": "0.5"}) == 1
    assert read("normgate_p_value_bucket", labels | {"le": "0.05"}) == 1
    assert read("normgate_p_value_bucket", labels | {"le": "0.01"}) == 0


def test_a_score_that_is_no_number_spoils_no_sum() -> None:
    """It counts as an image with its p-value, and has no ratio."""
    metrics = Metrics()
    shadow = ShadowMetrics(metrics, model="m", version=4)

    for score in (1.0, float("nan"), float("inf")):
        shadow.observe(score=score, threshold=2.0, p_value=0.25, verdict="ood")

    labels = {"model": "m", "version": "4"}
    read = metrics.registry.get_sample_value
    assert read("normgate_shadow_images_total", labels | {"verdict": "ood"}) == 3
    assert read("normgate_shadow_score_ratio_sum", labels) == 0.5
    assert read("normgate_shadow_p_value_sum", labels) == 0.75


def test_a_shadow_has_families_of_its_own() -> None:
    """What a shadow sees counts in no family of the versions that answer."""
    metrics = Metrics()
    shadow = ShadowMetrics(metrics, model="m", version=4)

    shadow.observe(score=3.0, threshold=2.0, p_value=0.5, verdict="id")
    shadow.disagree("id")

    labels = {"model": "m", "version": "4", "verdict": "id"}
    read = metrics.registry.get_sample_value
    assert read("normgate_shadow_images_total", labels) == 1
    assert read("normgate_shadow_disagreements_total", labels) == 1
    assert read("normgate_images_total", labels) is None


def test_roles_follow_the_models() -> None:
    """A version has one role at a time, and none once it has been let go."""
    metrics = Metrics()
    metrics.set_roles("m", {1: "active", 2: "shadow"})
    metrics.set_roles("m", {2: "active"})

    def role(version: int, name: str) -> float | None:
        labels = {"model": "m", "version": str(version), "role": name}
        return metrics.registry.get_sample_value("normgate_model_role", labels)

    assert role(2, "active") == 1
    assert role(2, "shadow") is None
    assert role(1, "active") is None
