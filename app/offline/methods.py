"""The methods FeatureNorm is compared with: pytorch-ood's wherever it has the detector."""

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.core.blocks import Block, BlockNorms
from app.core.scores import SCORES, Evidence, ScoreName, selected_norm_logits
from app.errors import CalibrationError

Scores = NDArray[np.float64]

FITTED: Final = ("energy_react", "energy_dice", "vim", "mahalanobis", "knn")
"""Methods that are fitted on ID training images."""

_OURS: Final[tuple[ScoreName, ...]] = ("feature_norm", "norm_logit")
_OURS_WITH_HEAD: Final[tuple[ScoreName, ...]] = ("selected_norm_energy", "selected_norm_msp")
_ODIN_TEMPERATURE: Final = 1000.0
_ODIN_STEP: Final = 0.0014
_NEIGHBOURS: Final = 50
_DICE_SPARSITY: Final = 0.9
_DICE_PRODUCTS: Final = 2**24


class SelectedNormNetwork(nn.Module):
    """A classifier whose last feature vector has the selected block's norm as its length.

    Args:
        network: in evaluation mode; it ends in a linear layer.
        block: the selected block.
        head: name of that linear layer.
    """

    def __init__(self, network: nn.Module, *, block: Block, head: str) -> None:
        super().__init__()
        self.network = network
        self._norms = BlockNorms(network, [block])
        self._block = block
        self._head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``; gradients run through the norm too."""
        logits, norms, features = self._norms.run_with_features(images, head=self._head)
        return selected_norm_logits(
            logits,
            features=features,
            bias=_linear(self.network, self._head).bias,
            feature_norms=norms[self._block.name],
        )


class Methods:
    """Every score of a batch, higher meaning more in-distribution.

    Args:
        network: in evaluation mode, on its device.
        block: the selected block.
        head: name of the last linear layer; without one the methods that need it are left out.
        std: the preprocessing's, which ODIN's step is measured in.

    Raises:
        CalibrationError: pytorch-ood or scikit-learn is not installed.
    """

    def __init__(
        self, network: nn.Module, *, block: Block, head: str | None, std: tuple[float, ...]
    ) -> None:
        self._detectors = _pytorch_ood()
        self._network = network
        self._head = head
        self._odin = self._make_odin(network, std)
        self._selected_norm_odin = None
        self._by_feature: dict[str, Callable[[Tensor], Tensor]] = {}
        if head is not None:
            rescaled = SelectedNormNetwork(network, block=block, head=head)
            self._selected_norm_odin = self._make_odin(rescaled, std)
            gradnorm = self._detectors.GradNorm(
                _in_float32(_linear(network, head)), param_filter=lambda name: name == "weight"
            )
            self._by_feature["gradnorm"] = gradnorm.predict

    def fit(self, features: Tensor, labels: NDArray[np.int64]) -> None:
        """Fit ReAct, DICE, ViM, Mahalanobis and KNN on ID training images.

        Args:
            features: the head's inputs ``[N, D]`` float32 on the CPU.
            labels: their classes ``[N]``.
        """
        assert self._head is not None
        head = _in_float32(_linear(self._network, self._head))
        weight, bias = head.weight.detach().cpu(), _bias(head).cpu()
        size = features.shape[1]
        # Classes as 0, 1, ..: Mahalanobis wants each of them to occur.
        _, occurring = np.unique(labels, return_inverse=True)
        known = torch.from_numpy(occurring)
        detectors = self._detectors
        react = detectors.ReAct(None, head).fit_feature_maps(features, known)
        dice = detectors.DICE(None, weight, bias, p=_DICE_SPARSITY).fit_features(features, known)
        self._by_feature["energy_react"] = react.predict_feature_maps
        # DICE holds [B, classes, D] at once.
        rows = max(1, _DICE_PRODUCTS // weight.numel())
        self._by_feature["energy_dice"] = lambda batch: torch.cat(
            [dice.predict_features(part) for part in batch.cpu().split(rows)]
        )
        for name, detector in (
            ("vim", detectors.ViM(None, vim_dimension(size), weight, bias)),
            ("mahalanobis", detectors.Mahalanobis(None)),
            ("knn", detectors.KNN(None, k=min(_NEIGHBOURS, len(features)))),
        ):
            self._by_feature[name] = _on_cpu(detector.fit_features(features, known))

    def of_outputs(
        self, feature_norms: Tensor, logits: Tensor, features: Tensor | None
    ) -> Mapping[str, Scores]:
        """The scores that one forward pass has everything for.

        Args:
            feature_norms: of the selected block ``[B]``.
            logits: ``[B, classes]``.
            features: the head's input ``[B, D]``, where there is a head.
        """
        # Doubles keep probabilities apart that all round to 1.
        logits = logits.double()
        detectors = self._detectors
        rescaled = None
        if features is not None and self._head is not None:
            rescaled = selected_norm_logits(
                logits,
                features=features,
                bias=_linear(self._network, self._head).bias,
                feature_norms=feature_norms,
            )
        evidence = Evidence(feature_norms, logits, rescaled)
        names = _OURS if rescaled is None else _OURS + _OURS_WITH_HEAD
        scores: dict[str, Scores] = {name: _array(SCORES[name](evidence)) for name in names}
        for name, detector in (
            ("msp", detectors.MaxSoftmax),
            ("max_logit", detectors.MaxLogit),
            ("energy", detectors.EnergyBased),
        ):
            scores[name] = _array(-detector(None).predict_logits(logits))
        return scores | self._of_features(features)

    def of_inputs(self, inputs: Tensor) -> Mapping[str, Scores]:
        """The scores that need a backward pass: ODIN, plain and with the selected norm."""
        scores = {"odin": _array(-self._odin.predict(inputs))}
        if self._selected_norm_odin is not None:
            scores["selected_norm_odin"] = _array(-self._selected_norm_odin.predict(inputs))
        return scores

    def _make_odin(self, network: nn.Module, std: tuple[float, ...]) -> Any:
        return self._detectors.ODIN(
            network, eps=_ODIN_STEP, temperature=_ODIN_TEMPERATURE, norm_std=list(std)
        )

    def _of_features(self, features: Tensor | None) -> dict[str, Scores]:
        if features is None:
            return {}
        batch = features.float()
        return {name: _array(-outlier(batch)) for name, outlier in self._by_feature.items()}


def vim_dimension(size: int) -> int:
    """Dimensions of ViM's principal space for features of ``size``, as in OpenOOD."""
    if size >= 2048:
        return 1000
    return 512 if size >= 768 else size // 2


def _on_cpu(detector: Any) -> Callable[[Tensor], Tensor]:
    def outlier(features: Tensor) -> Tensor:
        scores: Tensor = detector.predict_features(features.cpu())
        return scores

    return outlier


def _linear(network: nn.Module, name: str) -> nn.Linear:
    module = network.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _in_float32(head: nn.Linear) -> nn.Linear:
    """The layer, for features in float32: a copy where the network computes in another dtype."""
    return head if head.weight.dtype == torch.float32 else copy.deepcopy(head).float()


def _bias(head: nn.Linear) -> Tensor:
    bias: Tensor | None = head.bias
    return torch.zeros(head.out_features) if bias is None else bias.detach()


def _array(scores: Tensor) -> Scores:
    array: Scores = scores.detach().double().cpu().numpy()
    return array


def _pytorch_ood() -> Any:
    try:
        importlib.import_module("sklearn")
        return importlib.import_module("pytorch_ood.detector")
    except ImportError as error:
        raise CalibrationError(
            "the other methods need pytorch-ood and scikit-learn: pip install 'normgate[evaluate]'"
        ) from error
