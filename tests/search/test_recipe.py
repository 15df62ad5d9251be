"""What a search is asked, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.search.recipe import Search, Target, precisions_of, shard_of, sparsities_of


def test_lists_are_sorted_and_each_value_once() -> None:
    recipe = Search(sparsities="0.4, 0.2,0,0.4", precisions="w4,none,w4")
    assert sparsities_of(recipe) == (0.0, 0.2, 0.4)
    assert precisions_of(recipe) == ("w4", None)


@pytest.mark.parametrize(
    ("read", "options", "said"),
    [
        (sparsities_of, {"sparsities": "0.2,high"}, "'high' is none"),
        (sparsities_of, {"sparsities": "1.2"}, "'1.2' is none"),
        (sparsities_of, {"sparsities": "nan"}, "'nan' is none"),
        (sparsities_of, {"sparsities": "0"}, "cuts nothing"),
        (sparsities_of, {"sparsities": "0,,0.2"}, "'0,,0.2' has nothing between two commas"),
        (sparsities_of, {"sparsities": "0,0.2,"}, "or at an end"),
        (sparsities_of, {"sparsities": ""}, "--sparsity '' is empty"),
        (precisions_of, {"precisions": "w5"}, "'w5' is no precision; there are none, int8, w8, w4"),
        (precisions_of, {"precisions": "none, ,w4"}, "has nothing between two commas"),
        (precisions_of, {"precisions": " "}, "--precision ' ' is empty"),
        (shard_of, {"shard": "3/2"}, "I from 1 to N"),
        (shard_of, {"shard": "0/2"}, "no part"),
        (shard_of, {"shard": "half"}, "no part"),
    ],
)
def test_what_is_no_list_is_refused_with_what_is_allowed(
    read: Any, options: dict[str, str], said: str
) -> None:
    with pytest.raises(NirvanaError, match=said):
        read(Search(**options))


def test_parts_are_counted_from_one_by_people() -> None:
    assert shard_of(Search()) == (0, 1)
    assert shard_of(Search(shard="2/8")) == (1, 8)


def test_a_target_knows_what_it_limits() -> None:
    assert not Target().asked and not Target().on_quality and not Target().on_time
    assert Target(max_kl=0.1).on_quality and not Target(max_kl=0.1).on_time
    assert Target(min_speedup=2.0).on_time and not Target(max_weights_bytes=10).on_time
