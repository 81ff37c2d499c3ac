"""Confidence intervals: Student's t, Wilson's, and of a difference of accuracies."""

import math

# 97.5% of a normal distribution lie below.
NORMAL_975 = 1.959963984540054


def student_975(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t.

    By its expansion around the normal quantile (Abramowitz and Stegun, 26.7.5), four terms: from
    five degrees of freedom on right to 0.1%.
    """
    z, n = NORMAL_975, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% score interval of a proportion. Source: Wilson (1927)."""
    z2 = NORMAL_975**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = share * (1 - share) / count + z2 / (4 * count * count)
    half = NORMAL_975 / (1 + z2 / count) * math.sqrt(spread)
    # At 0 and 1 an end is the share itself, which rounding must not pass.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def accuracy_difference(
    first: float, first_size: int, second: float, second_size: int
) -> tuple[float, float]:
    """Return the 95% interval of the difference of two accuracies, in fractions.

    The two count as independent. Networks tested on the same images mostly fail on the same ones,
    and the interval is then wider than need be: it errs towards not firing.

    Source: Newcombe (1998), method 10, the hybrid of two score intervals.
    """
    low1, high1 = wilson(first, first_size)
    low2, high2 = wilson(second, second_size)
    difference = first - second
    return (
        difference - math.hypot(first - low1, high2 - second),
        difference + math.hypot(high1 - first, second - low2),
    )
