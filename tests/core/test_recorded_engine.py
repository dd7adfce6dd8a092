"""Recorded passes: the right size, padded with black, cut to the batch, torch's scores."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.core.blocks import Block
from app.core.detector import ENGINE_TOLERANCE, check_agreement
from app.core.engines import TorchEngine
from app.core.networks import CIFAR_PREPROCESSING
from app.core.recorded_engine import RecordedEngine, batch_sizes, check_recordable, size_for
from app.core.scores import SCORES, ScoreName
from app.errors import UnfitEngineError
from tests.core.test_detector import detector_of, pictures
from tests.recorder import EagerRecorder

LARGEST = 6
DEADLINE_S = 10
SIDE = 32


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])],
)
def test_batch_sizes(largest: int, sizes: list[int]) -> None:
    """Powers of two, and the largest batch."""
    assert batch_sizes(largest) == sizes


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 4), (4, 4), (9, 12), (12, 12), (13, None)])
def test_size_for(count: int, size: int | None) -> None:
    """The least with room; none for more images than the largest has."""
    assert size_for(count, batch_sizes(12)) == size


def test_the_largest_is_recorded_first(network: nn.Module, block: Block) -> None:
    """Whole passes and gates, in every size, so that the smaller ones share its memory."""
    recorder = EagerRecorder(LARGEST, SIDE)
    RecordedEngine(TorchEngine(network, block=block, preprocessing=CIFAR_PREPROCESSING), recorder)

    assert recorder.recorded == [6, 4, 2, 1] * 2


@pytest.mark.parametrize("score", sorted(SCORES))
def test_scores_are_torchs(network: nn.Module, block: Block, score: ScoreName) -> None:
    """Of every batch, also of one larger than what was recorded; whole and gate."""
    recorder = EagerRecorder(LARGEST, SIDE)
    detector = detector_of(network, block, CIFAR_PREPROCESSING, score)
    recorded = detector.recorded(recorder)
    images = pictures(LARGEST + 1)
    truth = detector.detect(images)

    for count in range(1, LARGEST + 2):
        found = recorded.detect(images[:count])
        np.testing.assert_allclose(
            found.scores, truth.scores[:count], rtol=ENGINE_TOLERANCE["float32"]
        )
        assert found.logits.shape == (count, 10)
        np.testing.assert_allclose(recorded.judge(images[:count]).scores, found.scores, rtol=1e-6)
    assert recorder.replayed == [size for size in (1, 2, 4, 4, 6, 6) for _ in range(2)]
    check_agreement(recorded, detector, images)
    assert recorded.engine == "cuda_graphs"


def test_padding_is_black(network: nn.Module, block: Block) -> None:
    """No image of an earlier batch is computed again beside a smaller one."""
    recorder = EagerRecorder(4, SIDE)
    engine = RecordedEngine(
        TorchEngine(network, block=block, preprocessing=CIFAR_PREPROCESSING), recorder
    )
    images = pictures(4)

    engine.run(images)
    engine.run(images[:3])

    assert torch.equal(recorder.inputs[:3], images[:3])
    assert not recorder.inputs[3].any()


def test_results_outlive_the_next_batch(network: nn.Module, block: Block) -> None:
    """What one batch was answered does not change with the next."""
    recorded = detector_of(network, block, CIFAR_PREPROCESSING).recorded(EagerRecorder(2, SIDE))
    first = recorded.detect(pictures(2))
    before = first.scores.copy(), first.logits.copy()

    recorded.detect(pictures(2, first=2))

    np.testing.assert_array_equal(first.scores, before[0])
    np.testing.assert_array_equal(first.logits, before[1])


def test_a_batch_travels_while_another_is_computed(network: nn.Module, block: Block) -> None:
    """Its images are sent meanwhile, and each thread has the results of its own."""
    recorder = EagerRecorder(4, SIDE)
    detector = detector_of(network, block, CIFAR_PREPROCESSING)
    recorded = detector.recorded(recorder)
    first, second = pictures(2), pictures(4, first=2)
    expected = [detector.detect(images).scores for images in (first, second)]

    with ThreadPoolExecutor() as threads:
        with recorder.running():
            answers = [threads.submit(recorded.detect, images) for images in (first, second)]
            assert {recorder.sent.get(timeout=DEADLINE_S) for _ in answers} == {2, 4}
            assert not any(answer.done() for answer in answers)

        for scores, answer in zip(expected, answers, strict=True):
            found = answer.result(DEADLINE_S).scores
            np.testing.assert_allclose(found, scores, rtol=ENGINE_TOLERANCE["float32"])
    assert recorded.passes == recorder.passes


def test_more_threads_than_batches_under_way(network: nn.Module, block: Block) -> None:
    """Those beyond wait for one to end; each has the results of its own images."""
    recorder = EagerRecorder(4, SIDE)
    detector = detector_of(network, block, CIFAR_PREPROCESSING)
    recorded = detector.recorded(recorder)
    batches = [pictures(1 + number % 4, first=number) for number in range(24)]
    expected = [detector.detect(images).scores for images in batches]

    with ThreadPoolExecutor(2 * recorder.passes) as threads:
        answers = list(threads.map(recorded.detect, batches, timeout=DEADLINE_S))

    for answer, scores in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.scores, scores, rtol=ENGINE_TOLERANCE["float32"])


def test_a_pass_that_fails_leaves_room_for_the_next(network: nn.Module, block: Block) -> None:
    """However many failed, the next batch is sent and computed."""
    recorder = EagerRecorder(4, SIDE)
    recorded = detector_of(network, block, CIFAR_PREPROCESSING).recorded(recorder)
    scores = recorded.detect(pictures(4)).scores
    too_small = torch.zeros(4, 3, SIDE // 2, SIDE // 2, dtype=torch.uint8)

    for _ in range(2 * recorder.passes):
        with pytest.raises(RuntimeError):
            recorded.detect(too_small)

    np.testing.assert_array_equal(recorded.detect(pictures(4)).scores, scores)


def _by_value(images: Tensor) -> tuple[Tensor, ...]:
    return (images * 2,) if images.sum() > 0 else (images,)


WAITING: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "a branch": _by_value,
    "a number": lambda images: (images * images.float().mean().item(),),
    "a mask": lambda images: (images[images > 0],),
    "a search": lambda images: (images.nonzero(),),
    "another device": lambda images: (images.to("meta"),),
}
STRAIGHT: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "a choice by value": lambda images: (torch.where(images > 0, images, 1),),
    "positions": lambda images: (images[torch.tensor([0, 0])],),
    "a slice": lambda images: (images[:, 0, ::2].float().mean(dim=(1, 2)),),
    "in place": lambda images: (images.float().copy_(torch.ones(2)).relu_(),),
}


@pytest.mark.parametrize("kind", WAITING)
@pytest.mark.parametrize("inference", [True, False])
def test_what_cannot_be_recorded(kind: str, inference: bool) -> None:
    """A pass that waits for a value of its images is refused before it is recorded."""
    images = torch.ones(1, 3, 2, 2, dtype=torch.uint8)

    with torch.inference_mode(inference), pytest.raises(UnfitEngineError, match="the network"):
        check_recordable(WAITING[kind], images)


@pytest.mark.parametrize("kind", STRAIGHT)
def test_what_can_be_recorded(kind: str) -> None:
    """One that does the same whatever they are is not."""
    check_recordable(STRAIGHT[kind], torch.ones(1, 3, 2, 2, dtype=torch.uint8))
