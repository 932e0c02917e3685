"""A run killed between world sizes goes on with bitwise the same samples, within the stated tolerance of losses."""

from __future__ import annotations

import pytest

from tests.faults.walk import check, walk


def test_walk_through_two_one_and_two_ranks(tmp_path):
    check(walk((2, 1, 2), seed=1, root=tmp_path))


@pytest.mark.slow
def test_walk_through_two_one_three_four_and_two_ranks(tmp_path):
    check(walk((2, 1, 3, 4, 2), seed=0, root=tmp_path))
