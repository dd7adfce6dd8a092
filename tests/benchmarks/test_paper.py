"""The paper's suites: what is configured can be built, what is missing is named."""

import sys
import tomllib
from pathlib import Path

import pytest

from app.core.networks import Architecture, default_preprocessing
from benchmarks import paper
from tests.conftest import draw_images

SUITES = {
    name: paper.Suite.model_validate(suite)
    for name, suite in tomllib.loads(paper.CONFIGURATION.read_text()).items()
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command."""
    monkeypatch.setattr(sys, "argv", ["paper", *arguments])
    paper.main()


def test_suites() -> None:
    """The paper's two suites with their sets and networks, and one for the sets at hand."""
    assert list(SUITES) == ["cifar10", "imagenet", "local"]
    assert list(SUITES["cifar10"].ood) == [
        *("svhn", "textures", "lsun_c", "lsun_r", "isun", "places365"),
    ]
    assert list(SUITES["imagenet"].ood) == ["inaturalist", "sun", "places", "textures"]
    for suite in SUITES.values():
        for network in suite.networks.values():
            architecture = Architecture(id=network.architecture, arguments=network.arguments)
            assert default_preprocessing(architecture).crop in (32, 224)


def test_missing_folders_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each missing folder is named with where the data set is described."""
    monkeypatch.setenv("NORMGATE_DATA", str(tmp_path / "no archives"))

    with pytest.raises(SystemExit):
        run(monkeypatch, "imagenet", "--data", str(tmp_path))

    lines = capsys.readouterr().out.splitlines()
    for ood in SUITES["imagenet"].ood.values():
        assert f"missing: {tmp_path / ood.folder}: {ood.described}" in lines
    assert any(line.startswith(f"missing: {tmp_path / 'imagenet/val_test'}") for line in lines)


def test_a_missing_bundle_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without bundle and weights the network is left out; the sets that exist are used."""
    monkeypatch.setenv("NORMGATE_DATA", str(tmp_path / "no archives"))
    draw_images(tmp_path / "cifar10" / "test", range(3))
    draw_images(tmp_path / "svhn", range(3))

    run(monkeypatch, "cifar10", "--data", str(tmp_path), "--model-store", str(tmp_path / "store"))

    report = capsys.readouterr().out
    assert f"missing: {tmp_path / 'svhn'}" not in report
    assert f"missing: {tmp_path / 'isun'}" in report
    weights = tmp_path / "weights" / "cifar10-vgg11.safetensors"
    assert f"missing: bundle cifar10-vgg11 in {tmp_path / 'store'}" in report
    assert str(weights) in report
