"""Grafana's dashboard, made from here: ``python -m deploy.grafana.dashboard`` writes its JSON.

Counters are rated before they are summed, histograms summed by ``le`` before a quantile is taken,
and of the gauges that no sum has a meaning for the worst instance's is shown: every panel holds for
one instance as for twenty.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE: Final = Path(__file__).parent / "dashboards" / "normgate.json"
SOURCE: Final = dashboard.DataSourceRef(type_val="prometheus", uid="${source}")

INSTANCES: Final = 'job=~"$job", instance=~"$instance"'
VERSIONS: Final = f'{INSTANCES}, model=~"$model", version=~"$version"'
BY_VERSION: Final = "by (model, version)"
NAME: Final = "{{model}}/{{version}}"
STAGES: Final = ("read", "decode", "queue", "forward", "total")
P_VALUES: Final = ("0.01", "0.05", "0.1", "0.5")
_HEIGHT: Final = 8

Query: TypeAlias = tuple[str, str]
"""An expression and the name of its series."""
Panel: TypeAlias = timeseries.Panel | stat.Panel | heatmap.Panel | statetimeline.Panel | table.Panel


def main() -> None:
    """Write the dashboard's file."""
    FILE.write_text(as_json())


def as_json() -> str:
    """The dashboard as Grafana reads it, ending in a newline."""
    return JSONEncoder(sort_keys=True, indent=2).encode(build()) + "\n"


def build() -> dashboard.Dashboard:
    """The whole dashboard."""
    made = (
        builders.Dashboard("NormGate")
        .uid("normgate")
        .description("Verdicts, drift, versions, time and refusals of NormGate.")
        .tags(["normgate"])
        .timezone(common.TimeZoneBrowser)
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time("now-3h", "now")
        .refresh("30s")
        .annotation(_version_markers())
    )
    for variable in _variables():
        made = made.with_variable(variable)
    for title, panels in (
        ("Now", _now()),
        ("Verdicts and scores", _scores()),
        ("Drift", _drift()),
        ("Versions", _versions()),
        ("Traffic and time", _time()),
        ("Refusals and saturation", _saturation()),
        ("Review queue", _review()),
    ):
        made = made.with_row(builders.Row(title))
        for panel in panels:
            made = made.with_panel(panel)
    built = made.build()
    for number, panel_or_row in enumerate(built.panels or [], start=1):
        panel_or_row.id_val = number
    return built


def _variables() -> Sequence[
    builders.DatasourceVariable | builders.QueryVariable | builders.CustomVariable
]:
    window = dashboard.VariableOption(selected=True, text="1h", value="1h")
    return [
        builders.DatasourceVariable("source").label("Data source").type("prometheus"),
        _choice("job", "label_values(normgate_ready, job)"),
        _choice("instance", 'label_values(normgate_ready{job=~"$job"}, instance)'),
        _choice("model", 'label_values(normgate_model_info{job=~"$job"}, model)'),
        _choice(
            "version", 'label_values(normgate_model_info{job=~"$job", model=~"$model"}, version)'
        ),
        builders.CustomVariable("window")
        .label("Rate over")
        .values("5m,1h,6h,1d")
        .current(window)
        .options(
            [
                dashboard.VariableOption(selected=text == "1h", text=text, value=text)
                for text in ("5m", "1h", "6h", "1d")
            ]
        ),
    ]


def _choice(name: str, query: str) -> builders.QueryVariable:
    """A variable of several values, all of them at first."""
    return (
        builders.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(selected=True, text="All", value="$__all"))
    )


def _version_markers() -> builders.AnnotationQuery:
    # A version is new while it was not active at any time from two to twelve minutes ago.
    active = f'normgate_model_role{{{VERSIONS}, role="active"}}'
    expression = (
        f"max {BY_VERSION} ({active})"
        f" unless max {BY_VERSION} (last_over_time({active}[10m] offset 2m))"
    )
    # The SDK has no field for the title and text of Prometheus's annotations.
    return _Markers("Version activated", expression)


