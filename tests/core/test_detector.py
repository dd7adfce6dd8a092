"""The detector: one forward pass, the same score in any company, one verdict."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.core.blocks import Block, BlockNorms, find_blocks
from app.core.detector import BATCH_TOLERANCE, ClassLevels, Detections, Detector
from app.core.images import Preprocessing
from app.core.networks import CIFAR_PREPROCESSING, Architecture, build
from app.core.scores import SCORES, SCORES_WITH_HEAD, Evidence, ScoreName
from app.core.threshold import fit_threshold
from app.errors import NetworkError
from tests.pictures import pixels

ALPHA = 0.2
ARCHITECTURE = Architecture(id="cifar/resnet18", arguments={"width": 8})


class BrightnessNetwork(nn.Module):
    """A 1 x 1 convolution that passes the red channel on, and a head that doubles its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.red = nn.Conv2d(3, 1, 1, bias=False)
        self.red.weight.data = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 2]``: the mean and its double."""
        mean: Tensor = self.red(images).mean(dim=(2, 3))
        return torch.cat([mean, 2 * mean], dim=1)


def brightness_detector(calibration: NDArray[np.float32], threshold: float) -> Detector:
    """A detector on 2 x 2 pixels whose score is twice the red value, 0..1, of a plain image."""
    return Detector(
        BrightnessNetwork().eval(),
        block=Block("red", "maps"),
        preprocessing=Preprocessing(resize=2, crop=2, mean=(0, 0, 0), std=(1, 1, 1)),
        score="feature_norm",
        threshold=threshold,
        calibration_scores=calibration,
    )


def pictures(count: int, *, first: int = 0) -> Tensor:
    """``[count, 3, 32, 32]`` uint8 drawings."""
    return torch.stack(
        [CIFAR_PREPROCESSING.resize_and_crop(pixels(first + seed).copy()) for seed in range(count)]
    )


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small residual network with random weights."""
    torch.manual_seed(0)
    return build(ARCHITECTURE)


def resnet_detector(
    network: nn.Module, *, threshold: float, calibration: NDArray[np.float32]
) -> Detector:
    """A detector on the last but one block."""
    block = find_blocks(network, torch.zeros(1, 3, 32, 32))[-2]
    return Detector(
        network,
        block=block,
        preprocessing=CIFAR_PREPROCESSING,
        score="feature_norm",
        threshold=threshold,
        calibration_scores=calibration,
    )


@pytest.fixture(scope="module")
def detector(network: nn.Module) -> Detector:
    """A detector calibrated on 99 drawings."""
    uncalibrated = resnet_detector(network, threshold=0, calibration=np.zeros(1, np.float32))
    scores = uncalibrated.detect(pictures(99)).scores
    return resnet_detector(
        network,
        threshold=fit_threshold(scores, alpha=ALPHA).value,
        calibration=np.sort(scores),
    )


def logits_of(detections: Detections) -> NDArray[np.float32]:
    """The logits of a full forward pass."""
    assert detections.logits is not None
    return detections.logits


