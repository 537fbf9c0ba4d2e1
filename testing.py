"""`fedsparse.testing`: holds a plugin's method against every promise of the engine, from pytest or from code.

In a package's own tests:

    import pytest
    from fedsparse.testing import checks

    @pytest.mark.parametrize("check", checks("mymethod"), ids=str)
    def test_contract(check):
        check()
"""

from .core.testing import BrokenError, Check, Contract, check, checks

__all__ = ["BrokenError", "Check", "Contract", "check", "checks"]