class _Markers(builders.AnnotationQuery):
    """An annotation of Prometheus, with the title that the SDK has no field for."""

    def __init__(self, name: str, expression: str) -> None:
        super().__init__()
        self._internal = _MarkersModel(name, expression)


class _MarkersModel(dashboard.AnnotationQuery):
    def __init__(self, name: str, expression: str) -> None:
        super().__init__(
            name=name, datasource=SOURCE, enable=True, icon_color="purple", expr=expression
        )

    def to_json(self) -> dict[str, object]:
        return super().to_json() | {"titleFormat": f"{NAME} answers", "step": "60s"}


def _now() -> Sequence[Panel]:
    return [
        _number(
            "Ready instances",
            "Instances that want requests. Lower than the number you run: one is loading, draining,"
            " stuck or away; see the table of instances in Prometheus and the log of that one.",
            f"sum(normgate_ready{{{INSTANCES}}})",
        ),
        _number(
            "Images per second",
            "Scored images. Much lower than usual: callers are gone, or refused (see below). Much"
            " higher: watch the queue and the refusals.",
            f"sum(rate(normgate_images_total{{{VERSIONS}}}[$__rate_interval]))",
            decimals=1,
        ),
        _number(
            "OOD share",
            "Of all images in the chosen window. On images like the calibration images it is at"
            " most alpha on average. High: look at the images (review queue) before anything else."
            " Zero for long: nobody sends odd images, or the threshold is too low.",
            _share(_ood("$window", by=""), _images("$window", by="")),
            unit="percentunit",
            decimals=1,
        ),
        _number(
            "Versions with a drift alarm",
            "Active, loaded and shadow versions whose scores are no longer exchangeable with their"
            " calibration scores. 1 or more: read the runbook of NormGateDrift, then recalibrate or"
            " reset.",
            f"sum(max {BY_VERSION} (normgate_drift_alarm{{{VERSIONS}}}))",
            bad_from=1,
        ),
        _number(
            "Got no verdict",
            "Share of what was asked in the window that was refused or failed through the service's"
            " own doing. The budget is 1 % of 30 days. High: see the refusals by reason below.",
            _unanswered("$window"),
            unit="percentunit",
            decimals=2,
            bad_from=0.01,
        ),
        _number(
            "95th percentile of time",
            "95 of 100 requests took at most so long, from arrival to the end of the answer. High:"
            " the stages below tell where.",
            _quantile(0.95, 'stage="total"', window="$__rate_interval"),
            unit="s",
            decimals=3,
        ),
    ]


def _scores() -> Sequence[Panel]:
    return [
        _graph(
            "OOD rate, with its 95 % interval",
            "Share of images found OOD in the chosen window, over all chosen instances, with its"
            " Wilson interval; alpha is what the threshold was calibrated for. The whole interval"
            " above alpha: more odd images than calibration images had, find out which. The whole"
            " interval below alpha: fewer, so odd images are rarer than the threshold assumes. A"
            " wide interval: too few images to tell.",
            [
                (_share(_ood("$window"), _images("$window")), f"{NAME} rate"),
                (_wilson("-"), f"{NAME} lower"),
                (_wilson("+"), f"{NAME} upper"),
                (f"max {BY_VERSION} (normgate_threshold_alpha{{{VERSIONS}}})", f"{NAME} alpha"),
            ],
            unit="percentunit",
            width=24,
        ),
        _heat_map(
            "Scores over their threshold",
            "How many images had which score, as a multiple of the threshold: below 1 is OOD. The"
            " bulk should lie well above 1 and keep its place. A bulk that sinks towards 1: images"
            " have changed (camera, compression, lighting), recalibrate. A second band below 1: a"
            " kind of image the classifier was not trained for.",
            f"sum by (le) (increase(normgate_score_ratio_bucket{{{VERSIONS}}}[$__rate_interval]))",
        ),
        _graph(
            "p-values against uniform ones",
            "Share of p-values up to a bound, divided by that bound, over the chosen window. All"
            " lines near 1: live images score like the calibration images. Low bounds above 1: too"
            " many odd images. The line of 0.5 above 1: all images score lower than they did, as"
            " after a change of compression. Below 1: they score higher, as training images do.",
            [
                (
                    f"{_share(_p_values('bucket', p), _p_values('count'))} / {p}",
                    f"{NAME} p up to {p}",
                )
                for p in P_VALUES
            ],
        ),
    ]


