r"""Writes one HTML page about the experts of a model: what each takes, when, where and with whom.

    python expert_report.py --data results/RUN
    python expert_report.py --data results/RUN --only patch --output figures/patch.pdf

The page shows the counts of expert_data.py and, if there is one, the file of expert_ablation.py
beside them. It is one file that needs no network. --only draws one view as a figure for a paper,
with a CSV file of numbers for each layer.
"""

from dataclasses import dataclass
from pathlib import Path

from analysis.counts import RoutingCounts
from analysis.expert_config import ABLATION_FILE
from analysis.heatmap import VIEWS, HeatmapConfig, write_heatmap
from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config, refuse_idle

PAGE, FIGURES = ".html", (".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class ExpertReportConfig(HeatmapConfig):
    output: Path | None = option(
        None,
        suffixes=(PAGE, *FIGURES),
        help="page, or .png or .pdf figure with --only (default: expert_report.html, or "
        "heatmap_*.png, near --data)",
    )
    only: str | None = option(
        None, choices=tuple(VIEWS),
        help="draw one view as a figure: patch, the experts of each position; spending, experts "
        "per token by step and position; persistence, the share of experts kept at the next step; "
        "flow, how often experts of neighbouring layers share a patch",
    )  # fmt: skip
    ablation: Path | None = option(
        None, metavar="FILE", help=f"file of expert_ablation.py (default: {ABLATION_FILE}, if any)"
    )


def parse_args() -> ExpertReportConfig:
    return parse_config(ExpertReportConfig, __doc__)


def check_flags(config: ExpertReportConfig) -> None:
    """Refuses flags that do not go together."""
    idle, expected, how = ("layers",), (PAGE,), "without --only"
    if config.only:
        idle, expected, how = ("ablation",), FIGURES, "with --only"
    refuse_idle(config, idle, how)
    if config.output and config.output.suffix.lower() not in expected:
        got = f"--output: got {config.output}"
        raise UserError(f"{got}, expected {' or '.join(expected)} {how}")


def main(config: ExpertReportConfig) -> None:
    check_flags(config)
    if config.only:
        write_heatmap(config, config.only, VIEWS[config.only])
        return
    data = config.counts_file
    output = config.output or data.with_name("expert_report.html")
    prepare_output("--output", output)
    counts = RoutingCounts.load(data)
    from analysis.ablation import load_ablation
    from analysis.report import report

    path, rows = config.ablation or data.with_name(ABLATION_FILE), []
    if config.ablation or path.exists():
        settings, rows = load_ablation(path)
        digests = [one.get("checkpoint_sha256") for one in (settings, counts.settings)]
        if None not in digests and digests[0] != digests[1]:
            raise UserError(
                f"{path}: was measured with other weights than {data}; run expert_ablation.py again"
            )
        if max(row.layer for row in rows) >= counts.num_layers or max(
            row.expert for row in rows
        ) >= counts.num_experts:  # fmt: skip
            raise UserError(f"{path}: has experts of another model than {data}")
    page = report(counts, rows)
    write_durably(output, page)
    print(f"{output}: {len(page) / 2**20:.1f} MB")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
