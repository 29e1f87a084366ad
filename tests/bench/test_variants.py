"""Every variant that a GPU would be asked to try changes settings that the table has."""

import inspect

from eaglerun.bench import variants
from eaglerun.kernels.launch import TABLE


def test_variants_change_what_there_is():
    for group in variants.GROUPS_OF_CASES:
        assert next(iter(group.variants.values())) == {}
        for changes in group.variants.values():
            for name, values in changes.items():
                assert values.keys() <= TABLE["sm_90"][name].keys(), name


def test_cases_are_of_their_family():
    for group in variants.GROUPS_OF_CASES:
        told = inspect.getsource(group.family)
        assert all(case.split(" ")[0] in told for case in group.cases)