def test_by_hand() -> None:
    """Red 0.2, 0.4 and 1.0 of 2 x 2 pixels have norms 0.4, 0.8 and 2.0, whatever the green."""
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = torch.tensor([51, 102, 255]).view(3, 1, 1)
    images[:, 1] = 77
    calibration = np.array([0.5, 0.7, 0.9, 1.1], dtype=np.float32)

    detections = brightness_detector(calibration, threshold=0.5).detect(images)

    np.testing.assert_allclose(detections.feature_norms, [0.4, 0.8, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(detections.scores, detections.feature_norms)
    np.testing.assert_allclose(detections.p_values, [0.2, 0.6, 1.0])
    assert detections.is_ood.tolist() == [True, False, False]
    np.testing.assert_allclose(
        logits_of(detections), [[0.2, 0.4], [0.4, 0.8], [1.0, 2.0]], rtol=1e-6
    )


def test_score_at_the_threshold_is_id() -> None:
    """An image whose score equals the threshold to the last bit is ID."""
    images = torch.full((1, 3, 2, 2), 102, dtype=torch.uint8)
    free = brightness_detector(np.ones(1, dtype=np.float32), threshold=0)
    score = free.detect(images).scores

    at = brightness_detector(score, threshold=float(score[0])).detect(images)
    above = brightness_detector(score, threshold=float(np.nextafter(score[0], np.float32(9))))

    assert not at.is_ood[0]
    assert above.detect(images).is_ood[0]


def test_types(detector: Detector) -> None:
    """Everything comes back as numpy arrays of float32 (p-values float64), one entry an image."""
    detections = detector.detect(pictures(5))

    assert logits_of(detections).shape == (5, 10)
    assert logits_of(detections).dtype == np.float32
    for values, dtype in (
        (detections.feature_norms, "float32"),
        (detections.scores, "float32"),
        (detections.p_values, "float64"),
        (detections.is_ood, "bool"),
    ):
        assert values.shape == (5,)
        assert values.dtype.name == dtype


def test_company_does_not_matter(detector: Detector) -> None:
    """An image scores the same alone and in batches of any size, within the tolerance."""
    images = pictures(17, first=200)
    together = detector.detect(images)
    alone = [detector.detect(image[None]) for image in images]
    by_four = [detector.detect(images[start : start + 4]) for start in range(0, 17, 4)]

    for parts in (alone, by_four):
        scores = np.concatenate([part.scores for part in parts])
        np.testing.assert_allclose(scores, together.scores, rtol=BATCH_TOLERANCE["float32"])
        np.testing.assert_allclose(
            np.concatenate([logits_of(part) for part in parts]),
            logits_of(together),
            rtol=1e-3,
            atol=1e-4,
        )


def test_verdict_agrees_with_the_p_value(detector: Detector) -> None:
    """An image is OOD exactly when its p-value is at most alpha; both verdicts occur."""
    detections = detector.detect(pictures(99, first=300))

    exact = [Fraction(round(value * 100), 100) for value in detections.p_values]
    assert detections.is_ood.tolist() == [value <= Fraction(str(ALPHA)) for value in exact]
    assert 0 < detections.is_ood.sum() < 99


def test_calibration_images_again(network: nn.Module, detector: Detector) -> None:
    """Of its own 99 calibration images k - 1 = 19 lie below the threshold."""
    assert detector.detect(pictures(99)).is_ood.sum() == 19


def test_logits_are_the_classifier_s(network: nn.Module, detector: Detector) -> None:
    """The detector changes nothing of the classifier's answer."""
    images = pictures(4)
    with torch.inference_mode():
        expected = network(CIFAR_PREPROCESSING.normalise(images))

    np.testing.assert_array_equal(logits_of(detector.detect(images)), expected.numpy())


def test_judging_is_detecting_without_logits(network: nn.Module, detector: Detector) -> None:
    """Verdicts are the same to the bit, and nothing behind the selected block runs."""
    images = pictures(7, first=400)
    behind: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, *_: behind.append(type(module).__name__))
        for module in (network.get_submodule("layer4.1"), network.get_submodule("fc"))
    ]
    try:
        verdicts = detector.judge(images)
        assert behind == []
        detections = detector.detect(images)
        assert len(behind) == 2
    finally:
        for handle in handles:
            handle.remove()

    for name in ("feature_norms", "scores", "p_values", "is_ood"):
        np.testing.assert_array_equal(getattr(verdicts, name), getattr(detections, name))


def class_detector(levels: ClassLevels, **options: Any) -> Detector:
    """A detector on 2 x 2 pixels; green above red means class 0, else class 1."""
    return Detector(
        ColourNetwork().eval(),
        block=Block("red", "maps"),
        preprocessing=Preprocessing(resize=2, crop=2, mean=(0, 0, 0), std=(1, 1, 1)),
        score="feature_norm",
        threshold=1.0,
        calibration_scores=np.array([0.5, 1.0, 1.5, 1.8], dtype=np.float32),
        class_levels=levels,
        **options,
    )


class ColourNetwork(BrightnessNetwork):
    """Reads the red channel like its parent; the logits are the means of green and red."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 2]``."""
        self.red(images)
        logits: Tensor = images.mean(dim=(2, 3))[:, [1, 0]]
        return logits


