"""Every variant that a GPU would be asked to try changes settings that the table has."""

import inspect
import re

from eaglerun.bench import kernels, variants
from eaglerun.kernels.launch import TABLE


def test_variants_change_what_there_is():
    for group in variants.GROUPS_OF_CASES:
        assert next(iter(group.variants.values())) == {}
        for changes in group.variants.values():
            for name, values in changes.items():
                assert values.keys() <= TABLE["sm_90"][name].keys(), name


def test_cases_are_of_their_family():
    """By the names in the family's source, and in that of the functions it yields from."""
    for group in variants.GROUPS_OF_CASES:
        told = inspect.getsource(group.family)
        for name in re.findall(r"yield (?:from )?(_\w+)\(", told):
            told += inspect.getsource(getattr(kernels, name))
        assert all(case.split(" ")[0] in told for case in group.cases)
