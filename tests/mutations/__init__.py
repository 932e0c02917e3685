"""Planted faults in the product's own sources, each with the test that must notice it: ``python -m tests.mutations``.

Attacks and objectives' losses have their own, in ``tests/conformance``; these are of the rooms around them.
"""
