"""The command line: one clear line for what goes wrong, and nothing half done."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.core.networks import Architecture
from app.offline.calibrate import CalibrationOptions
from app.offline.terminal import TerminalProgress
from app.store import BUNDLE_FILE, Store
from tests.conftest import IMAGES
from tests.versions import add_version

Calibrate = Callable[..., int]

WIDTH = '{"width": 4}'
INTERRUPTED = 130


@pytest.fixture
def calibrate(tiny_options: CalibrationOptions, tmp_path: Path) -> Calibrate:
    """Runs ``normgate calibrate`` into ``tmp_path / "store"``; later flags override earlier."""

    def run(*flags: str) -> int:
        return main(
            [
                "calibrate",
                *("--architecture", "cifar/resnet18", "--arguments", WIDTH),
                *("--weights", "random", "--alpha", "0.2", "--name", "tiny"),
                *("--selection-images", str(tiny_options.selection_images)),
                *("--threshold-images", str(tiny_options.threshold_images)),
                *("--model-store", str(tmp_path / "store"), *flags),
            ]
        )

    return run


def only_line(text: str) -> str:
    """The one line that is not blank."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]


def test_calibrate_writes_a_bundle(
    calibrate: Calibrate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report names the chosen block, the promise, the warnings and the folder."""
    assert calibrate() == 0

    bundle = Store(tmp_path / "store").read("tiny")
    report = capsys.readouterr().out
    assert bundle.architecture == Architecture(id="cifar/resnet18", arguments={"width": 4})
    assert all(block.block in report for block in bundle.norm_ratios.blocks)
    chosen = next(line for line in report.splitlines() if "chosen" in line)
    assert bundle.block in chosen
    assert f"threshold {bundle.threshold.value:.6g}" in report
    assert "warning: the weights are random" in report
    assert f"bundle written to {tmp_path / 'store' / 'tiny' / '1'}" in report


def test_calibrate_is_the_librarys_calibration(
    calibrate: Calibrate, tmp_path: Path, tiny_store: Store
) -> None:
    """The command writes the bundle that the function writes with the same options."""
    assert calibrate() == 0

    mine, theirs = Store(tmp_path / "store").read("tiny"), tiny_store.read("tiny")
    assert mine.model_copy(update={"created": theirs.created}) == theirs


def test_every_flag_reaches_the_bundle(calibrate: Calibrate, tmp_path: Path) -> None:
    """What the flags ask for is what the bundle records."""
    labels = [f"kind {i}" for i in range(10)]
    (tmp_path / "labels.txt").write_text("\n".join([*labels, "", " "]))

    status = calibrate(
        *("--blocks", "layer3.?", "--edge", "zero", "--seed", "5", "--max-images", "20"),
        *("--guarantee", "pac", "--delta", "0.3", "--alpha", "0.3", "--batch-size", "7"),
        *("--labels", str(tmp_path / "labels.txt")),
        *("--score", "selected_norm_energy", "--abstain-alpha", "0.5", "--per-class"),
        "--preprocessing",
        '{"interpolation": "bicubic", "resize": 36, "scaled_decode": true}',
    )

    assert status == 0
    bundle = Store(tmp_path / "store").read("tiny")
    assert [block.block for block in bundle.norm_ratios.blocks] == ["layer3.0", "layer3.1"]
    assert (bundle.jigsaw.edge, bundle.jigsaw.seed) == ("zero", 5)
    assert (bundle.data.selection.count, bundle.data.threshold.count) == (20, 20)
    threshold = bundle.threshold
    assert (threshold.guarantee, threshold.delta, threshold.alpha) == ("pac", 0.3, 0.3)
    assert (bundle.score, bundle.head) == ("selected_norm_energy", "fc")
    assert bundle.abstain is not None
    assert bundle.abstain.alpha == 0.5
    assert bundle.class_thresholds is not None
    assert bundle.labels == tuple(labels)
    preprocessing = bundle.preprocessing
    assert (preprocessing.interpolation, preprocessing.resize, preprocessing.crop) == (
        "bicubic",
        36,
        32,
    )
    assert preprocessing.scaled_decode
    # Not overridden, so still the architecture's own.
    assert preprocessing.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--architecture", "resnet18"], "id is 'resnet18': String should match"),
        (["--architecture", "cifar/resnet99"], "cifar/resnet99 is unknown; there are"),
        (["--architecture", "torchvision/resnet99"], "torchvision/resnet99 is not one of"),
        (["--architecture", "torchvision/fcn_resnet50"], "is not one of torchvision's classifiers"),
        (["--architecture", "python/absent:net"], "python/absent:net cannot be imported"),
        (["--arguments", '{"width": [4]}'], "arguments.width"),
        (["--arguments", '{"depth": 4}'], "cifar/resnet18 with arguments {'depth': 4}"),
        (["--preprocessing", '{"size": 4}'], "size is 4: Extra inputs"),
        (["--preprocessing", '{"resize": 0}'], "resize is 0: "),
        (["--preprocessing", '{"crop": 64}'], "crop is 64 pixels; it must be at most resize, 32"),
        (["--weights", "absent.pt"], "weights absent.pt cannot be read"),
        (["--labels", "absent.txt"], "labels absent.txt cannot be read"),
        (["--alpha", "0"], "alpha is 0.0; it must lie between 0 and 1"),
        (["--alpha", "nan"], "alpha is nan"),
        (["--alpha", "0.01"], "24 threshold images are too few for alpha 0.01: at least 99"),
        (["--name", "Tiny"], "name is 'Tiny'; it must be"),
        (["--selection-images", "absent"], "absent is not a folder"),
        (["--blocks", "nothing"], "no block whose name matches 'nothing'"),
        (["--device", "toaster"], "device toaster cannot be used"),
    ],
)
def test_a_bad_value_is_one_line(
    calibrate: Calibrate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """The status is 1, one line on standard error says why, and nothing is written."""
    assert calibrate(*flags) == 1

    line = only_line(capsys.readouterr().err)
    assert line.startswith("normgate: error: ")
    assert message in line
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "argument --seed: -1 is below 0"),
        (["--batch-size", "0"], "argument --batch-size: 0 is below 1"),
        (["--max-images", "few"], "argument --max-images: 'few' is not a whole number"),
        (["--alpha", "small"], "argument --alpha: invalid float value: 'small'"),
        (["--guarantee", "none"], "argument --guarantee: invalid choice: 'none'"),
        (["--arguments", "width=4"], "argument --arguments: 'width=4' is not JSON"),
        (["--arguments", "[4]"], "argument --arguments: '[4]' is not a JSON object"),
        (["--colour", "blue"], "unrecognized arguments: --colour blue"),
    ],
)
def test_wrong_usage_exits_2(
    calibrate: Calibrate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """Flags that cannot be parsed end with the usage and a line that names the flag."""
    with pytest.raises(SystemExit) as caught:
        calibrate(*flags)

    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "store").exists()


def test_an_interrupt_exits_130(
    calibrate: Calibrate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C ends with one line instead of a traceback, and no bundle is left."""

    def interrupt(self: TerminalProgress, title: str, *, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TerminalProgress, "__call__", interrupt)

    assert calibrate() == INTERRUPTED
    line = only_line(capsys.readouterr().err)
    assert line == "normgate: interrupted; nothing was written"
    assert not (tmp_path / "store").exists()


def test_models_lists_every_version(
    calibrate: Calibrate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row a bundle, with its version, architecture and block."""
    for name in ("tiny", "tiny", "other"):
        assert calibrate("--name", name) == 0
    capsys.readouterr()

    assert main(["models", "--model-store", str(tmp_path / "store")]) == 0

    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    block = Store(tmp_path / "store").read("tiny").block
    assert [row[:4] for row in rows] == [
        ["other", "1", "cifar/resnet18", block],
        ["tiny", "1", "cifar/resnet18", block],
        ["tiny", "2", "cifar/resnet18", block],
    ]


def test_models_tells_a_damaged_bundle(
    calibrate: Calibrate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle that cannot be read ends the list with its name."""
    assert calibrate() == 0
    (tmp_path / "store" / "tiny" / "1" / BUNDLE_FILE).write_text("{")
    capsys.readouterr()

    assert main(["models", "--model-store", str(tmp_path / "store")]) == 1
    assert "tiny/1/bundle.json" in only_line(capsys.readouterr().err)


def evaluate(store: Path, options: CalibrationOptions, *flags: str) -> int:
    """Run ``normgate evaluate`` on the calibration images."""
    return main(
        [
            "evaluate",
            *("--bundle", "tiny", "--id", str(options.threshold_images)),
            *("--ood", f"drawn={options.selection_images}", "--model-store", str(store), *flags),
        ]
    )


def test_evaluate_reports_and_writes_json(
    tiny_store: Store,
    tiny_options: CalibrationOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The figures are on the terminal and, on request, in a JSON file."""
    file = tmp_path / "figures.json"
    again = f"again={tiny_options.threshold_images}"

    status = evaluate(
        tiny_store.root, tiny_options, "--json", str(file), "--ood", again, "--codec", "jpeg75"
    )

    assert status == 0
    figures: dict[str, Any] = json.loads(file.read_text())
    assert figures["bundle"] == "tiny/1"
    assert figures["codec"] == "jpeg75"
    assert figures["ood_images"] == {"drawn": IMAGES, "again": IMAGES}
    assert figures["false_alarm_rate"] == 4 / 24
    report = capsys.readouterr().out
    assert "false alarms: 16.67%" in report
    assert f"{figures['results']['feature_norm']['drawn']['auroc']:.3f} / " in report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bundle", "absent"], "no model 'absent' in"),
        (["--bundle", "tiny/9"], "model 'tiny' has no version 9; it has: 1"),
        (["--bundle", "tiny/x"], "bundle is 'tiny/x'; it must read NAME or NAME/VERSION"),
        (["--bundle", "../tiny"], "bundle is '../tiny'; it must read NAME or NAME/VERSION"),
        (["--bundle", "tiny/"], "bundle is 'tiny/'; it must read NAME or NAME/VERSION"),
        (["--id", "absent"], "absent is not a folder"),
        (["--ood", "x=absent"], "absent is not a folder"),
        (["--json", "absent/figures.json"], "absent/figures.json cannot be written"),
        (["--near", "other"], "--near names other; --ood has drawn"),
        (["--near", "drawn", "--far", "drawn"], "drawn is called both near and far"),
        (["--paper"], "was calibrated with edge keep"),
        (["--train", "absent"], "absent is not a folder"),
    ],
)
def test_evaluate_tells_what_is_wrong(
    tiny_store: Store,
    tiny_options: CalibrationOptions,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """The status is 1, and the last line names the value."""
    assert evaluate(tiny_store.root, tiny_options, *flags) == 1

    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("normgate: error: ")
    assert message in line


@pytest.mark.parametrize("value", ["folder", "=folder", "name="])
def test_an_ood_set_needs_name_and_folder(
    tiny_store: Store,
    tiny_options: CalibrationOptions,
    capsys: pytest.CaptureFixture[str],
    value: str,
) -> None:
    """Half of ``NAME=DIR`` is wrong usage."""
    with pytest.raises(SystemExit) as caught:
        evaluate(tiny_store.root, tiny_options, "--ood", value)

    assert caught.value.code == 2
    assert f"{value!r} must read NAME=DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "x"], "NORMGATE_PORT is 'x': "),
        (["--devices", "gpu"], "NORMGATE_DEVICES is 'gpu': "),
        (["--max-batch-size", "0"], "NORMGATE_MAX_BATCH_SIZE is '0': "),
        (["--allowed-factories", "a:b"], "NORMGATE_ALLOWED_FACTORIES is 'a:b': "),
    ],
)
def test_serve_does_not_start_with_a_bad_setting(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    """A bad flag of the server ends it with one line."""
    assert main(["serve", *flags]) == 1
    assert message in only_line(capsys.readouterr().err)


def test_serve_does_not_start_with_an_unknown_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the misspelt variable."""
    monkeypatch.setenv("NORMGATE_PROT", "9000")

    assert main(["serve"]) == 1
    assert "unknown setting NORMGATE_PROT" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("command", [[], ["serve"], ["calibrate"], ["evaluate"], ["models"]])
def test_help_exits_0(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """Every command explains itself."""
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])

    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: normgate")


@pytest.mark.parametrize("command", [[], ["dance"]])
def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """Without a command, or with one there is not, the status is 2."""
    with pytest.raises(SystemExit) as caught:
        main(command)

    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_help_does_not_import_torch() -> None:
    """Help answers at once: neither torch nor the web framework is imported for it."""
    code = (
        "import sys\n"
        "from app.cli import main\n"
        "try:\n"
        "    main(['calibrate', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'torchvision', 'scipy', 'fastapi', 'uvicorn'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert result.returncode == 0, result.stderr


def test_the_pointer_by_command(
    tiny_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Push, activate and roll back; the list tells which version is pointed to."""
    store = str(tmp_path / "store")
    assert main(["models", "--model-store", str(tiny_store.root), "push", "tiny", store]) == 0
    add_version(tmp_path / "store" / "tiny", 2)

    assert main(["models", "activate", "tiny/1", "--model-store", store]) == 0
    assert main(["models", "activate", "tiny/2", "--model-store", store]) == 0
    assert main(["models", "rollback", "tiny", "--model-store", store]) == 0
    assert main(["models", "--model-store", store]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"pushed to {store}/tiny/1",
        "tiny: version 1, before unknown",
        "tiny: version 2, before 1",
        "tiny: version 1, before 2",
    ]
    assert ["active" in line for line in lines if line.startswith("│ tiny")] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["activate", "tiny"], "bundle is 'tiny'; it must read NAME/VERSION"),
        (["activate", "tiny/3"], "model 'tiny' has no version 3; it has: 1"),
        (["rollback", "tiny"], "tiny/active.json names no version before"),
        (["push", "tiny/1", "nosuch://a"], "NORMGATE_MODEL_STORE is nosuch://a: Protocol not"),
    ],
)
def test_a_bad_step_is_one_line(
    tiny_store: Store, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """What cannot be done is told in one line, and nothing is changed."""
    assert main(["models", "--model-store", str(tiny_store.root), *arguments]) == 1

    assert message in only_line(capsys.readouterr().err)
    assert tiny_store.pointer("tiny") is None
