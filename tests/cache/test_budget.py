from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewlines.cache.budget import Budget
from fewlines.errors import FewlinesError


@pytest.mark.parametrize(
    ("unit", "amount", "tokens", "text", "slug"),
    [
        ("lines", 3, 42, "lines: 3", "3lines"),
        ("lines", Fraction(3, 2), 21, "lines: 1.5", "1.5lines"),
        ("fraction", Fraction(1, 6), 33, "fraction: 1/6", "1of6"),
        ("tokens", 21, 21, "tokens: 21", "21tokens"),
        ("tokens", 1000, 196, "tokens: 1000", "1000tokens"),
    ],
)
def test_units_on_a_14_by_14_grid(unit, amount, tokens, text, slug):
    budget = Budget(unit, Fraction(amount))
    assert budget.tokens((14, 14)) == tokens
    assert str(budget) == text
    assert budget.slug == slug


@given(st.fractions(min_value=Fraction(1, 50), max_value=1), st.integers(8, 40))
def test_a_fraction_never_exceeds_the_image(fraction, side):
    assert 1 <= Budget("fraction", fraction).tokens((side, side)) <= side * side


@pytest.mark.parametrize(
    ("unit", "amount", "message"),
    [("lines", 0, "above 0"), ("tokens", Fraction(1, 2), "whole number"), ("rows", 1, "lines, fr")],
)
def test_a_budget_that_means_nothing_is_refused(unit, amount, message):
    with pytest.raises(FewlinesError, match=message):
        Budget(unit, Fraction(amount))