def _drift() -> Sequence[Panel]:
    return [
        _graph(
            "Evidence against exchangeability",
            "Logarithm to base 10 of the test martingale, now and at its largest since the start,"
            " of the instance with the most evidence, and the bound of the alarm. Above the bound:"
            " the stream has changed, and the chance that this is a false alarm is at most the"
            " stated one, over all time. Around or below 0: no evidence.",
            [
                (_worst("normgate_drift_martingale_log10"), NAME),
                (_worst("normgate_drift_martingale_max_log10"), f"{NAME} largest"),
                (
                    f"-log10(min {BY_VERSION} (normgate_drift_false_alarm_bound{{{VERSIONS}}}))",
                    f"{NAME} alarm",
                ),
            ],
        ),
        _graph(
            "Distance to the calibration scores",
            "How far the recent scores lie from the calibration scores: the Kolmogorov-Smirnov"
            " distance (0 to 1) and the population stability index, of the instance where they are"
            " largest. As a rule of thumb PSI below 0.1 is no change and above 0.25 a large one."
            " With few images both are large by chance: trust the alarm, and use these to judge how"
            " much it matters.",
            [
                (_worst("normgate_drift_ks_distance"), f"{NAME} KS"),
                (_worst("normgate_drift_psi"), f"{NAME} PSI"),
            ],
        ),
        _states(
            "Drift alarm",
            "1 from the moment the evidence crossed its bound until somebody resets the test or"
            " another version answers: of all instances together (1 as soon as one has it) and of"
            " each. 1: follow the runbook of NormGateDrift. One instance only: its callers differ.",
            [
                (_worst("normgate_drift_alarm"), NAME),
                (f"normgate_drift_alarm{{{VERSIONS}}}", f"{NAME} {{{{instance}}}}"),
            ],
        ),
        _graph(
            "OOD rate of single instances",
            "The lower end of each instance's own exact interval over one hour, divided by alpha."
            " One instance far above the others: its share of callers sends other images, or its"
            " decoder or weights differ. All above 1: the stream has changed.",
            [
                (
                    f'normgate_drift_ood_rate_lower{{{VERSIONS}, window="1h"}}'
                    f" / on (job, instance, model, version) normgate_threshold_alpha{{{VERSIONS}}}",
                    f"{NAME} {{{{instance}}}}",
                )
            ],
        ),
    ]


def _versions() -> Sequence[Panel]:
    shown = f"sum {BY_VERSION} (increase(normgate_shadow_images_total{{{VERSIONS}}}[$window]))"
    shadow_ood = (
        f'sum {BY_VERSION} (increase(normgate_shadow_images_total{{{VERSIONS}, verdict="ood"}}'
        "[$window]))"
    )
    disagreement = (
        "sum by (model, version, verdict)"
        f" (increase(normgate_shadow_disagreements_total{{{VERSIONS}}}[$window]))"
        f" / on (model, version) group_left() ({shown} > 0)"
    )
    return [
        _graph(
            "Shadow against active: OOD rate",
            "What a shadow version finds OOD beside what the active one does. Close together and"
            " the shadow near its own alpha: it may be activated. The shadow far higher: its"
            " threshold does not fit this traffic. Empty: no version looks on.",
            [
                (_share(_ood("$window"), _images("$window")), f"{NAME} active"),
                (_share(shadow_ood, shown), f"{NAME} shadow"),
            ],
            unit="percentunit",
        ),
        _graph(
            "Shadow against active: disagreement",
            "Share of the images shown to a shadow version that it judges otherwise, by its"
            " verdict, and images it should have scored and could not. High: look at such images"
            " before activating it. Drops: the service is too busy for shadows.",
            [
                (disagreement, f"{NAME} says {{{{verdict}}}}"),
                (
                    f"sum(rate(normgate_shadow_dropped_total{{{INSTANCES}}}[$__rate_interval]))",
                    "dropped per second",
                ),
            ],
        ),
        _table(
            "Loaded versions",
            "What is loaded, on how many instances, and what it does. Two active versions of one"
            " model: instances disagree, activate the same one everywhere.",
            f"count by (model, version, role) (normgate_model_role{{{VERSIONS}}})",
        ),
        _graph(
            "Time to load a version",
            "How long reading, verifying, building and warming up took. High: slow disk or a large"
            " network; give the orchestrator's start probe more time.",
            [(_worst("normgate_model_load_seconds"), NAME)],
            unit="s",
        ),
    ]


