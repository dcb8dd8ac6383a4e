"""Writes a checkpoint's EMA weights for others, with a model card, and pushes them on request.

    python export.py --ckpt results/RUN --output exported
    python export.py --ckpt results/RUN --output pipeline --format pipeline --scores scores.json
    python export.py --ckpt results/RUN --output exported --push-to OWNER/NAME --dry-run False

Formats: safetensors (model.safetensors and config.json), published (model.pt as the published
DiT-MoE code, or for a dense model the official DiT's, loads it), pipeline (a folder for diffusers'
DiffusionPipeline.from_pretrained, its code included).
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi

from checkpoints.checkpoint import read_checkpoint
from diffusion import objective_of
from runtime import options
from runtime.errors import UserError, exit_on_user_error
from runtime.files import check_new_folder
from sampling.export import FORMATS, model_card
from sampling.pipeline import check_model_flags, hints_of


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    options.add_checkpoint_flags(parser)
    group = parser.add_argument_group("export")
    group.add_argument("--output", type=Path, required=True, help="a new or empty folder")
    group.add_argument("--format", choices=list(FORMATS), default="safetensors", help="see above")
    group.add_argument(
        "--scores", type=Path, help="JSON of measured scores, {name: value}, for the model card"
    )
    group.add_argument("--license", default="", help="of the weights, for the model card")
    group.add_argument("--push-to", metavar="OWNER/NAME", help="hub repository to push to")
    options.add_bool(group, "--private", help="make the hub repository a private one")
    options.add_bool(
        group, "--dry-run", default=True, help="say what would be pushed, and push nothing"
    )
    return parser.parse_args()


def read_scores(path: Path | None) -> dict:
    """Numbers and strings of a JSON file, nested ones by "outer.inner"."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--scores: cannot read {path} ({error})") from None
    if not isinstance(content, dict):
        raise UserError(
            f"--scores {path}: got a {type(content).__name__}, expected {{name: value}}"
        )
    scores = {}
    for name, value in content.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for key, number in inner:
            if isinstance(number, int | float | str):
                scores[f"{name}.{key}" if key else name] = number
    return scores


def push(folder: Path, repository: str, *, private: bool, dry_run: bool) -> None:
    """Uploads a folder, or with dry_run says what it would upload."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    names = ", ".join(str(path.relative_to(folder)) for path in files)
    if dry_run:
        print(
            f"dry run: would push {len(files)} files, {size / 1e6:.1f} MB, to {repository} "
            f"(--dry-run False pushes): {names}"
        )
        return
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        result = api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # huggingface_hub, its transport and the system each raise their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--push-to {repository}: not pushed, the files are in {folder} "
            f"({type(error).__name__}: {reason})"
        ) from None
    print(f"pushed {len(files)} files, {size / 1e6:.1f} MB: {result}")


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(args.ckpt, hints_of(args))
    check_model_flags(args, checkpoint)
    record = checkpoint.record
    checkpoint.record = replace(
        record,
        vae_path=args.vae_path or record.vae_path,
        objective=record.objective if args.rf is None else objective_of(args.rf),
        image_size=args.image_size or record.image_size,
    )
    scores = read_scores(args.scores)
    check_new_folder("--output", args.output)
    if args.push_to is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push_to):
        raise UserError(f"--push-to: got {args.push_to!r}, expected OWNER/NAME")
    name = args.push_to or args.output.resolve().name
    card = model_card(
        checkpoint, name=name, format=args.format, scores=scores, license=args.license
    )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        FORMATS[args.format](checkpoint, args.output)
        (args.output / "README.md").write_text(card)
    except ValueError as error:
        raise UserError(f"--format {args.format}: {error}") from None
    except OSError as error:
        raise UserError(f"--output: cannot write to {args.output} ({error.strerror})") from None
    print(f"{args.output}: {args.format} of {checkpoint.path}")
    if args.push_to:
        push(args.output, args.push_to, private=args.private, dry_run=args.dry_run)


if __name__ == "__main__":
    main(parse_args())
