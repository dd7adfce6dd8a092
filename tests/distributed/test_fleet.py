"""What a Ray cluster is asked for, and what holds for one replica of many."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.distributed.fleet import Fleet, replica_settings
from app.errors import SettingsError
from app.settings import Settings
from tests.test_server import ROOT


@pytest.mark.parametrize(
    ("options", "devices", "gpus"),
    [
        ({}, "auto", 0),
        ({}, "cpu", 0),
        ({}, "cuda", 1),
        ({}, "cuda:0,cuda:1", 2),
        ({"replica_gpus": "0.5"}, "cuda", 0.5),
        ({"replica_gpus": 0.25}, "auto", 0.25),
    ],
)
def test_gpus(options: dict[str, Any], devices: str, gpus: float) -> None:
    """A replica reserves the GPUs that its devices name, or as much of one as is asked for."""
    assert Fleet.read(options).gpus(Settings.read({"devices": devices})) == gpus


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_replicas": 0}, "min_replicas is 0"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2; min_replicas is 3"),
        ({"replica_gpus": -1}, "replica_gpus is -1"),
        ({"replicas": 2}, "replicas is 2"),
    ],
)
def test_refused(options: dict[str, Any], reason: str) -> None:
    """What cannot be is refused in one line that names it."""
    with pytest.raises(SettingsError, match=reason):
        Fleet.read(options)


def test_a_replica_takes_what_it_reserves() -> None:
    """It computes on the cores it reserves, on no GPU that it does not, from an absolute store."""
    settings = replica_settings(Settings.read({"model_store": "here"}), Fleet(replica_cpus=2.5))

    assert (settings.compute_threads, settings.devices) == (2, "cpu")
    assert settings.model_store == Path.cwd() / "here"


def test_what_was_set_stays() -> None:
    """A store's URL, a number of threads, and devices where a GPU is reserved."""
    set_by_hand = {"model_store": "s3://bucket/models", "compute_threads": 3}
    settings = replica_settings(Settings.read(set_by_hand), Fleet(replica_gpus=0.5))

    assert (settings.model_store, settings.compute_threads) == ("s3://bucket/models", 3)
    assert settings.devices == "auto"


def test_no_admin_token() -> None:
    """Admin routes would change one replica of many."""
    with pytest.raises(SettingsError, match="one replica of many"):
        replica_settings(Settings.read({"admin_token": "secret"}), Fleet())


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Ray the flag says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "app.distributed.serving", raising=False)

    assert main(["serve", "--ray"]) == 1
    assert capsys.readouterr().err.endswith("pip install 'normgate[ray]'\n")


def test_ray_is_not_imported() -> None:
    """The command, the server and the offline work load nothing of Ray where nobody asks for it."""
    code = (
        "import sys, app.cli, app.distributed.fleet, app.main, app.offline.calibrate, app.server; "
        "sys.exit(any(name.partition('.')[0] == 'ray' for name in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_options_of_a_fleet_need_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """One process has no replicas to count."""
    assert main(["serve", "--max-replicas", "2"]) == 1
    assert "max_replicas: only with --ray" in capsys.readouterr().err


def test_a_gpu_that_ray_numbers_otherwise() -> None:
    """A replica sees the GPUs that it reserved from number 0 on."""
    settings = Settings.read({"devices": "cuda:1"})

    with pytest.raises(SettingsError, match="NORMGATE_DEVICES is cuda:1; Ray numbers the GPUs"):
        replica_settings(settings, Fleet())