def _time() -> Sequence[Panel]:
    return [
        _graph(
            "Images per second, by verdict",
            "Scored images. Sudden zero: callers are gone or refused. A rise of ood alone: other"
            " images come.",
            [
                (
                    "sum by (model, version, verdict)"
                    f" (rate(normgate_images_total{{{VERSIONS}}}[$__rate_interval]))",
                    f"{NAME} {{{{verdict}}}}",
                )
            ],
        ),
        _graph(
            "Time of a request",
            "Percentiles from arrival to the end of the answer. The 99th far above the 50th: queues"
            " or a few very large images. All high: see the stages.",
            [
                (
                    _quantile(share, 'stage="total"', window="$__rate_interval"),
                    f"{share * 100:g} %",
                )
                for share in (0.5, 0.95, 0.99)
            ],
            unit="s",
        ),
        _graph(
            "95th percentile, by stage",
            "read: slow callers. decode: large images or too few NORMGATE_DECODE_THREADS. queue:"
            " more images than the device can take, add instances. forward: a slow device, or"
            " larger batches.",
            [
                (
                    _quantile(0.95, f'stage="{stage}"', window="$__rate_interval"),
                    stage,
                )
                for stage in STAGES
            ],
            unit="s",
        ),
        _graph(
            "Images in a forward pass",
            "Mean and 95th percentile. 1: the device keeps up, every image goes at once. At"
            " NORMGATE_MAX_BATCH_SIZE: saturated, every further image waits.",
            [
                (
                    f"sum(rate(normgate_batch_size_sum{{{INSTANCES}}}[$__rate_interval]))"
                    f" / sum(rate(normgate_batch_size_count{{{INSTANCES}}}[$__rate_interval]))",
                    "mean",
                ),
                (
                    "histogram_quantile(0.95, sum by (le) (rate(normgate_batch_size_bucket"
                    f"{{{INSTANCES}}}[$__rate_interval])))",
                    "95 %",
                ),
            ],
        ),
        _graph(
            "Queue",
            "Images that wait for a device and requests being answered, over all instances. A queue"
            " that grows without end: more comes than can be worked off, refusals follow. Near 0:"
            " room to spare.",
            [
                (f"sum(normgate_queue_depth{{{INSTANCES}}})", "waiting images"),
                (f"sum(normgate_in_flight{{{INSTANCES}}})", "requests"),
            ],
        ),
        _graph(
            "Waiting time",
            "Percentiles of the time an image waits for a device. Above a second: see the runbook"
            " of NormGateQueueWait.",
            [
                (
                    _quantile(share, 'stage="queue"', window="$__rate_interval"),
                    f"{share * 100:g} %",
                )
                for share in (0.5, 0.95, 0.99)
            ],
            unit="s",
        ),
    ]


