"""The reference cases, shared with the trainer's own tests."""

from tests.sddp.conftest import reference_cases

__all__ = ["reference_cases"]
