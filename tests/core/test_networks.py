"""Architectures by id, weights from files, and what a network is published with."""

import os
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from app.core.images import Preprocessing
from app.core.networks import (
    CIFAR10_LABELS,
    CIFAR_PREPROCESSING,
    IMAGENET_PREPROCESSING,
    Architecture,
    Arguments,
    build,
    default_labels,
    default_preprocessing,
    load_weights,
    read_weights,
)
from app.errors import NetworkError

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([7.0, 8.0])}


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._folder),)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same tensors under the same keys."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("architecture", "family", "name"),
    [
        ("cifar/resnet18", "cifar", "resnet18"),
        ("timm/hf_hub:owner/model", "timm", "hf_hub:owner/model"),
        ("python/package.module:factory", "python", "package.module:factory"),
    ],
)
def test_architecture_id(architecture: str, family: str, name: str) -> None:
    """An id is a family and, after the first slash, a name."""
    parsed = Architecture(id=architecture)

    assert (parsed.family, parsed.name) == (family, name)


@pytest.mark.parametrize("architecture", ["", "resnet18", "cifar/", "keras/resnet50", "/resnet18"])
def test_malformed_architecture_id(architecture: str) -> None:
    """An id of no known family, or without a name, is refused."""
    with pytest.raises(ValidationError, match="id"):
        Architecture(id=architecture)


@pytest.mark.parametrize(
    ("architecture", "arguments", "channels"),
    [
        ("cifar/resnet18", {"width": 4}, 4),
        ("cifar/wrn28_10", {"widen_factor": 1}, 16),
        ("cifar/vgg11", {"width": 8}, 8),
        ("torchvision/squeezenet1_1", {"num_classes": 10}, 64),
        ("python/app.core.cifar:ResNet18", {"width": 2}, 2),
    ],
)
def test_build(architecture: str, arguments: Arguments, channels: int) -> None:
    """The network takes the arguments, is in evaluation mode and gives ten logits."""
    network = build(Architecture(id=architecture, arguments=arguments))

    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert first.out_channels == channels
    assert not any(module.training for module in network.modules())
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("cifar/resnet19", "cifar/resnet19 is unknown; there are resnet18, wrn28_10, vgg11"),
        ("torchvision/resnet19", "torchvision/resnet19 is not one of torchvision's classifiers"),
        ("torchvision/fcn_resnet50", "is not one of torchvision's classifiers"),
        ("python/app.core.cifar", r"must read python/package\.module:factory"),
        ("python/no.such.module:factory", "cannot be imported: No module named 'no'"),
        ("python/app.core.cifar:NoSuchNetwork", "cannot be imported: .* 'NoSuchNetwork'"),
        ("python/collections:OrderedDict", r"returned OrderedDict, not a torch\.nn\.Module"),
    ],
)
def test_unknown_network(architecture: str, message: str) -> None:
    """The message names the id and what is wrong with it."""
    with pytest.raises(NetworkError, match=message):
        build(Architecture(id=architecture))


@pytest.mark.parametrize("architecture", ["cifar/resnet18", "python/app.core.cifar:ResNet18"])
def test_unknown_argument(architecture: str) -> None:
    """An argument the builder does not take is named, with the architecture."""
    with pytest.raises(NetworkError, match=rf"{architecture} with arguments .*depth"):
        build(Architecture(id=architecture, arguments={"depth": 3}))


def test_safetensors(tmp_path: Path) -> None:
    """A safetensors file is read as it is."""
    save_file(WEIGHTS, tmp_path / "weights.safetensors")

    assert same(read_weights(tmp_path / "weights.safetensors"), WEIGHTS)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_file(tmp_path: Path, wrapper: str | None, prefix: str, suffix: str) -> None:
    """A checkpoint's wrapper is opened, and the prefix of parallel training removed."""
    state = {prefix + key: value for key, value in WEIGHTS.items()}
    path = tmp_path / f"weights{suffix}"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)

    assert same(read_weights(path), WEIGHTS)


def test_malicious_pickle(tmp_path: Path) -> None:
    """A file that would run code is refused, and the code does not run."""
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    torch.save({"weight": Intruder(trace)}, path)

    with pytest.raises(NetworkError, match="are not a plain state dict of tensors") as refusal:
        read_weights(path)

    assert not trace.exists()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content", [{"weight": [1.0, 2.0]}, {"epoch": 3, **WEIGHTS}, {}, [torch.ones(2)], 3]
)
def test_not_a_state_dict(tmp_path: Path, content: object) -> None:
    """What is not a mapping of tensors alone is refused."""
    torch.save(content, tmp_path / "weights.pt")

    with pytest.raises(NetworkError, match="state dict"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"no weights at all"])
