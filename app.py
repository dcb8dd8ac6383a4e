r"""A page that draws images, and shows which expert each patch goes to while they form.

    python app.py --ckpt results/demo
    python app.py --ckpt results/demo --compare results/expert-choice --cfg-scale 2.5

It is at http://127.0.0.1:7860, for this machine only unless --host or --share says otherwise. With
--compare a second checkpoint draws from the same noise. Flags of the sampler are what the page
begins with: with --num-sampling-steps of at most 8 it draws while a control moves. It needs gradio:
pip install -r requirements-extras.txt
"""

from dataclasses import dataclass

from runtime.errors import run_main
from runtime.flags import flag, flags_of, parse_flags
from sampling.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class AppConfig(SamplingConfig):
    ckpt: str = flag(
        "assets/demo",
        group="model (read from the checkpoint; for published weights say what they do not)",
        help="what to draw with, as sample.py's --ckpt",
    )  # fmt: skip
    compare: str | None = flag(
        None, group="page", help="a second checkpoint, drawn beside it from the same noise"
    )
    host: str = flag("127.0.0.1", help="address to listen at; 0.0.0.0 for other machines")
    port: int = flag(7860, least=1, most=65535, help="port to listen at")
    share: bool = flag(False, help="also open a public link, through gradio's servers")


def parse_args() -> AppConfig:
    return AppConfig(**parse_flags(flags_of((AppConfig,), ("batch_size",)), __doc__))


def main(config: AppConfig) -> None:
    both = config.ckpt + (f" and {config.compare}" if config.compare else "")
    print(f"loading {both}", flush=True)
    from analysis.page import launch  # torch and gradio, some seconds

    page = launch(config)
    print(f"the page is at {page.share_url or page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
