"""The ``normgate`` command."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from app.distributed.fleet import Fleet
from app.errors import CalibrationError, NormGateError, SettingsError
from app.settings import Settings

if TYPE_CHECKING:
    from app.offline.reading import Place
    from app.store import Store

ModelT = TypeVar("ModelT", bound=BaseModel)

_INTERRUPTED: Final = 130
# Of app.core.scores, whose import would cost torch's; a test keeps the two the same.
_SCORES: Final = (
    "feature_norm",
    "norm_logit",
    "selected_norm_energy",
    "selected_norm_msp",
    "energy",
    "msp",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 is success, 1 a failure told in one line, 2 wrong usage."""
    options = _parser().parse_args(argv)
    # Pillow warns of metadata it cannot read; the pixels decide whether an image is scored.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except NormGateError as error:
        print(f"normgate: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"normgate: interrupted{options.on_interrupt}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normgate",
        description="Tells for every image whether a classifier was trained for images like it.",
    )
    parser.set_defaults(on_interrupt="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_calibrate(commands)
    _add_evaluate(commands)
    _add_score(commands)
    _add_export(commands)
    _add_models(commands)
    _add_review(commands)
    return parser


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="answer over HTTP")
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f" (default: {field.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar=name.upper(),
            help=f"{field.description}{default}",
        )
    _add_fleet(parser)
    parser.set_defaults(command=_serve)


def _add_fleet(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --ray")
    group.add_argument(
        "--ray",
        action="store_true",
        help="answer from many replicas, on the Ray cluster that RAY_ADDRESS names or a new one",
    )
    for name, field in Fleet.model_fields.items():
        default = "" if field.default is None else f" (default: {field.default})"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar=name.upper(),
            help=f"{field.description}{default}",
        )


def _serve(options: argparse.Namespace) -> None:
    settings = Settings.read(_given(options, Settings))
    of_fleet = _given(options, Fleet)
    if options.ray:
        _serve_on_ray(settings, Fleet.read(of_fleet))
        return
    if of_fleet:
        raise SettingsError(f"{', '.join(of_fleet)}: only with --ray")
    from app.server import serve

    serve(settings)


def _serve_on_ray(settings: Settings, fleet: Fleet) -> None:
    try:
        from app.distributed.serving import run
    except ModuleNotFoundError as error:
        raise SettingsError("--ray needs Ray Serve: pip install 'normgate[ray]'") from error
    run(settings, fleet)