def coloured(red: list[int], green: list[int]) -> Tensor:
    """Plain images of these colours."""
    images = torch.zeros(len(red), 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = torch.tensor(red).view(-1, 1, 1)
    images[:, 1] = torch.tensor(green).view(-1, 1, 1)
    return images


def test_levels_of_predicted_classes() -> None:
    """Class 0 has its own threshold and p-values; class 1 uses those for all."""
    levels = ClassLevels(
        thresholds=np.array([0.8, np.nan], dtype=np.float32),
        uncertain_below=np.array([1.4, np.nan], dtype=np.float32),
        calibration_classes=np.array([0, 1, 0, 1]),
    )
    detector = class_detector(levels, uncertain_below=1.2)
    # Norms are 2 x red / 255: 0.6, 1.0 and 1.6 of class 0, then 0.8, 1.1 and 1.3 of class 1.
    images = coloured([76, 128, 204, 102, 141, 166], [255, 255, 255, 0, 0, 0])

    detections = detector.detect(images)

    np.testing.assert_allclose(detections.thresholds, [0.8, 0.8, 0.8, 1, 1, 1])
    assert detections.verdicts == ["ood", "uncertain", "id", "ood", "uncertain", "id"]
    assert detections.is_uncertain.tolist() == [False, True, False, False, True, False]
    # Class 0 is ranked among its own 0.5 and 1.5, class 1 among all four.
    np.testing.assert_allclose(detections.p_values, [2 / 3, 2 / 3, 1, 0.4, 0.6, 0.6])


def test_class_levels_need_the_whole_network() -> None:
    """The predicted class is not known at the block: judging gives what detecting gives."""
    levels = ClassLevels(np.array([0.2, 1.9], np.float32), None, np.array([0, 1, 0, 1]))
    detector = class_detector(levels)
    images = coloured([90, 90], [255, 0])

    assert detector.judge(images).is_ood.tolist() == [False, True]
    assert detector.judge(images).verdicts == detector.detect(images).verdicts == ["id", "ood"]


def test_two_levels_without_classes() -> None:
    """Below the threshold OOD, below the second level uncertain, else ID; by default no second."""
    images = coloured([50, 130, 250], [0, 0, 0])
    options: dict[str, Any] = {
        "block": Block("red", "maps"),
        "preprocessing": Preprocessing(resize=2, crop=2, mean=(0, 0, 0), std=(1, 1, 1)),
        "score": "feature_norm",
        "threshold": 1.0,
        "calibration_scores": np.ones(1, np.float32),
    }

    two = Detector(BrightnessNetwork().eval(), **options, uncertain_below=1.5).judge(images)
    one = Detector(BrightnessNetwork().eval(), **options).judge(images)

    assert two.verdicts == ["ood", "uncertain", "id"]
    assert one.verdicts == ["ood", "id", "id"]
    assert two.is_ood.tolist() == one.is_ood.tolist()


def detector_of(
    network: nn.Module,
    block: Block,
    preprocessing: Preprocessing,
    score: ScoreName = "feature_norm",
) -> Detector:
    """A detector without a calibration, on torch."""
    return Detector(
        network,
        block=block,
        preprocessing=preprocessing,
        score=score,
        threshold=0,
        calibration_scores=np.ones(1, np.float32),
        head="fc" if score in SCORES_WITH_HEAD else None,
    )


@pytest.mark.parametrize("score", sorted(SCORES))
def test_every_score_is_its_definition(network: nn.Module, score: ScoreName) -> None:
    """The detector gives the score that the norm, the logits and the last features give."""
    images = pictures(5)
    block = find_blocks(network, torch.zeros(1, 3, 32, 32))[-2]
    detector = detector_of(network, block, CIFAR_PREPROCESSING, score)
    with torch.no_grad():
        inputs = CIFAR_PREPROCESSING.normalise(images)
        logits, norms, features = BlockNorms(network, [block]).run_with_features(inputs, head="fc")
        unit = features / features.norm(dim=1, keepdim=True)
        rescaled = network.get_submodule("fc")(unit * norms[block.name][:, None])
        expected = SCORES[score](Evidence(norms[block.name], logits, rescaled))

    np.testing.assert_allclose(detector.detect(images).scores, expected, rtol=1e-4)
    np.testing.assert_allclose(detector.judge(images).scores, expected, rtol=1e-4)


def test_a_score_that_needs_a_head(network: nn.Module) -> None:
    """Without the head's name the detector cannot be made."""
    with pytest.raises(NetworkError, match="selected_norm_energy needs the name"):
        Detector(
            network,
            block=Block("layer4.0", "maps"),
            preprocessing=CIFAR_PREPROCESSING,
            score="selected_norm_energy",
            threshold=0,
            calibration_scores=np.ones(1, np.float32),
        )


def test_a_score_that_is_no_number_is_odd(network: nn.Module, detector: Detector) -> None:
    """An image on which the network overflows is OOD, with the smallest p-value; no gate opens."""
    images = pictures(2)
    weight = network.get_parameter("conv1.weight")
    before = weight.detach().clone()
    try:
        for value in (float("nan"), float("inf")):
            weight.data.fill_(value)
            verdicts = detector.judge(images)
            assert verdicts.verdicts == ["ood", "ood"]
            assert verdicts.p_values.tolist() == [1 / 100] * 2
    finally:
        weight.data.copy_(before)
