r"""
Scores class-conditional Fashion-MNIST samples: how often is the requested class recognised?

    python tests/score_samples.py --train-data data/fashion-mnist-train \
        --test-data data/fashion-mnist --samples samples/demo --classifier results/classifier.pt

Trains a small CNN on real images (about three minutes on two cores), reports its accuracy on real
test images, then classifies every PNG in --samples whose name ends in -class-LLLL.png, where LLLL
is the class index in ImageFolder order. With --vae it also classifies the autoencoder's
reconstructions of the test images: the rate that perfect latents would reach. Make the training
tree from the 60,000 training images with scripts/prepare_fashion_mnist.py --images --labels.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import ImageFolder
from tqdm import tqdm

# N images, C classes; images are (N, 1, 32, 32) uint8 in [0, 255] except where noted.
IMAGE_SIZE = 32


class Classifier(nn.Module):
    """A small convolutional network on greyscale 32x32 images."""

    def __init__(self, num_classes=10):
        super().__init__()

        def block(in_channels, out_channels):
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            )

        self.features = nn.Sequential(
            block(1, 32),
            nn.MaxPool2d(2),
            block(32, 64),
            block(64, 64),
            nn.MaxPool2d(2),
            block(64, 128),
            block(128, 128),
            nn.MaxPool2d(2),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(128 * 4 * 4, num_classes)

    def forward(self, images):
        """Maps uint8 images (N, 1, 32, 32) to class scores (N, C)."""
        x = images.float() / 127.5 - 1  # (N, 1, 32, 32)
        x = self.features(x).flatten(1)  # (N, 2048)
        return self.head(self.dropout(x))  # (N, C)


def read_grey(path):
    """Reads an image file as a (1, 32, 32) uint8 tensor; raises ValueError on another size."""
    with Image.open(path) as image:
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"{path}: got size {image.size}, expected {(IMAGE_SIZE, IMAGE_SIZE)}")
        return torch.from_numpy(np.array(image.convert("L")))[None]  # (1, 32, 32)


def load_tree(path):
    """Returns images (N, 1, 32, 32) uint8, labels (N,) int64 and class names of a class tree."""
    try:
        dataset = ImageFolder(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: got {error}, expected a folder of class folders") from error
    files = tqdm(dataset.imgs, desc=f"load {path}", disable=None)
    images = torch.stack([read_grey(name) for name, _ in files])
    return images, torch.tensor(dataset.targets), dataset.classes


def load_samples(path, num_classes):
    """Returns images (N, 1, 32, 32) uint8 and requested classes (N,) int64 of a sample folder."""
    names = sorted(Path(path).glob("*.png"))
    matches = [(name, re.search(r"-class-(\d+)\.png$", name.name)) for name in names]
    labelled = [(name, int(match.group(1))) for name, match in matches if match]
    if not labelled:
        raise ValueError(f"{path}: got no files named *-class-LLLL.png, expected at least one")
    labels = torch.tensor([label for _, label in labelled])
    if labels.max() >= num_classes:
        raise ValueError(f"{path}: got class {labels.max()}, expected 0 to {num_classes - 1}")
    return torch.stack([read_grey(name) for name, _ in labelled]), labels


def train_classifier(images, labels, *, epochs, seed, num_classes, batch_size=128):
    """Returns a Classifier trained on images (N, 1, 32, 32) and labels (N,), in eval mode."""
    torch.manual_seed(seed)
    model = Classifier(num_classes).train()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(epochs):
        start_time, total_loss = time.time(), 0.0
        for index in torch.randperm(len(images)).split(batch_size)[: steps // epochs]:
            flip = torch.rand(len(index), 1, 1, 1) < 0.5
            batch = torch.where(flip, images[index].flip(-1), images[index])
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(batch)
            loss = F.cross_entropy(scores.float(), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            total_loss += loss.item()
        mean_loss, seconds = total_loss * epochs / steps, time.time() - start_time
        print(f"epoch {epoch + 1}/{epochs} loss {mean_loss:.4f} seconds {seconds:.0f}", flush=True)
    return model.eval()


@torch.no_grad()
def classify(model, images):
    """Returns the predicted class (N,) of uint8 images (N, 1, 32, 32)."""
    return torch.cat([model(batch).argmax(dim=1) for batch in images.split(500)])


@torch.no_grad()
def reconstruct(vae_path, images):
    """Returns the VAE's reconstruction (posterior mean) of images (N, 1, 32, 32), uint8 as well."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_path, low_cpu_mem_usage=False).eval()
    outputs = []
    for batch in images.split(250):
        x = (batch.float() / 127.5 - 1).expand(-1, 3, -1, -1)  # (N, 3, 32, 32)
        x = vae.decode(vae.encode(x).latent_dist.mean).sample.mean(dim=1, keepdim=True)
        outputs.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(outputs)  # (N, 1, 32, 32)


def print_table(class_names, columns):
    """Prints rates per class and overall; columns: title -> (correct (N,) bool, labels (N,))."""
    print(f"{'class':<14}" + "".join(f"{title:>22}" for title in columns))
    rows = [(name, index) for index, name in enumerate(class_names)] + [("all", None)]
    for name, index in rows:
        cells = []
        for correct, labels in columns.values():
            chosen = correct if index is None else correct[labels == index]
            rate = f"{100 * chosen.float().mean():.1f}%" if len(chosen) else "-"
            cells.append(f"{rate:>12} of {len(chosen):>6}")
        print(f"{name:<14}" + "".join(cells))


def get_classifier(args, num_classes):
    """Returns the classifier: loaded when --classifier names a file, else trained (and saved)."""
    if args.classifier and Path(args.classifier).exists():
        model = Classifier(num_classes)
        model.load_state_dict(torch.load(args.classifier, weights_only=True))
        return model.eval()
    if not args.train_data:
        raise ValueError("got no --train-data, expected it or an existing --classifier file")
    images, labels, _ = load_tree(args.train_data)
    model = train_classifier(
        images, labels, epochs=args.epochs, seed=args.seed, num_classes=num_classes
    )
    if args.classifier:
        Path(args.classifier).parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.classifier)
    return model


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-data", help="class-per-folder tree of real training images")
    parser.add_argument(
        "--test-data", required=True, help="class-per-folder tree of real images to test on"
    )
    parser.add_argument("--samples", help="folder of PNG samples named *-class-LLLL.png")
    parser.add_argument("--vae", help="AutoencoderKL folder whose reconstructions to score as well")
    parser.add_argument(
        "--classifier", help="weights file: loaded if it exists, else written after training"
    )
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the classifier's training")
    return parser.parse_args(argv)


def main(args):
    try:
        test_images, test_labels, class_names = load_tree(args.test_data)
        samples = load_samples(args.samples, len(class_names)) if args.samples else None
        model = get_classifier(args, len(class_names))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    columns = {"real test images": (classify(model, test_images) == test_labels, test_labels)}
    if args.vae:
        correct = classify(model, reconstruct(args.vae, test_images)) == test_labels
        columns["reconstructions"] = (correct, test_labels)
    if samples:
        images, labels = samples
        columns["samples"] = (classify(model, images) == labels, labels)
    print_table(class_names, columns)


if __name__ == "__main__":
    main(parse_args())