def _saturation() -> Sequence[Panel]:
    return [
        _graph(
            "Refusals per second, by reason",
            "Images or requests without a verdict. queue_full, memory, deadline: overload, add"
            " instances or let callers slow down. not_ready: loading or draining instances get"
            " traffic. failed, upstream: read the log. The others are the senders' mistakes.",
            [
                (
                    "sum by (reason)"
                    f" (rate(normgate_rejected_total{{{INSTANCES}}}[$__rate_interval]))",
                    "{{reason}}",
                )
            ],
        ),
        _graph(
            "Burn of the verdict budget",
            "How many times faster than 1 % of 30 days the service refuses or fails. Above 14.4 for"
            " an hour pages, above 6 for six hours is a ticket. Below 1: within the budget.",
            [(f"{_unanswered(window)} / 0.01", window) for window in ("5m", "1h", "6h")],
        ),
        _graph(
            "Share of time that devices compute",
            "Seconds of forward passes per second, of each instance. It goes up to the passes that"
            " are under way at once: two a GPU with CUDA graphs, where the second waits for the"
            " first, else one; on the CPU one, or two for images above 64 pixels on more than one"
            " thread of ONNX Runtime. Near that: saturated, add instances. Near 0: idle.",
            [
                (
                    "sum by (instance) (rate(normgate_stage_seconds_sum"
                    f'{{{INSTANCES}, stage="forward"}}[$__rate_interval]))',
                    "{{instance}}",
                )
            ],
            unit="percentunit",
        ),
        _graph(
            "Processor",
            "Cores that each instance uses. At the number of its cores: saturated. Low while images"
            " wait: it waits for a GPU or for slow callers.",
            [
                (
                    "sum by (instance)"
                    f" (rate(process_cpu_seconds_total{{{INSTANCES}}}[$__rate_interval]))",
                    "{{instance}}",
                )
            ],
        ),
        _graph(
            "Memory",
            "Resident memory of each instance, and bytes of uploads and pixels in flight. In flight"
            " near NORMGATE_MAX_INFLIGHT_BYTES: requests are refused for memory. Resident memory"
            " that grows for days on end: a leak, file an issue.",
            [
                (
                    f"max by (instance) (process_resident_memory_bytes{{{INSTANCES}}})",
                    "{{instance}} resident",
                ),
                (
                    f"max by (instance) (normgate_inflight_bytes{{{INSTANCES}}})",
                    "{{instance}} in flight",
                ),
            ],
            unit="bytes",
        ),
        _graph(
            "Open files",
            "Share of the allowed file descriptors in use, mostly connections. Near 1: raise the"
            " limit, or let the ingress keep fewer connections.",
            [
                (
                    f"max by (instance) (process_open_fds{{{INSTANCES}}}"
                    f" / process_max_fds{{{INSTANCES}}})",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
        ),
    ]


def _review() -> Sequence[Panel]:
    return [
        _graph(
            "Images kept for review",
            "OOD images that wait for somebody to look at them, and the bytes they take. At the"
            " limit: the oldest are dropped, look at them more often. 0: the queue is off, or there"
            " were none.",
            [
                (f"sum(normgate_review_queue_images{{{INSTANCES}}})", "images"),
                (f"sum(normgate_review_queue_bytes{{{INSTANCES}}})", "bytes"),
            ],
            on_the_right="bytes",
        ),
        _graph(
            "Labels given",
            "What people said of images found OOD, in the chosen window. Many was_fine: false"
            " alarms, recalibrate on a uniform sample of what comes in, not on these alone."
            " Many really_ood: the gate does its work. Empty: nobody has labelled any.",
            [
                (
                    "sum by (model, version, label)"
                    f" (increase(normgate_review_labels_total{{{VERSIONS}}}[$window]))",
                    f"{NAME} {{{{label}}}}",
                )
            ],
        ),
    ]


def _images(window: str, *, by: str = BY_VERSION) -> str:
    """Scored images in a window."""
    return f"sum {by} (increase(normgate_images_total{{{VERSIONS}}}[{window}]))".replace("  ", " ")


def _ood(window: str, *, by: str = BY_VERSION) -> str:
    """Those found OOD."""
    images = f'normgate_images_total{{{VERSIONS}, verdict="ood"}}'
    return f"sum {by} (increase({images}[{window}]))".replace("  ", " ")


def _p_values(series: str, up_to: str = "") -> str:
    """Images whose p-value is at most a bound (``bucket``), or all of them (``count``)."""
    bound = f', le="{up_to}"' if up_to else ""
    return f"sum {BY_VERSION} (increase(normgate_p_value_{series}{{{VERSIONS}{bound}}}[$window]))"


def _refused(window: str) -> str:
    """What the service refused or failed through its own doing."""
    reasons = "queue_full|memory|not_ready|deadline|upstream|failed"
    refusals = f'normgate_rejected_total{{{INSTANCES}, reason=~"{reasons}"}}'
    return f"sum(increase({refusals}[{window}]))"


def _wilson(sign: str) -> str:
    """One end of the 95 % Wilson interval of the OOD rate, from counts."""
    ood, images = _ood("$window"), _images("$window")
    spread = f"1.96 * sqrt({ood} * ({images} - {ood}) / {images} + 0.96)"
    return f"({ood} + 1.92 {sign} {spread}) / (({images} > 0) + 3.84)"


def _share(part: str, whole: str) -> str:
    """Their quotient, and nothing for a version that has scored nothing, as a shadow has."""
    return f"{part} / ({whole} > 0)"


def _unanswered(window: str) -> str:
    """Of what was asked, the share that got no verdict."""
    return _share(_refused(window), f"{_images(window, by='')} + {_refused(window)}")


def _quantile(share: float, stage: str, *, window: str) -> str:
    buckets = f"normgate_stage_seconds_bucket{{{INSTANCES}, {stage}}}"
    return f"histogram_quantile({share:g}, sum by (le) (rate({buckets}[{window}])))"


def _worst(gauge: str) -> str:
    """A gauge of every version, of the instance where it is largest."""
    return f"max {BY_VERSION} ({gauge}{{{VERSIONS}}})"


def _query(expression: str, name: str, number: int) -> Dataquery:
    return (
        Dataquery()
        .datasource(SOURCE)
        .expr(expression)
        .legend_format(name)
        .ref_id(chr(ord("A") + number))
    )


def _number(
    title: str,
    description: str,
    expression: str,
    *,
    unit: str = "short",
    decimals: int = 0,
    bad_from: float | None = None,
) -> stat.Panel:
    steps = [dashboard.Threshold(value=None, color="text")]
    if bad_from is not None:
        steps.append(dashboard.Threshold(value=bad_from, color="red"))
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .height(4)
        .span(4)
        .unit(unit)
        .decimals(decimals)
        .thresholds(
            builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)
        )
        .graph_mode(common.BigValueGraphMode.NONE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(expression, title, 0).instant())
    )


