r"""Serves a web page that generates images and shows the expert of each patch while they form.

    python app.py
    python app.py --ckpt results/demo --compare results/expert-choice --cfg-scale 2.5

The page is at http://127.0.0.1:7860, for this machine only, unless you pass --host or --share. With
--compare, a second checkpoint generates images from the same noise. The flags of the sampler set
the initial values of the controls. With up to 8 steps, the page draws while a control moves. It
requires gradio: pip install -r requirements-extras.txt
"""

from dataclasses import dataclass

from options.parts import option
from runtime.errors import run_main
from runtime.flags import flags_of, parse_flags
from sampling.sampling_config import CKPT_HELP, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class AppConfig(SamplingConfig):
    ckpt: str = option(
        "assets/demo-emoji",
        group="checkpoint", help=f"{CKPT_HELP} (default: the emoji model of this repository)"
    )  # fmt: skip
    compare: str | None = option(
        None, group="page", help="second checkpoint, shown next to the first, from the same noise"
    )
    host: str = option("127.0.0.1", help="address to listen at; 0.0.0.0 admits other machines")
    port: int = option(7860, ge=1, le=65535, help="port to listen at")
    share: bool = option(False, help="also create a public link through gradio's servers")


def parse_args() -> AppConfig:
    flags = {name: flag for name, flag in flags_of(AppConfig).items() if name != "batch_size"}
    return AppConfig(**parse_flags(flags, __doc__))


def main(config: AppConfig) -> None:
    both = config.ckpt + (f" and {config.compare}" if config.compare else "")
    print(f"loading {both}", flush=True)
    from tools.page import launch  # imports torch and gradio, which takes seconds

    page = launch(config)
    print(f"the page is at {page.share_url or page.local_url} (Ctrl-C stops it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
