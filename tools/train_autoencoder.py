"""Trains a small AutoencoderKL with downsampling 4 and C channels, in place of the SD VAE.

    python -m tools.prepare_fashion_mnist --output data/fashion-mnist
    python -m tools.train_autoencoder --data-path data/fashion-mnist --output results/vae
    python -m tools.train_autoencoder --data-path photos --image-size 64 --output results/vae-64

The state is saved every three minutes and on Ctrl-C. Run the same command to resume, also with a
larger --steps after the end. images.png shows preprocessed images, and reconstructions.png compares
held-out images with their reconstructions.

The loss is the squared error per pixel value + kl_weight * KL divergence per latent value. The
weight of the KL term rises over the first half of training; near 1e-3, complete channels collapse
to noise. After training, each channel is scaled like the SD VAE's. The README of
assets/vae-fashion-mnist has the commands for that autoencoder.

--decoder-of continues to train only the decoder of an autoencoder, on the same latents with noise,
so that the decoder tolerates errors of sampled latents (Zheng et al. 2025, arXiv 2510.11690).

--critic-weight adds a patch critic (Isola et al. 2017, arXiv 1611.07004), as for the SD VAE (Esser
et al. 2021, arXiv 2012.09841), because squared error by itself leaves textures blurred. If all
images are grey, the output channels are made equal after training.

Shape legend: N batch; images (N, 3, H, H), latents (N, C, h, h) with h = H/4,
where C is --latent-channels
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor, nn

from checkpoints.weights import read_pickle, write_pickle
from latents.autoencoder import (
    CONFIG_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    Autoencoder,
    open_autoencoder,
)
from latents.image_grid import captioned_rows, contact_sheet, enlarge, write_png
from latents.images import to_model_range
from latents.loading import split
from latents.sources import Source, images_name, open_images
from options.parts import option
from runtime.devices import keep_freed_memory
from runtime.errors import (
    STOPPED,
    UserError,
    check_same,
    pluralize,
    print_safely,
    printable,
    reported_as,
)
from runtime.files import atomic_file, check_new_folder, prepare_output
from runtime.flags import parse_config
from runtime.processes import ALONE, run_process
from runtime.progress import progress
from runtime.signals import Requests

ROOT = Path(__file__).resolve().parents[1]

CONFIG = ROOT / "assets" / "vae-fashion-mnist"  # its config.json is used for a new autoencoder
SAVE_SECONDS = 180
HELD_OUT = 0.02  # fraction of --data-path; for small data at least 16 images, at most a fifth
SHEET = "images.png"


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    data_path: str = option(help="folder of class folders, or another source that train.py accepts")
    image_size: int = option(32, ge=1, help="pixels per side, a multiple of 4")
    eval_data: str | None = option(
        None, help="images to measure PSNR on (default: a fiftieth of --data-path, held out)"
    )
    output: Path = option(help="new folder for config.json and the weights")
    steps: int = option(4000, ge=1, help="optimizer steps")
    batch_size: int = option(32, ge=1, help="images per step")
    lr: float = option(2e-3, gt=0, help="peak learning rate")
    kl_weight: float = option(2e-4, ge=0, help="weight of the KL term; unused with --decoder-of")
    seed: int = option(0, help="seed of all random numbers")
    latent_channels: int = option(
        4, ge=1, help="latent channels of a new autoencoder; more channels keep more detail"
    )
    decoder_of: str | None = option(None, help="train only the decoder of this autoencoder")
    decoder_noise: float = option(
        0.2, ge=0,
        help="with --decoder-of: largest std of noise on scaled latents, drawn from 0 per image",
    )  # fmt: skip
    critic_weight: float = option(
        0.0, ge=0, help="weight of the patch critic's loss; 0 for no critic"
    )
    precision: str = option(
        "bf16", choices=("fp32", "bf16"),
        help="precision of convolutions; fp32 is much faster on CPUs without instructions for bf16",
    )  # fmt: skip


def parse_args() -> AutoencoderConfig:
    return parse_config(AutoencoderConfig, __doc__)


def load_images(source: Source, indices: Sequence[int]) -> Tensor:
    """Reads images into memory, (N, 3, H, H) uint8, and prints the names of unreadable images."""
    images = torch.empty(len(indices), 3, source.image_size, source.image_size, dtype=torch.uint8)
    unreadable = {}
    for row, index in enumerate(progress(indices, unit="image")):
        item, names = source[index, False]
        images[row] = item["image"]
        unreadable |= dict.fromkeys(names)
    for name in unreadable:
        print_safely(printable(f"skipped an image that cannot be read: {name}"))
    return images


def train(
    vae: AutoencoderKL,
    images: Tensor,
    config: AutoencoderConfig,
    settings: dict,
    stored: dict | None,
) -> bool:
    """Trains in place on images (N, 3, H, H) uint8, from the saved step; False if interrupted.

    settings: settings that are saved with each state
    stored: the state to resume from
    """
    noise_std = 0.0
    if config.decoder_of is not None:
        noise_std = config.decoder_noise / vae.config.scaling_factor
        for name, weight in vae.named_parameters():
            weight.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
    trained = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer, schedule = optimizer_of(trained, config.lr, config)
    path, parts, critic = config.output / STATE_FILE, [vae, optimizer, schedule], None
    if config.critic_weight:
        critic = Critic(config, vae.device)
        parts += [critic.network, critic.optimizer, critic.schedule]
    start, requests = load_state(stored, parts), Requests(ALONE, SAVE_SECONDS)
    with progress(range(start, config.steps), initial=start, total=config.steps) as bar:
        for step in bar:
            if request := requests.poll():
                save_state(path, step, settings, parts)
                requests.saved()
            if request == "stop":
                requests.close()
                print_safely(f"stopped before step {step}; run the same command to resume")
                return False
            chosen = torch.randint(len(images), (config.batch_size,))
            x = to_model_range(images[chosen]).to(vae.device)
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
            with autocast(config, vae.device):
                mse, kl, reconstruction = losses(vae, x, noise_std)
            ramp = min(1.0, 2 * step / config.steps)
            loss = mse + config.kl_weight * ramp * kl
            if critic is not None:
                loss = loss + config.critic_weight * ramp * critic.judge(x, reconstruction)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 100 == 0:
                bar.set_postfix(mse=f"{mse.item():.5f}", kl=f"{kl.item():.2f}")
    save_state(path, config.steps, settings, parts)
    requests.close()
    return True


def autocast(config: AutoencoderConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def optimizer_of(weights: Iterable[Tensor], lr: float, config: AutoencoderConfig) -> tuple:
    """Makes an optimizer and its learning rate schedule."""
    first = 0.5 if config.critic_weight else 0.9  # 0.5 is usual in training with a critic
    optimizer = torch.optim.AdamW(weights, betas=(first, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, config.steps, pct_start=0.03, cycle_momentum=False
    )
    return optimizer, schedule


class Critic:
    """Patch critic: learns to distinguish reconstructions from images, by the hinge loss."""

    def __init__(self, config: AutoencoderConfig, device: torch.device):
        self.autocast = autocast(config, device)
        self.network = nn.Sequential(  # (N, 3, H, H) to scores (N, 1, H/4, H/4)
            nn.Conv2d(3, 48, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(48, 96, 4, 2, 1), nn.GroupNorm(8, 96), nn.LeakyReLU(0.2),
            nn.Conv2d(96, 96, 3, 1, 1), nn.GroupNorm(8, 96), nn.LeakyReLU(0.2),
            nn.Conv2d(96, 1, 3, 1, 1),
        ).to(device)  # fmt: skip
        weights = self.network.parameters()
        self.optimizer, self.schedule = optimizer_of(weights, 1e-3, config)

    def judge(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """Takes one step of the critic; returns the decoder's loss, a scalar.

        x, reconstruction: (N, 3, H, H)
        """
        self.optimizer.zero_grad()  # includes gradients of the decoder's loss
        network = self.autocast(self.network)
        hinge = F.relu(1 - network(x)) + F.relu(1 + network(reconstruction.detach()))
        hinge.mean().backward()
        self.optimizer.step()
        self.schedule.step()
        return -network(reconstruction).float().mean()


def losses(vae: AutoencoderKL, x: Tensor, noise_std: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns squared error per pixel value, KL divergence per latent value, and reconstructions.

    x: (N, 3, H, H)
    noise_std: largest standard deviation of additional noise on the latents
    """
    posterior = vae.encode(x).latent_dist
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()  # (N, C, h, h)
    std = (0.5 * log_variance).exp()
    if noise_std:  # a different standard deviation for each image
        std = std.hypot(noise_std * torch.rand(len(x), 1, 1, 1, device=x.device))
    reconstruction = vae.decode(mean + std * torch.randn_like(mean)).sample.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (reconstruction - x).square().mean(), kl, reconstruction


