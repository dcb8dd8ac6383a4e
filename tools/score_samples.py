r"""Measures how often a classifier recognises the class of Fashion-MNIST samples.

    python sample.py --ckpt results/demo --images-per-class 100 --cfg-scale 2.5 \
        --sampler sde --num-sampling-steps 50 --output-dir samples/demo
    python -m tools.score_samples --samples samples/demo --classifier results/classifier.pt

The classifier is a small CNN. It is trained on the 60,000 training images (--train-data, written by
prepare_fashion_mnist.py --images ... --labels ...), without mirrored images, and stored in
--classifier. The script also scores the real test images in --test-data.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image

from latents.images import to_model_range
from options.parts import option
from runtime.errors import UserError, reported_as, run_main
from runtime.flags import parse_config

BATCH = 128


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    samples: Path = option(help="folder of PNG files SEED-class-LABEL.png, written by sample.py")
    classifier: Path = option(help="file of weights; if it does not exist, train and write it")
    train_data: Path | None = option(None, help="class folders of the 60,000 training images")
    test_data: Path = option(Path("data/fashion-mnist"), help="class folders of real test images")
    epochs: int = option(5, ge=1, help="passes over the training images")


def make_classifier(num_classes: int) -> nn.Sequential:
    """Makes a CNN from grey images (N, 1, 32, 32) in [-1, 1] to scores (N, num_classes)."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2),
        *block(64, 128), *block(128, 128), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(128 * 4 * 4, num_classes),
    )  # fmt: skip


def read_images(paths: list[str]) -> Tensor:
    """Reads images of 32 x 32 pixels as grey images (N, 1, 32, 32) uint8."""
    return torch.stack([decode_image(path, ImageReadMode.GRAY) for path in paths])


def read_tree(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Reads class folders: images (N, 1, 32, 32) uint8, labels (N,) and class names."""
    with reported_as(f"got {folder}, expected class folders", FileNotFoundError):
        tree = ImageFolder(str(folder))
    return read_images([path for path, _ in tree.samples]), torch.tensor(tree.targets), tree.classes


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Trains by AdamW, without augmentation; prints the loss of each epoch."""
    torch.manual_seed(0)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(images)).split(BATCH)[: steps // epochs]:
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(to_model_range(images[index]))
            loss = F.cross_entropy(scores.float(), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {epochs}: loss {total * epochs / steps:.4f}", flush=True)


@torch.no_grad()
def recognised(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Returns whether each image is classified as its label, (N,) bool."""
    chosen = [model(to_model_range(batch)).argmax(1) for batch in images.split(500)]
    return torch.cat(chosen) == labels


def parse_args() -> ScoreConfig:
    return parse_config(ScoreConfig, __doc__)


def main(config: ScoreConfig) -> None:
    test_images, test_labels, names = read_tree(config.test_data)
    paths = sorted(config.samples.glob("*-class-*.png"))
    if not paths:
        raise UserError(f"--samples: {config.samples} has no files *-class-*.png")
    labels = torch.tensor([int(re.search(r"class-(\d+)", path.name)[1]) for path in paths])
    model = make_classifier(len(names))
    if config.classifier.is_file():
        model.load_state_dict(torch.load(config.classifier, weights_only=True))
    elif config.train_data is None:
        raise UserError(f"--train-data: is required, because {config.classifier} does not exist")
    else:
        images, train_labels, _ = read_tree(config.train_data)
        train(model, images, train_labels, config.epochs)
        config.classifier.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), config.classifier)
    model.eval()
    real = recognised(model, test_images, test_labels)
    ours = recognised(model, read_images([str(path) for path in paths]), labels)
    for label, name in enumerate(names):
        rates = [
            correct[of == label].float().mean()
            for correct, of in ((real, test_labels), (ours, labels))
        ]
        print(f"{name:<12} real {rates[0]:6.1%}  samples {rates[1]:6.1%}")
    print(f"{'all':<12} real {real.float().mean():6.1%}  samples {ours.float().mean():6.1%}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
