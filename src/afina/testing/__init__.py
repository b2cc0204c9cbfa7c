"""Checks of the contracts that packages with methods or merge methods of their own fulfill.

Each raises `AssertionError` where a promise does not hold:

    from afina.testing import check_merge_method, check_method

    def test_vera() -> None:
        check_method(VeRA)

    def test_mean() -> None:
        check_merge_method("mean")
"""

from afina.testing.merge_methods import check_merge_method
from afina.testing.methods import check_method

__all__ = ["check_merge_method", "check_method"]