def _graph(
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    unit: str = "short",
    width: int = 12,
    on_the_right: str | None = None,
) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .height(_HEIGHT)
        .span(width)
        .unit(unit)
        .axis_soft_min(0)
        .line_width(1)
        .fill_opacity(0)
        .show_points(common.VisibilityMode.AUTO)
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
    )
    for number, (expression, name) in enumerate(queries):
        panel = panel.with_target(_query(expression, name, number).range())
    if on_the_right is not None:
        properties = [
            dashboard.DynamicConfigValue(id_val="custom.axisPlacement", value="right"),
            dashboard.DynamicConfigValue(id_val="unit", value="bytes"),
        ]
        panel = panel.override_by_name(on_the_right, properties)
    return panel


def _heat_map(title: str, description: str, expression: str) -> heatmap.Panel:
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .height(_HEIGHT)
        .span(12)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Spectral")
            .steps(64)
            .exponent(0.5)
            .reverse(False)
        )
        .cell_gap(1)
        .with_target(_query(expression, "{{le}}", 0).range().format(PromQueryFormat.HEATMAP))
    )


def _states(title: str, description: str, queries: Sequence[Query]) -> statetimeline.Panel:
    steps = [
        dashboard.Threshold(value=None, color="green"),
        dashboard.Threshold(value=1, color="red"),
    ]
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .height(_HEIGHT)
        .span(12)
        .thresholds(
            builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)
        )
        .color_scheme(builders.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
    )
    for number, (expression, name) in enumerate(queries):
        panel = panel.with_target(_query(expression, name, number).range())
    return panel


def _table(title: str, description: str, expression: str) -> table.Panel:
    columns = {"Time": True}
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .height(_HEIGHT)
        .span(12)
        .with_target(_query(expression, "", 0).instant().format(PromQueryFormat.TABLE))
        .with_transformation(
            dashboard.DataTransformerConfig(
                id_val="organize",
                options={"excludeByName": columns, "renameByName": {"Value": "instances"}},
            )
        )
    )


if __name__ == "__main__":
    main()
