"""Classifiers by architecture id: built, labelled, and filled with weights.

An id is ``cifar/<name>``, ``torchvision/<name>``, ``timm/<name>`` (with timm installed) or
``python/<package.module:factory>`` for a user's own ``nn.Module``.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from app.core import cifar
from app.core.images import Preprocessing
from app.errors import NetworkError

Arguments = dict[str, bool | int | float | str]

CIFAR_NETWORKS: Final[Mapping[str, Callable[..., nn.Module]]] = {
    "resnet18": cifar.ResNet18,
    "wrn28_10": cifar.WideResNet28x10,
    "vgg11": cifar.VGG11,
}
CIFAR10_LABELS: Final = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR_PREPROCESSING: Final = Preprocessing(
    resize=32, crop=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)
IMAGENET_PREPROCESSING: Final = Preprocessing(
    resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
RESERVED_PREFIX: Final = "normgate."
_LISTED_KEYS: Final = 5


class Architecture(BaseModel):
    """A network without its weights: an id and the arguments its builder takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^(cifar|torchvision|timm|python)/.+$")
    arguments: Arguments = Field(default_factory=dict)

    @property
    def family(self) -> str:
        """The part before the slash."""
        return self.id.partition("/")[0]

    @property
    def name(self) -> str:
        """The part after the slash."""
        return self.id.partition("/")[2]


def build(architecture: Architecture) -> nn.Module:
    """The network in evaluation mode, with random weights (or the factory's own).

    Raises:
        NetworkError: the id is unknown, or the builder refuses the arguments.
    """
    builder = _BUILDERS[architecture.family]
    try:
        network = builder(architecture.name, **architecture.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NetworkError(
            f"{architecture.id} with arguments {architecture.arguments}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise NetworkError(
            f"{architecture.id} returned {type(network).__name__}, not a torch.nn.Module"
        )
    return network.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict, from safetensors or from a ``torch.save`` file without arbitrary code.

    ``state_dict`` and ``model`` wrappers are opened and ``module.`` prefixes removed.

    Raises:
        NetworkError: the file is missing, unreadable, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            # A bundle's own weights file has more in it than weights.
            weights = load_file(path)
            return {key: value for key, value in weights.items() if not is_reserved(key)}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise NetworkError(f"weights {path} cannot be read: {error}") from error
    except Exception as error:  # torch raises pickle.UnpicklingError with a page of advice
        raise NetworkError(f"weights {path} are not a plain state dict of tensors") from error
    return _unwrapped(content, path)


def is_reserved(key: str) -> bool:
    """Whether a bundle keeps something of its own under this key, beside the weights."""
    return key.startswith(RESERVED_PREFIX)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill the network in place.

    Raises:
        NetworkError: keys are missing or unexpected, or shapes differ; the message lists them.
    """
    expected = network.state_dict()
    problems = [
        _listed("missing", expected.keys() - weights.keys()),
        _listed("unexpected", weights.keys() - expected.keys()),
        _listed(
            "of another shape",
            (
                f"{key} ({list(weights[key].shape)}, not {list(expected[key].shape)})"
                for key in expected.keys() & weights.keys()
                if weights[key].shape != expected[key].shape
            ),
        ),
    ]
    if any(problems):
        raise NetworkError(
            f"weights do not fit {type(network).__name__}: " + "; ".join(filter(None, problems))
        )
    network.load_state_dict(weights)


def default_labels(architecture: Architecture, *, classes: int) -> tuple[str, ...]:
    """The labels the architecture is published with, or ``class 0`` ... where they do not fit."""
    labels: tuple[str, ...] = ()
    if architecture.family == "cifar":
        labels = CIFAR10_LABELS
    elif architecture.family == "torchvision":
        published = _torchvision_models().get_model_weights(architecture.name)
        labels = tuple(next(iter(published)).meta["categories"])
    return labels if len(labels) == classes else tuple(f"class {i}" for i in range(classes))


def default_preprocessing(architecture: Architecture) -> Preprocessing:
    """The preprocessing the architecture is published with; ImageNet's for a user's own."""
    if architecture.family == "cifar":
        return CIFAR_PREPROCESSING
    if architecture.family == "torchvision":
        return _torchvision_preprocessing(architecture.name)
    if architecture.family == "timm":
        return _timm_preprocessing(architecture)
    return IMAGENET_PREPROCESSING


def _build_cifar(name: str, **arguments: Any) -> nn.Module:
    if name not in CIFAR_NETWORKS:
        raise NetworkError(f"cifar/{name} is unknown; there are {', '.join(CIFAR_NETWORKS)}")
    return CIFAR_NETWORKS[name](**arguments)


def _build_torchvision(name: str, **arguments: Any) -> nn.Module:
    _check_torchvision(name)
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads exist for training alone, and slow initialisation warns.
        arguments = {"init_weights": False, "aux_logits": False} | arguments
    network = _torchvision_models().get_model(name, weights=None, **arguments)
    return cast(nn.Module, network)


def _check_torchvision(name: str) -> None:
    models = _torchvision_models()
    if name not in models.list_models(module=models):
        raise NetworkError(f"torchvision/{name} is not one of torchvision's classifiers")


def _build_timm(name: str, **arguments: Any) -> nn.Module:
    return cast(nn.Module, _timm().create_model(name, pretrained=False, **arguments))


def _build_python(name: str, **arguments: Any) -> nn.Module:
    module_name, separator, factory_name = name.partition(":")
    if not separator:
        raise NetworkError(f"python/{name} must read python/package.module:factory")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise NetworkError(f"python/{name} cannot be imported: {error}") from error
    return cast(nn.Module, factory(**arguments))


_BUILDERS: Final[Mapping[str, Callable[..., nn.Module]]] = {
    "cifar": _build_cifar,
    "torchvision": _build_torchvision,
    "timm": _build_timm,
    "python": _build_python,
}


def _torchvision_models() -> Any:
    # Not at the top: its import takes as long as torch's, and few services have a network of its.
    return importlib.import_module("torchvision.models")


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise NetworkError("timm/ architectures need timm: pip install 'normgate[timm]'") from error


def _torchvision_preprocessing(name: str) -> Preprocessing:
    _check_torchvision(name)
    preset = next(iter(_torchvision_models().get_model_weights(name))).transforms()
    return Preprocessing(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=preset.mean,
        std=preset.std,
    )


def _timm_preprocessing(architecture: Architecture) -> Preprocessing:
    settings = _timm().data.resolve_model_data_config(build(architecture))
    crop = settings["input_size"][1]
    return Preprocessing(
        resize=max(crop, int(crop / settings["crop_pct"])),
        crop=crop,
        interpolation=settings["interpolation"],
        mean=settings["mean"],
        std=settings["std"],
    )


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise NetworkError(f"weights {path} hold {type(content).__name__}, not a state dict")
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise NetworkError(
            f"weights {path} are not a plain state dict of tensors: "
            + _listed("other entries", map(str, others))
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _listed(what: str, keys: Iterable[str]) -> str:
    names = sorted(keys)
    if not names:
        return ""
    more = f" and {len(names) - _LISTED_KEYS} more" if len(names) > _LISTED_KEYS else ""
    return f"{len(names)} {what}: {', '.join(names[:_LISTED_KEYS])}{more}"