def save_state(path: Path, step: int, settings: dict, parts: list) -> None:
    """Writes the complete training state atomically, unless weights are not finite."""
    if not all(weight.isfinite().all() for weight in parts[0].parameters()):
        raise UserError(
            f"--lr: the weights became infinite or nan before step {step}; try a lower rate. An "
            f"earlier state, if any, is in {path.parent}"
        )
    random = [torch.get_rng_state()]
    random += [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    stored = {"step": step, "settings": settings, "random": random}
    with reported_as(f"--output: cannot write {path}", OSError), atomic_file(path) as temporary:
        write_pickle(temporary, stored | {"parts": [part.state_dict() for part in parts]})


def read_state(path: Path, settings: dict) -> dict | None:
    """Reads the saved state, if there is one; UserError if it was saved with other settings."""
    if not path.exists():
        return None
    stored = read_pickle(path, mmap=False)
    before = stored["settings"] | {"steps": settings["steps"]}
    named = [
        values | {"data_path": images_name(values["data_path"])} for values in (settings, before)
    ]
    check_same(f"{path.parent} was created with other settings", *named)
    if stored["step"] > settings["steps"]:
        raise UserError(f"--steps: got {settings['steps']}, expected at least {stored['step']}")
    return stored


def load_state(stored: dict | None, parts: list) -> int:
    """Restores the saved state and returns its step; 0 without a state."""
    if stored is None:
        return 0
    for part, values in zip(parts, stored["parts"], strict=True):
        if isinstance(part, torch.optim.lr_scheduler.LRScheduler):  # --steps may have changed
            length = ("total_steps", "_schedule_phases")
            values = {name: value for name, value in values.items() if name not in length}
        part.load_state_dict(values)
    torch.set_rng_state(stored["random"][0])
    if torch.cuda.is_available() and stored["random"][1:]:
        torch.cuda.set_rng_state(stored["random"][1])
    return stored["step"]


@torch.no_grad()
def make_grey(vae: AutoencoderKL) -> None:
    """Makes the three output channels of a decoder equal, by averaging them."""
    for weight in vae.decoder.conv_out.parameters():  # (3, C, 3, 3) and (3,)
        weight.copy_(weight.mean(0, keepdim=True).expand_as(weight))


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Scales each latent channel to mean 0 and std 1 / scaling_factor over uint8 images.

    The affine map is absorbed into the two 1 x 1 convolutions around the latents, so
    reconstructions stay the same up to rounding.
    """
    images = images[:: max(1, len(images) // 10_000)]
    latents = [
        vae.encode(to_model_range(x).to(vae.device)).latent_dist.sample() for x in batches(images)
    ]
    std, mean = torch.std_mean(torch.cat(latents), dim=(0, 2, 3))  # (C,) each
    gain = 1 / (vae.config.scaling_factor * std)
    inner, outer, channels = vae.quant_conv, vae.post_quant_conv, len(std)
    # inner.weight is (2 C, 2 C, 1, 1): its rows are C means, then C log-variances.
    inner.weight[:channels] *= gain[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) * gain
    inner.bias[channels:] += 2 * gain.log()
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight /= gain[None, :, None, None]


def rebuilt(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Returns the reconstructions of images (N, 3, H, H) uint8."""
    rebuild = Autoencoder(vae.config, vae).reconstruct
    return torch.cat([rebuild(x.to(vae.device)).cpu() for x in batches(images)])


def mean_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Returns the mean PSNR in dB of the reconstructions of images (N, 3, H, H) uint8."""
    error = ((rebuilt(vae, images).float() - images) / 255).square().mean(dim=(1, 2, 3))  # (N,)
    return -10 * error.log10().mean().item()


def batches(images: Tensor) -> Sequence[Tensor]:
    """Splits images into batches of about as many pixels as 250 images of 32 x 32."""
    return images.split(max(1, 250 * 32**2 // images.shape[-1] ** 2))


def write_comparison(vae: AutoencoderKL, images: Tensor, folder: Path) -> None:
    """Writes reconstructions.png, with images (N, 3, H, H) uint8 above their reconstructions."""
    if len(images):
        grid = captioned_rows(
            enlarge(torch.cat([images, rebuilt(vae, images)])), ["image", "reconstruction"]
        )
        write_png(grid, folder / "reconstructions.png")


def export(vae: AutoencoderKL, folder: Path) -> None:
    """Writes config and weights. The training state is kept, so that training can continue."""
    message = f"--output: cannot write {folder}"
    errors = OSError, SafetensorError
    with reported_as(message, *errors), TemporaryDirectory(dir=folder) as temporary:
        vae.save_pretrained(temporary)
        mode = Path(temporary, CONFIG_FILE).stat().st_mode
        Path(temporary, WEIGHTS_FILE).chmod(mode)  # safetensors makes it readable by the owner only
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            Path(temporary, name).replace(folder / name)
    print_safely(f"written: {folder}")


def main(config: AutoencoderConfig) -> int | None:
    if not (config.output / STATE_FILE).exists():
        check_new_folder("--output", config.output, ignored=SHEET)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    keep_freed_memory(torch.device(device))
    if config.decoder_of is not None:
        try:
            opened = open_autoencoder(config.decoder_of)
            if (kind := type(opened).__name__) != "AutoencoderKL":
                raise UserError(f"--decoder-of: got {kind}, expected AutoencoderKL")
            opened.load(device, torch.float32)
        except UserError as error:
            raise UserError(str(error).replace("--vae-path", "--decoder-of")) from None
        vae = opened.model
    else:
        vae_config = AutoencoderKL.load_config(CONFIG)
        sizes = {"sample_size": config.image_size, "latent_channels": config.latent_channels}
        vae = AutoencoderKL.from_config(vae_config, **sizes).to(device)
    Autoencoder(vae.config, vae).latent_side(config.image_size)  # raises UserError for a wrong size
    source = open_images(config.data_path, config.image_size)
    fraction = max(HELD_OUT, min(0.2, 16 / len(source)))
    indices, held_out = split(source, 0.0 if config.eval_data else fraction)
    settings = asdict(config) | {"data_path": source.fingerprint, "output": None}
    stored = read_state(config.output / STATE_FILE, settings)
    unseen = source
    if config.eval_data:
        unseen = open_images(config.eval_data, config.image_size, "--eval-data")
        held_out = range(len(unseen))
    images, eval_images = load_images(source, indices), load_images(unseen, held_out)
    prepare_output("--output", config.output / STATE_FILE)  # after all that can fail
    write_png(contact_sheet(source), config.output / SHEET)
    is_finished = train(vae.train(), images, config, settings, stored)
    vae.eval()
    if not is_finished:
        write_comparison(vae, eval_images[:8], config.output)
        return STOPPED
    if config.decoder_of is None:
        standardize_latents(vae, images)
    if (images == images[:, :1]).all():
        make_grey(vae)
    if len(eval_images):
        psnr = mean_psnr(vae, eval_images)
        print_safely(
            f"held-out PSNR: {psnr:.2f} dB over {pluralize(len(eval_images), 'image')}. Above 30 "
            "dB differences are hard to see. Below 25 dB details are lost; more --steps help"
        )
        write_comparison(vae, eval_images[:8], config.output)
    return export(vae, config.output)


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
