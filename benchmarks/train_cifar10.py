"""Train a CIFAR-10 classifier from scratch on the JPEG images of ``cifar10.zip``.

The default makes the weights of the bundled model::

    python -m benchmarks.train_cifar10 --out build/cifar10-resnet18.safetensors

5,000 training images are held out for the threshold; the test images are scored once, at the
end, to report the accuracy. The weights saved are an exponential moving average of the last
epochs. The forward pass runs in bf16, or in fp32 with ``--precision fp32`` (ten times as fast on a
processor without bf16 instructions); the weights stay fp32.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from app.core import cifar
from app.core.images import Preprocessing, load
from benchmarks.datasets import cifar10_split

PREPROCESSING = Preprocessing(
    resize=32, crop=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)
NETWORKS: Final[Mapping[str, Callable[..., nn.Module]]] = {
    "resnet18": cifar.ResNet18,
    "wrn28_10": cifar.WideResNet28x10,
    "vgg11": cifar.VGG11,
}


def main() -> None:
    """Train, report the test accuracy and write the weights."""
    options = _parse_arguments()
    torch.manual_seed(options.seed)
    train_folder, _, test_folder = cifar10_split()
    images, targets = _load_folder(train_folder)
    size = {"widen_factor" if options.network == "wrn28_10" else "width": options.width}
    network = NETWORKS[options.network](num_classes=10, **size)
    network.to(memory_format=torch.channels_last)
    averaged = _train(
        network,
        images,
        targets,
        epochs=options.epochs,
        batch_size=options.batch,
        is_bf16=options.precision == "bf16",
    )
    # Over augmented images, as in training: statistics of plain ones cost 2 points of accuracy.
    update_bn(_epoch(images, targets, batch_size=options.batch, augment=True), averaged)
    accuracy = _accuracy(averaged, *_load_folder(test_folder))
    print(f"test accuracy {accuracy:.4f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in averaged.module.state_dict().items()}
    save_file(state, options.out)
    print(f"weights written to {options.out}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--width", type=int, default=16, help="width, or widen factor of a WRN")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/cifar10-resnet18.safetensors"))
    return parser.parse_args()


def _load_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` uint8 and their class indices ``[N]``, classes by name."""
    classes = sorted(path.name for path in folder.iterdir())
    files = sorted(folder.rglob("*.jpg"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(lambda file: load(file.read_bytes(), PREPROCESSING), files))
    targets = torch.tensor([classes.index(file.parent.name) for file in files])
    return torch.stack(images), targets


def _train(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    batch_size: int,
    is_bf16: bool,
) -> AveragedModel:
    steps = -(-len(images) // batch_size)
    optimiser = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.2, epochs=epochs, steps_per_epoch=steps, pct_start=0.2
    )
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    for epoch in range(epochs):
        started, total_loss = time.monotonic(), 0.0
        for inputs, labels in _epoch(images, targets, batch_size=batch_size, augment=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                loss = functional.cross_entropy(network(inputs), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            averaged.update_parameters(network)
            total_loss += loss.item() * len(labels)
        seconds = time.monotonic() - started
        print(
            f"epoch {epoch + 1}: loss {total_loss / len(images):.4f}, {seconds:.0f} s", flush=True
        )
    return averaged


def _epoch(
    images: Tensor, targets: Tensor, *, batch_size: int, augment: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    for chosen in torch.randperm(len(images)).split(batch_size):
        batch = images[chosen]
        if augment:
            batch = _crop_and_flip(batch)
        inputs = PREPROCESSING.normalise(batch).to(memory_format=torch.channels_last)
        yield inputs, targets[chosen]


def _crop_and_flip(images: Tensor) -> Tensor:
    """Each image shifted by up to 4 pixels, black moving in, and mirrored with probability 1/2."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    rows = torch.randint(0, 9, (count, 1, 1)) + torch.arange(height).view(1, -1, 1)
    columns = torch.arange(width).expand(count, 1, -1).clone()
    mirrored = torch.rand(count) < 0.5
    columns[mirrored] = columns[mirrored].flip(-1)
    columns = columns + torch.randint(0, 9, (count, 1, 1))
    everyone = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[everyone, rows, columns].permute(0, 3, 1, 2)


@torch.inference_mode()
def _accuracy(network: nn.Module, images: Tensor, targets: Tensor) -> float:
    network.eval()
    batches = _epoch(images, targets, batch_size=500, augment=False)
    right = sum(int((network(inputs).argmax(1) == labels).sum()) for inputs, labels in batches)
    return right / len(images)


if __name__ == "__main__":
    main()
