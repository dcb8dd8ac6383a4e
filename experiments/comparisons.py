"""Paired comparisons: tests, and tables of differences."""

from typing import Any

import numpy as np
from pandas import DataFrame, Series
from scipy import stats
from scipy.optimize import brentq

from runtime.errors import UserError
from tools.benchmarks.common import markdown

computed_tests: list[DataFrame] = []  # results of `paired_tests` in this process, see every_table


def holm(p: Series) -> Series:
    """Corrects p-values by Holm's method (1979)."""
    order = p.sort_values()
    return (order * np.arange(len(order), 0, -1)).cummax().clip(upper=1)


def paired_tests(found: DataFrame, *, listed: bool = True) -> DataFrame:
    """Tests columns of paired differences, (pairs, comparisons), against 0 by Student's t.

    Returns, for each comparison with at least two pairs:
    p           two-sided p-value
    holm        p after Holm's correction for all comparisons; below 5%, a difference is detected
    detectable  difference that is detected with a power of at least 80%, if its deviation between
                pairs is the one found (at Holm's first level, 5% / comparisons)

    listed: whether `computed_tests` counts them
    """
    found = found.loc[:, found.count() > 1]
    p = Series({name: stats.ttest_1samp(found[name].dropna(), 0).pvalue for name in found})
    freedom, level = found.count() - 1, 0.05 / max(len(p), 1)
    errors = Series({name: errors_for_power(n, level) for name, n in freedom.items()})
    tests = DataFrame({"p": p, "holm": holm(p), "detectable": errors * found.sem()})
    if len(tests) and listed:
        computed_tests.append(tests)
    return tests


def errors_for_power(freedom: int, level: float, power: float = 0.8) -> float:
    """Returns the difference, in standard errors, that a two-sided t-test finds with this power."""
    critical = stats.t.isf(level / 2, freedom)
    return brentq(lambda d: stats.nct.sf(critical, freedom, d) - power, 0, 10 * critical)


def equivalence_interval(pairs: Series) -> tuple[float, float]:
    """Returns the 90% interval of the mean: two one-sided t-tests at 5% find it within a margin if
    this interval is."""
    return stats.t.interval(0.9, len(pairs) - 1, pairs.mean(), pairs.sem())


def fieller_interval(numerator: Series, denominator: Series) -> tuple[float, float] | None:
    """Returns the 95% interval of the ratio of the means of pairs (Fieller 1954), or None if it is
    unbounded, because the mean of the denominator may be 0."""
    critical = stats.t.isf(0.025, len(numerator) - 1) ** 2 / len(numerator)
    products = numerator.mean(), denominator.mean()
    (top, both), (_, bottom) = np.outer(products, products) - critical * np.cov(
        numerator, denominator
    )
    if bottom <= 0:
        return None
    root = np.sqrt(both**2 - top * bottom)
    return (both - root) / bottom, (both + root) / bottom


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


def tested_table(head: list[str], lines: list[tuple[list[str], Series]], digits: int) -> str:
    """Returns a Markdown table of lines, each with its paired differences and their test."""
    tests = paired_tests(DataFrame({place: pairs for place, (_, pairs) in enumerate(lines)}))
    table = [[*head, "difference", "p (Holm)", "detectable"]]
    for place, (cells, pairs) in enumerate(lines):
        table.append([*cells, with_error(pairs, "+", digits), *test_cells(tests, place, digits)])
    return markdown(table)


def differences_table(head: list[str], found: dict[tuple, Series], digits: int) -> str:
    """Returns a Markdown table of paired differences by the names in `head`, "" without any."""
    lines = [([*names, str(len(pairs))], pairs) for names, pairs in found.items()]
    return "\n" + tested_table([*head, "pairs"], lines, digits) if lines else ""


def pairs_table(losses: DataFrame, pairs: tuple[str, ...]) -> str:
    """Returns a Markdown table of differences between arms, with one correction for all of them.

    losses: (seeds, arms)
    pairs: each as ARM:REFERENCE
    """
    found = {}
    for pair in pairs:
        names = tuple(pair.split(":"))
        if len(names) != 2 or not set(names) <= set(losses):
            expected = f"ARM:REFERENCE, two of {', '.join(losses)}"
            raise UserError(f"--pairs: got {pair}, expected {expected}")
        found[names] = (losses[names[0]] - losses[names[1]]).dropna()
    return differences_table(["arm", "minus"], found, digits=4)
