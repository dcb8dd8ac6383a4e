"""Paired comparisons: tests, cells of tables, and the table of mutual information."""

from typing import Any

import numpy as np
from pandas import DataFrame, Series
from scipy import stats
from scipy.optimize import brentq

from tools.benchmarks.common import markdown


def paired_tests(found: DataFrame) -> DataFrame:
    """Tests columns of paired differences, (pairs, comparisons), against 0 by Student's t.

    Returns, for each comparison with at least two pairs:
    p           two-sided p-value
    holm        p after Holm's correction for all comparisons; below 5%, a difference is detected
    detectable  difference that is detected with a power of at least 80%, if its deviation between
                pairs is the one found (at Holm's first level, 5% / comparisons)
    """
    found = found.loc[:, found.count() > 1]
    p = Series({name: stats.ttest_1samp(found[name].dropna(), 0).pvalue for name in found})
    order = p.sort_values()
    holm = (order * np.arange(len(order), 0, -1)).cummax().clip(upper=1)
    freedom, level = found.count() - 1, 0.05 / max(len(p), 1)
    errors = Series({name: errors_for_power(n, level) for name, n in freedom.items()})
    return DataFrame({"p": p, "holm": holm, "detectable": errors * found.sem()})


def errors_for_power(freedom: int, level: float, power: float = 0.8) -> float:
    """Returns the difference, in standard errors, that a two-sided t-test finds with this power."""
    critical = stats.t.isf(level / 2, freedom)
    return brentq(lambda d: stats.nct.sf(critical, freedom, d) - power, 0, 10 * critical)


def with_error(values: Series, sign: str = "", digits: int = 4) -> str:
    """Formats the mean and, for several values, its standard error."""
    error = f" ± {values.sem():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{error}"


def test_cells(tests: DataFrame, name: Any, digits: int) -> list[str]:
    """Formats p, p after Holm's correction, and the detectable difference of a comparison."""
    if name not in tests.index:
        return ["", ""]
    p, holm, detectable = tests.loc[name]
    return [f"{p:.2g} ({holm:.2g})", f"{detectable:.{digits}f}"]


def information_table(frame: DataFrame, arms: tuple[str, ...], reference: str | None) -> str:
    """Returns a Markdown table of mutual information (bits) from rows of specialisation.

    The trained router is compared with the random one and, for other arms than the reference, with
    the trained router of the reference. Arms with one run have no test.
    """
    names = frame["run"].str.extract(r"^(?P<arm>.*)-(?P<seed>\d+)$")
    bits = (
        frame.assign(**names).drop(columns="run").set_index(["arm", "router", "seed"]).sort_index()
    )
    lines, pairs = [], []
    for arm in arms or dict.fromkeys(names["arm"]):
        trained, random = (bits.loc[arm, router] for router in ("trained", "random"))
        for name in bits.columns:
            others = {"random router": random[name]}
            if reference not in (None, arm):
                others[reference] = bits.loc[reference, "trained"][name]
            for other, values in others.items():
                pairs.append(trained[name] - values)
                cells = [with_error(each, digits=3) for each in (trained[name], values)]
                lines.append([arm, name, cells[0], other, cells[1], with_error(pairs[-1], "+", 3)])
    varying = {place: values for place, values in enumerate(pairs) if values.any()}
    tests = paired_tests(DataFrame(varying))
    for place, line in enumerate(lines):
        line += test_cells(tests, place, digits=3)
    head = ["arm", "bits about", "trained", "compared with", "bits", "difference", "p (Holm)",
            "detectable"]  # fmt: skip
    return markdown([head, *lines])
