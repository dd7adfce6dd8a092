"""The other methods: each agrees with pytorch-ood's own detector run on the images."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_ood import detector as pytorch_ood
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from app.core import cifar
from app.core.blocks import Block, BlockNorms
from app.offline.methods import FITTED, Methods, SelectedNormNetwork, vim_dimension

STD = (0.2, 0.25, 0.3)
BLOCK = Block("layer4.0", "maps")
TOLERANCE = 1e-5


class Encoder(nn.Module):
    """The network without its last layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*list(network.children())[:-1], nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, D]``."""
        features: Tensor = self.layers(images)
        return features


@pytest.fixture(scope="module")
def network() -> cifar.ResNet18:
    """A small residual network with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return cifar.ResNet18(width=4).eval()


@pytest.fixture(scope="module")
def training() -> tuple[Tensor, Tensor]:
    """120 images and their classes; class 4 occurs nowhere."""
    torch.manual_seed(1)
    return torch.randn(120, 3, 32, 32), torch.tensor(
        [i % 10 if i % 10 != 4 else 5 for i in range(120)]
    )


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Images to score."""
    torch.manual_seed(2)
    return torch.randn(16, 3, 32, 32)


@pytest.fixture(scope="module")
def scores(
    network: cifar.ResNet18, training: tuple[Tensor, Tensor], images: Tensor
) -> dict[str, NDArray[np.float64]]:
    """Ours, from one forward pass and ODIN's backward passes."""
    methods = Methods(network, block=BLOCK, head="fc", std=STD)
    norms = BlockNorms(network, [BLOCK])
    with torch.no_grad():
        _, _, fit_features = norms.run_with_features(training[0], head="fc")
        methods.fit(fit_features, training[1].numpy())
        logits, feature_norms, features = norms.run_with_features(images, head="fc")
        found = methods.of_outputs(feature_norms[BLOCK.name], logits, features)
    return {**found, **methods.of_inputs(images)}


def own_detector(name: str, network: cifar.ResNet18) -> object:
    """pytorch-ood's detector on whole images, as its users build it."""
    encoder, fc = Encoder(network), network.fc
    makers = {
        "msp": lambda: pytorch_ood.MaxSoftmax(network),
        "max_logit": lambda: pytorch_ood.MaxLogit(network),
        "energy": lambda: pytorch_ood.EnergyBased(network),
        "odin": lambda: pytorch_ood.ODIN(network, norm_std=list(STD)),
        "energy_react": lambda: pytorch_ood.ReAct(encoder, fc),
        "energy_dice": lambda: pytorch_ood.DICE(encoder, fc.weight, fc.bias, p=0.9),
        "gradnorm": lambda: pytorch_ood.GradNorm(network, lambda key: key == "fc.weight"),
        "vim": lambda: pytorch_ood.ViM(encoder, 16, fc.weight, fc.bias),
        "mahalanobis": lambda: pytorch_ood.Mahalanobis(encoder),
        "knn": lambda: pytorch_ood.KNN(encoder, k=50),
        "selected_norm_odin": lambda: pytorch_ood.ODIN(
            SelectedNormNetwork(network, block=BLOCK, head="fc"), norm_std=list(STD)
        ),
    }
    return makers[name]()


@pytest.mark.parametrize(
    "name",
    ["msp", "max_logit", "energy", "odin", "gradnorm", "selected_norm_odin", *FITTED],
)
def test_agreement_with_pytorch_ood(
    name: str,
    network: cifar.ResNet18,
    training: tuple[Tensor, Tensor],
    images: Tensor,
    scores: dict[str, NDArray[np.float64]],
) -> None:
    """Every score that pytorch-ood computes is its own, to 1e-5, with the sign turned."""
    detector = own_detector(name, network).to("cpu")  # type: ignore[attr-defined]
    if name in FITTED:
        # Its Mahalanobis wants classes without a gap.
        _, labels = training[1].unique(return_inverse=True)
        detector.fit(DataLoader(TensorDataset(training[0], labels), batch_size=40))
    outlier = detector.predict(images).detach().double().numpy()

    np.testing.assert_allclose(scores[name], -outlier, rtol=TOLERANCE, atol=TOLERANCE)


def test_all_methods_are_there(scores: dict[str, NDArray[np.float64]]) -> None:
    """The paper's scores, the combined one, and those it is compared with."""
    assert scores.keys() == {
        *("feature_norm", "norm_logit"),
        *("selected_norm_energy", "selected_norm_msp", "selected_norm_odin"),
        *("msp", "max_logit", "energy", "odin", "gradnorm", *FITTED),
    }
    assert all(values.shape == (16,) for values in scores.values())
    assert all(np.isfinite(values).all() for values in scores.values())


def test_without_a_head(network: cifar.ResNet18, images: Tensor) -> None:
    """What needs the last feature vector is left out; the rest is there."""
    methods = Methods(network, block=BLOCK, head=None, std=STD)
    with torch.no_grad():
        logits, norms = BlockNorms(network, [BLOCK]).run(images)
        found = methods.of_outputs(norms[BLOCK.name], logits, None)

    assert found.keys() == {"feature_norm", "norm_logit", "msp", "max_logit", "energy"}
    assert methods.of_inputs(images).keys() == {"odin"}


def test_gradients_leave_nothing_behind(network: cifar.ResNet18, images: Tensor) -> None:
    """Scoring with gradients fills no parameter's gradient and leaves no hook."""
    Methods(network, block=BLOCK, head="fc", std=STD).of_inputs(images)

    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(("size", "dimension"), [(128, 64), (768, 512), (2048, 1000)])
def test_vim_dimension(size: int, dimension: int) -> None:
    """OpenOOD's choice by the length of the features."""
    assert vim_dimension(size) == dimension
