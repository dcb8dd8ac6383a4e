r"""Writes one HTML page about the experts of a model: what each takes, when, where and with whom.

    python expert_report.py --data results/RUN
    python expert_report.py --data results/A results/B
    python expert_report.py --data results/RUN --only patch --output figures/patch.pdf

The page shows the counts of expert_data.py and, if there is one, the file of expert_ablation.py
beside them. It is one file that needs no network. Several models with the same layers stand side by
side, on the same colour scales. --only draws one view as a figure for a paper,
with a CSV file of numbers for each layer.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from analysis.counts import COUNTS_FILE, RoutingCounts, counts_file
from analysis.expert_config import ABLATION_FILE
from analysis.heatmap import VIEWS, HeatmapConfig, write_heatmap
from options.parts import option
from runtime.errors import UserError, print_safely, run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config, refuse_idle

PAGE, FIGURES = ".html", (".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class ExpertReportConfig(HeatmapConfig):
    data: tuple[Path, ...] = option(
        (Path("results", COUNTS_FILE),),
        group="heat map",
        help="files of expert_data.py, or their folders: one, or several to compare",
    )
    output: Path | None = option(
        None,
        suffixes=(PAGE, *FIGURES),
        help="page, or .png or .pdf figure with --only (default: expert_report.html, or "
        "heatmap_*.png, near --data; expert_reports.html in the folder that contains all files)",
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
    if len(config.data) > 1:
        refuse_idle(config, ("ablation", "only"), "with several --data")


def read_ablation(path: Path, data: Path, counts: RoutingCounts) -> list:
    """Reads the rows of expert_ablation.py about the model of the counts in `data`."""
    from extras.ablation import load_ablation

    settings, rows = load_ablation(path)
    pairs = {
        name: (settings.get(name), counts.settings.get(name))
        for name in ("checkpoint_sha256", "precision", "pipeline")
    }
    got, expected = pairs["precision"]
    if None not in (got, expected) and got != expected:
        raise UserError(
            f"{path}: got --precision {got}, expected {expected}, as in {data}; run both scripts "
            "with the same precision"
        )
    # A pipeline of diffusers has no digest, and older counts have no name of their pipeline.
    is_other_pipeline = None not in pairs["pipeline"] and len({*pairs["pipeline"]}) > 1
    if is_other_pipeline or len({*pairs["checkpoint_sha256"]}) > 1:
        raise UserError(
            f"{path}: was measured with other weights than {data}; delete it and run "
            "expert_ablation.py again"
        )
    if max(row.layer for row in rows) >= counts.num_layers or max(
        row.expert for row in rows
    ) >= counts.num_experts:  # fmt: skip
        raise UserError(f"{path}: has experts of another model than {data}")
    return rows


def check_layers(files: list[Path], all_counts: list[RoutingCounts]) -> None:
    """Refuses to compare models whose experts are in different layers."""
    for file, counts in zip(files, all_counts, strict=True):
        if counts.layer_numbers != all_counts[0].layer_numbers:
            got, expected = (
                ", ".join(map(str, one.layer_numbers)) for one in (counts, all_counts[0])
            )
            raise UserError(
                f"--data: got experts in layers {got} of {file}, expected {expected} "
                f"as in {files[0]}"
            )


def main(config: ExpertReportConfig) -> None:
    check_flags(config)
    if config.only:
        view = HeatmapConfig(data=config.data[0], output=config.output, layers=config.layers)
        write_heatmap(view, config.only, VIEWS[config.only])
        return
    files = [counts_file(data) for data in config.data]
    output = files[0].with_name("expert_report.html")
    if len(files) > 1:
        folder = os.path.commonpath([os.path.abspath(file.parent) for file in files])
        output = Path(folder, "expert_reports.html")
    output = config.output or output
    prepare_output("--output", output)
    all_counts = [RoutingCounts.load(file) for file in files]
    check_layers(files, all_counts)
    from extras.report import ReportedModel, report

    titles = [counts.settings.get("run", counts.settings["model"]) for counts in all_counts]
    if len(set(titles)) < len(titles):
        titles = [f"{title} ({file})" for title, file in zip(titles, files, strict=True)]
    models = []
    for title, file, counts in zip(titles, files, all_counts, strict=True):
        path, rows = config.ablation or file.with_name(ABLATION_FILE), []
        try:
            rows = read_ablation(path, file, counts) if config.ablation or path.exists() else []
        except UserError as error:
            if config.ablation:
                raise
            print_safely(f"note: the page has no ablation: {error}")  # found, not asked for
        models.append(ReportedModel(title, counts, rows))
    page = report(models)
    write_durably(output, page)
    print(f"{output}: {len(page) / 2**20:.1f} MB")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
