"""The examples in docstrings that are Python sessions."""

import doctest
import types

import pytest

from fpnas_keras import architecture, spaces
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.cost import costs, latency_table
from fpnas_keras.method import distributions, estimator
from fpnas_keras.spaces import SearchBlock, entries, search_block

MODULES = (architecture, spaces, search_block, entries, costs, latency_table, estimator)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0 and failed == 0


def test_examples_of_distributions():
    distribution = distributions.FactorizedLogits(spaces.get("mobile_mini"))
    search = types.SimpleNamespace(distribution=distribution)
    names = {"SearchBlock": SearchBlock, "Stem": Stem, "Head": Head, "search": search}
    failed, attempted = doctest.testmod(distributions, extraglobs=names)
    assert attempted > 5 and failed == 0
