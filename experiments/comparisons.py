"""Paired comparisons: tests, and the cells of tables."""

from typing import Any

import numpy as np
from pandas import DataFrame, Series
from scipy import stats
from scipy.optimize import brentq


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
