"""The style of figures, and writing them to a file."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from runtime.files import write_durably

STYLE = {"font.size": 7, "axes.titlesize": 7, "figure.titlesize": 7.5, "axes.linewidth": 0.5,
         "text.parse_math": False, "pdf.fonttype": 42}  # fmt: skip  # 42 keeps text selectable


@matplotlib.rc_context(STYLE)
def save_figure(figure: Figure, path: Path, dpi: int = 300) -> None:
    """Writes a figure in the format of the suffix, .png or .pdf."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix[1:])
    write_durably(path, content.getvalue())