def _given(options: argparse.Namespace, fields: type[BaseModel]) -> dict[str, Any]:
    """The options that are fields, and were given."""
    return {name: value for name, value in vars(options).items() if name in fields.model_fields}


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="choose the block, set the threshold, write a bundle",
        description="Chooses the block with jigsaw puzzles of ID training images, sets the "
        "threshold on held-out ID images, and writes a bundle to the model store.",
    )
    required = parser.add_argument_group("required")
    required.add_argument(
        "--architecture",
        required=True,
        help="torchvision/NAME, cifar/NAME, timm/NAME or python/package.module:factory",
    )
    required.add_argument(
        "--selection-images",
        required=True,
        metavar="DIR|URL",
        help="ID training images: a folder of files, of .tar shards or of .parquet files",
    )
    required.add_argument(
        "--threshold-images",
        required=True,
        metavar="DIR|URL",
        help="ID images the classifier was not trained on, likewise",
    )
    required.add_argument("--name", required=True, help="of the model in the store")
    parser.add_argument(
        "--weights",
        help="safetensors file or torch state dict; 'random' tries the structure alone",
    )
    parser.add_argument(
        "--arguments",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""for the network's builder, such as '{"num_classes": 10, "width": 16}'""",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="one label a line, in the classes' order"
    )
    parser.add_argument(
        "--preprocessing",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""overrides the architecture's own, such as '{"resize": 256, "crop": 224}', or
        '{"scaled_decode": true}' to decode large JPEGs at 1/2, 1/4 or 1/8""",
    )
    parser.add_argument("--blocks", metavar="GLOB", help="candidate blocks, such as 'layer4.*'")
    parser.add_argument(
        "--score", choices=_SCORES, default="feature_norm", help="what the threshold is for"
    )
    parser.add_argument("--alpha", type=float, default=0.05, help="accepted false-alarm rate")
    parser.add_argument(
        "--abstain-alpha",
        type=float,
        metavar="ALPHA",
        help="a second level, above alpha: scores between the two are 'uncertain'",
    )
    parser.add_argument(
        "--per-class",
        action="store_true",
        help="a threshold for each predicted class with enough threshold images",
    )
    parser.add_argument("--guarantee", choices=["conformal", "pac"], default="conformal")
    parser.add_argument("--delta", type=float, default=0.05, help="chance that PAC fails")
    parser.add_argument(
        "--edge", choices=["keep", "zero"], default="keep", help="pixels no tile covers"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0)
    parser.add_argument(
        "--max-images", type=_at_least(1), metavar="N", help="a random draw from each folder"
    )
    parser.add_argument("--batch-size", type=_at_least(1), default=64, metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="what the network computes in, here and wherever the bundle serves",
    )
    parser.add_argument(
        "--no-report", action="store_true", help="write no report.html beside the bundle"
    )
    _add_ray(parser)
    _add_model_store(parser)
    parser.set_defaults(command=_calibrate, on_interrupt="; nothing was written")


def _calibrate(options: argparse.Namespace) -> None:
    from app.core.networks import Architecture, default_preprocessing
    from app.offline.calibrate import CalibrationOptions, calibrate
    from app.offline.terminal import TerminalProgress, print_calibration

    architecture = _validated(
        Architecture, {"id": options.architecture, "arguments": options.arguments}
    )
    preprocessing = None
    if options.preprocessing:
        usual = default_preprocessing(architecture)
        preprocessing = _validated(type(usual), usual.model_dump() | options.preprocessing)
    has_report = _can_report(wanted=not options.no_report)
    with _place(options) as place, TerminalProgress() as progress:
        calibration = calibrate(
            CalibrationOptions(
                name=options.name,
                architecture=architecture,
                selection_images=options.selection_images,
                threshold_images=options.threshold_images,
                weights=options.weights,
                labels=_read_labels(options.labels),
                preprocessing=preprocessing,
                blocks=options.blocks,
                score=options.score,
                has_class_thresholds=options.per_class,
                abstain_alpha=options.abstain_alpha,
                alpha=options.alpha,
                guarantee=options.guarantee,
                delta=options.delta,
                edge=options.edge,
                seed=options.seed,
                max_images=options.max_images,
                batch_size=options.batch_size,
                device=options.device,
                dtype=options.dtype,
                has_report=has_report,
            ),
            _store(_offline_settings(options)),
            progress=progress,
            place=place,
        )
    print_calibration(calibration)


def _can_report(*, wanted: bool) -> bool:
    from app.offline.report import NO_MATPLOTLIB, can_draw

    if wanted and not can_draw():
        print(f"normgate: {NO_MATPLOTLIB}", file=sys.stderr)
        return False
    return wanted


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a bundle on ID and OOD images, beside other methods",
        description="One pass over the images scores FeatureNorm at every block and the other "
        "methods on the same network: FPR95, AUROC, AUPR, each with a bootstrap interval.",
    )
    parser.add_argument("--bundle", required=True, metavar="NAME[/VERSION]")
    parser.add_argument(
        "--id", required=True, type=Path, metavar="DIR", help="ID images used for nothing else"
    )
    parser.add_argument(
        "--ood",
        required=True,
        action="append",
        type=_named_folder,
        metavar="NAME=DIR",
        help="OOD images; repeat for several data sets",
    )
    parser.add_argument(
        "--near",
        action="append",
        default=[],
        metavar="NAME",
        help="this data set is near OOD, and averaged apart",
    )
    parser.add_argument(
        "--far", action="append", default=[], metavar="NAME", help="this data set is far OOD"
    )
    parser.add_argument(
        "--train",
        type=Path,
        metavar="DIR",
        help="ID training images, on which ReAct, DICE, ViM, Mahalanobis and KNN are fitted",
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the conventions of the paper's code: puzzles with a zero edge select the block, "
        "FPR95 at the recall nearest to 95 %%",
    )
    parser.add_argument(
        "--codec",
        choices=["raw", "jpeg75"],
        default="raw",
        help="jpeg75: OOD images are resized and re-encoded as JPEG quality 75 first",
    )
    parser.add_argument("--batch-size", type=_at_least(1), default=64, metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--no-odin", action="store_true", help="leave out ODIN, whose backward passes cost most"
    )
    parser.add_argument("--resamples", type=_at_least(1), default=300, metavar="N")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of the bootstrap")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write report.html, report.md and evaluation.json, .csv and .md here",
    )
    _add_model_store(parser)
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from app.offline.evaluate import score_images, summarise
    from app.offline.report import evaluation_report, write_report
    from app.offline.tables import write_tables
    from app.offline.terminal import TerminalProgress, print_evaluation

    ood_images = dict(options.ood)
    groups = _groups(options, ood_images)
    name, version = _bundle_id(options.bundle)
    settings = _offline_settings(options)
    loaded = _store(settings).load(name, version, allowed_factories=settings.allowed_factories)
    with TerminalProgress() as progress:
        scored = score_images(
            loaded,
            id_images=options.id,
            ood_images=ood_images,
            training_images=options.train,
            codec=options.codec,
            is_paper=options.paper,
            with_odin=not options.no_odin,
            batch_size=options.batch_size,
            device=options.device,
            progress=progress,
        )
    evaluation = summarise(scored, groups=groups, resamples=options.resamples, seed=options.seed)
    print_evaluation(evaluation)
    if options.out is not None:
        write_tables(evaluation, options.out)
        if _can_report(wanted=True):
            write_report(evaluation_report(scored, evaluation), options.out)
    if options.json is not None:
        try:
            options.json.write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise NormGateError(f"{options.json} cannot be written: {error}") from error


def _groups(options: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for group in ("near", "far"):
        for name in getattr(options, group):
            if name not in names:
                raise NormGateError(f"--{group} names {name}; --ood has {', '.join(names)}")
            if name in groups:
                raise NormGateError(f"{name} is called both near and far")
            groups[name] = group
    return groups


def _add_score(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="the verdict on every image of a folder or of shards, into a table",
        description="Scores many images into one table. An interrupted run goes on where it "
        "stopped when the same command is given again; an unreadable file gets a row that says "
        "why.",
    )
    parser.add_argument(
        "source",
        metavar="DIR|GLOB|URL|-",
        help="a folder, a quoted glob, a URL such as s3://bucket/images, or names on standard "
        "input; images in .tar shards and .parquet files count where there are no others",
    )
    parser.add_argument("--bundle", required=True, metavar="NAME[/VERSION]")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help=".parquet, .csv or .jsonl"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the table, begin an interrupted run anew"
    )
    parser.add_argument("--batch-size", type=_at_least(1), default=64, metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    _add_ray(parser)
    _add_model_store(parser)
    parser.set_defaults(
        command=_score, on_interrupt="; the same command again goes on where it stopped"
    )


def _score(options: argparse.Namespace) -> None:
    from app.offline.score import check_output, find_source, score_files
    from app.offline.terminal import TerminalProgress, print_score_summary

    check_output(options.out, overwrite=options.overwrite)
    name, version = _bundle_id(options.bundle)
    settings = _offline_settings(options)
    loaded = _store(settings).load(name, version, allowed_factories=settings.allowed_factories)
    with _place(options) as place, TerminalProgress() as progress:
        summary = score_files(
            loaded,
            find_source(options.source, lines=sys.stdin, spread=place.spread()),
            options.out,
            progress=progress,
            overwrite=options.overwrite,
            batch_size=options.batch_size,
            max_pixels=settings.max_pixels,
            device=options.device,
            place=place,
        )
    print_score_summary(summary, options.out)


def _add_ray(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on many machines")
    group.add_argument(
        "--ray",
        action="store_true",
        help="work on the Ray cluster that RAY_ADDRESS names, or a new one on this machine",
    )
    group.add_argument(
        "--workers",
        type=_at_least(1),
        metavar="N",
        help="most of them at once (default: as many as the cluster has room for)",
    )
    group.add_argument(
        "--worker-cpus",
        type=_at_least(1),
        metavar="N",
        help="cores of each (default: as many as one machine computes with)",
    )


@contextmanager
def _place(options: argparse.Namespace) -> "Iterator[Place]":
    """Where the work is done: this machine, or a Ray cluster."""
    if not options.ray:
        if options.workers or options.worker_cpus:
            raise NormGateError("--workers and --worker-cpus need --ray")
        from app.offline.reading import ThisMachine

        yield ThisMachine()
        return
    try:
        from app.distributed.offline import ray_cluster
    except ImportError as error:
        raise NormGateError("--ray needs Ray Data: pip install 'normgate[ray]'") from error
    with ray_cluster(
        device=options.device, workers=options.workers, worker_cpus=options.worker_cpus
    ) as cluster:
        yield cluster


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="let ONNX Runtime serve a bundle",
        description="Exports the bundle's network to ONNX graphs beside its weights, once they "
        "score a few images as torch does; normgate serve then runs them where onnxruntime is "
        "installed.",
    )
    parser.add_argument("--bundle", required=True, metavar="NAME[/VERSION]")
    _add_model_store(parser)
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> None:
    from app.offline.export import export

    name, version = _bundle_id(options.bundle)
    settings = _offline_settings(options)
    if isinstance(settings.model_store, str):
        raise NormGateError(f"{settings.model_store} is no folder: export in one, then push")
    loaded = _store(settings).load(name, version, allowed_factories=settings.allowed_factories)
    written = export(loaded)
    print(f"{written.folder}: {written.size / 1000:.0f} kB, and the weights stay where they are")


def _add_models(commands: Any) -> None:
    parser = commands.add_parser(
        "models",
        help="list the bundles of a model store; activate, roll back, push",
        description="Without a command: the bundles of a model store.",
    )
    _add_model_store(parser)
    parser.set_defaults(command=_models)
    actions = parser.add_subparsers(metavar="COMMAND")
    activate = actions.add_parser("activate", help="point all who follow the store to a version")
    activate.add_argument("bundle", metavar="NAME/VERSION")
    activate.set_defaults(command=_models_activate)
    back = actions.add_parser("rollback", help="point to the version before")
    back.add_argument("name", metavar="NAME")
    back.set_defaults(command=_models_rollback)
    push = actions.add_parser("push", help="copy a bundle to another store")
    push.add_argument("bundle", metavar="NAME[/VERSION]")
    push.add_argument("to", metavar="STORE", help="a folder or a URL such as s3://bucket/models")
    push.set_defaults(command=_models_push)
    for action in (activate, back, push):
        # Not given here, it must not hide what was given before.
        _add_model_store(action, default=argparse.SUPPRESS)


def _models(options: argparse.Namespace) -> None:
    from app.offline.terminal import print_models

    print_models(_store(_offline_settings(options)))


def _models_activate(options: argparse.Namespace) -> None:
    name, version = _bundle_id(options.bundle)
    if version is None:
        raise NormGateError(f"bundle is {options.bundle!r}; it must read NAME/VERSION")
    pointer = _store(_offline_settings(options)).activate(name, version)
    print(f"{name}: version {pointer.version}, before {pointer.previous or 'unknown'}")


def _models_rollback(options: argparse.Namespace) -> None:
    pointer = _store(_offline_settings(options)).roll_back(options.name)
    print(f"{options.name}: version {pointer.version}, before {pointer.previous}")


def _models_push(options: argparse.Namespace) -> None:
    from app.store import Store

    settings = _offline_settings(options)
    to = Settings.read({"model_store": options.to}).model_store
    name, version = _bundle_id(options.bundle)
    where = _store(settings).push(name, version, Store(to, cache=settings.model_cache))
    print(f"pushed to {where}")


def _add_review(commands: Any) -> None:
    parser = commands.add_parser("review", help="use what people labelled in the review queue")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    export = actions.add_parser(
        "export",
        help="copy the sampled images to calibrate on",
        description="Copies the sample of all images, without those labelled really_ood, to a new "
        "folder for calibrate --threshold-images. Images kept only because they were found ood "
        "are never among them: they would set a threshold that keeps no promise.",
    )
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    export.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="of the review queue (default: $NORMGATE_REVIEW_FOLDER)",
    )
    export.add_argument("--model", help="whose images; needed where there are several models'")
    export.set_defaults(command=_export_review)


def _export_review(options: argparse.Namespace) -> None:
    from app.serving.review_folder import export_sample

    folder = options.folder or Settings.read({}).review_folder
    if folder is None:
        raise NormGateError("name the review folder: --folder DIR")
    try:
        export = export_sample(folder, options.out, model=options.model)
    except OSError as error:
        raise NormGateError(f"{error.filename or folder} cannot be used: {error}") from error
    print(f"{export.images} images in {options.out}; {export.really_ood} really ood left out")
    if export.unlabelled:
        print(
            f"{export.unlabelled} of them were judged id and have no label: if m of those are "
            "really ood, the rate of false alarms may reach alpha * (1 + m / the others)"
        )


def _store(settings: Settings) -> "Store":
    from app.store import Store

    return Store(settings.model_store, cache=settings.model_cache)


def _add_model_store(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    field = Settings.model_fields["model_store"]
    parser.add_argument(
        "--model-store",
        default=default,
        metavar="DIR|URL",
        help=f"{field.description} (default: $NORMGATE_MODEL_STORE, else {field.default})",
    )


def _offline_settings(options: argparse.Namespace) -> Settings:
    """The service's settings, of which offline commands share the store and what may run."""
    flags = {} if options.model_store is None else {"model_store": options.model_store}
    return Settings.read(flags)


def _at_least(bound: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < bound:
            raise argparse.ArgumentTypeError(f"{value} is below {bound}")
        return value

    return parse


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} must read NAME=DIR")
    return name, Path(folder)


def _bundle_id(text: str) -> tuple[str, int | None]:
    name, separator, version = text.partition("/")
    if separator and not version.isdecimal():
        raise NormGateError(f"bundle is {text!r}; it must read NAME or NAME/VERSION")
    return name, int(version) if separator else None


def _validated(model: type[ModelT], values: dict[str, Any]) -> ModelT:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or model.__name__.lower()
        raise CalibrationError(f"{where} is {first['input']!r}: {first['msg']}") from error


def _read_labels(file: Path | None) -> tuple[str, ...] | None:
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"labels {file} cannot be read: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


if __name__ == "__main__":
    sys.exit(main())