def test_unreadable_file(tmp_path: Path, name: str, content: bytes | None) -> None:
    """A missing, empty or foreign file is refused by its path, in one line."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(NetworkError, match=name) as refusal:
        read_weights(path)

    assert "\n" not in str(refusal.value)


def test_load_weights() -> None:
    """The network computes with the loaded weights."""
    network = nn.Linear(3, 2)

    load_weights(network, WEIGHTS)

    # Rows (0, 1, 2) and (3, 4, 5) summed, plus 7 and 8.
    assert network(torch.ones(1, 3)).tolist() == [[10.0, 20.0]]


def test_mismatch() -> None:
    """Missing and unexpected keys and other shapes are listed, and nothing is loaded."""
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    weights = {"weight": torch.zeros(4, 3), "scale": torch.ones(1), "shift": torch.ones(1)}

    with pytest.raises(NetworkError) as refusal:
        load_weights(network, weights)

    assert str(refusal.value) == (
        "weights do not fit Linear: 1 missing: bias; 2 unexpected: scale, shift; "
        "1 of another shape: weight ([4, 3], not [2, 3])"
    )
    assert torch.equal(network.weight, before)


def test_long_mismatch_is_cut() -> None:
    """Of many keys five are listed and the rest counted."""
    weights = WEIGHTS | {f"extra{i}": torch.ones(1) for i in range(8)}

    with pytest.raises(NetworkError, match=r"8 unexpected: extra0, .*, extra4 and 3 more$"):
        load_weights(nn.Linear(3, 2), weights)


@pytest.mark.parametrize(
    ("architecture", "classes", "first", "last"),
    [
        ("cifar/resnet18", 10, "airplane", "truck"),
        ("cifar/resnet18", 7, "class 0", "class 6"),
        ("torchvision/resnet50", 1000, "tench", "toilet tissue"),
        ("torchvision/resnet50", 3, "class 0", "class 2"),
        ("python/my.package:network", 10, "class 0", "class 9"),
    ],
)
def test_default_labels(architecture: str, classes: int, first: str, last: str) -> None:
    """The published labels where their number fits, else numbered ones."""
    labels = default_labels(Architecture(id=architecture), classes=classes)

    assert len(labels) == classes
    assert (labels[0], labels[-1]) == (first, last)


def test_cifar_labels() -> None:
    """CIFAR-10 has ten labels, in alphabetical order as in its files."""
    assert len(CIFAR10_LABELS) == 10
    assert list(CIFAR10_LABELS) == sorted(CIFAR10_LABELS)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("cifar/vgg11", CIFAR_PREPROCESSING),
        ("python/my.package:network", IMAGENET_PREPROCESSING),
        ("torchvision/vgg16", IMAGENET_PREPROCESSING),
        (
            "torchvision/efficientnet_b0",
            IMAGENET_PREPROCESSING.model_copy(update={"interpolation": "bicubic"}),
        ),
        (
            "torchvision/inception_v3",
            IMAGENET_PREPROCESSING.model_copy(update={"resize": 342, "crop": 299}),
        ),
    ],
)
def test_default_preprocessing(architecture: str, expected: Preprocessing) -> None:
    """What the architecture is published with; ImageNet's for a user's own network."""
    assert default_preprocessing(Architecture(id=architecture)) == expected


@pytest.mark.parametrize("name", ["resnet19", "fcn_resnet50"])
def test_no_default_preprocessing(name: str) -> None:
    """For what is no classifier of torchvision there is nothing to look up."""
    with pytest.raises(NetworkError, match="is not one of torchvision's classifiers"):
        default_preprocessing(Architecture(id=f"torchvision/{name}"))


def test_a_bundles_weights_can_be_calibrated_again(tmp_path: Path) -> None:
    """What a bundle keeps beside the weights in their file is left out."""
    file = tmp_path / "weights.safetensors"
    save_file({"conv.weight": torch.ones(2), "normgate.calibration_scores": torch.ones(3)}, file)

    assert list(read_weights(file)) == ["conv.weight"]
