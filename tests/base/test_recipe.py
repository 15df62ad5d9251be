"""Recipes check themselves: one sentence with the key, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.recipe import Option, fields_of, make, recipe

TABLE = {"plain": 1, "fancy": 2}


@recipe
class Tea:
    """A recipe with a field of every kind."""

    cups: Annotated[int, Option("How many.", minimum=1)]
    sugar: Annotated[float | Literal["auto"] | None, Option("Spoons.")] = None
    kind: Annotated[str, Option("Which.", choices=TABLE)] = "plain"
    extras: Annotated[tuple[str, ...], Option("Beside it.", choices=lambda: ("milk", "lemon"))] = ()
    hot: Annotated[bool, Option("Whether it is hot.")] = True
    pot: Annotated[Path | None, Option("Where it is made.")] = None
    strength: Annotated[float, Option("How strong.", minimum=0)] = 0.5


def test_values_become_the_types_of_their_fields() -> None:
    tea = make(Tea, {"cups": 2, "sugar": 1, "extras": ["milk"], "pot": "kitchen/pot"}, where="tea.toml")
    assert tea == Tea(cups=2, sugar=1.0, extras=("milk",), pot=Path("kitchen/pot"))
    assert (tea.kind, tea.hot) == ("plain", True) and Tea(cups=1, sugar="auto").sugar == "auto"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "tea.toml: 'cups' is missing; it takes a whole number of at least 1."),
        ({"cups": 0}, "tea.toml: cups = 0 is not allowed; it takes a whole number of at least 1."),
        ({"cups": 2**31}, "tea.toml: cups = 2147483648 is not allowed; it takes at most 2147483647."),
        ({"cups": "2"}, "tea.toml: cups = '2' is not allowed; it takes a whole number of at least 1."),
        ({"cups": True}, "tea.toml: cups = True is not allowed; it takes a whole number of at least 1."),
        ({"cups": None}, "tea.toml: cups = None is not allowed; it takes a whole number of at least 1."),
        ({"sugar": "some"}, "tea.toml: sugar = 'some' is not allowed; it takes a number or 'auto'."),
        (
            {"kind": "fance"},
            "tea.toml: kind = 'fance' is not allowed; it takes 'plain' or 'fancy'. Did you mean 'fancy'?",
        ),
        (
            {"extras": ["milk", "mlik"]},
            "tea.toml: extras = ['milk', 'mlik'] is not allowed; it takes a list of 'milk' or 'lemon'."
            " Did you mean 'milk'?",
        ),
        *(
            (
                {"strength": bad},
                f"tea.toml: strength = {bad} is not allowed; it takes a number of at least 0.",
            )
            for bad in (-0.1, float("nan"))
        ),
        ({"hot": 1}, "tea.toml: hot = 1 is not allowed; it takes true or false."),
        (
            {"cup": 2},
            "tea.toml: unknown key 'cup'. Did you mean 'cups'? Known: cups, sugar, kind, extras, hot, pot, "
            "strength.",
        ),
    ],
)
def test_what_is_not_allowed_is_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(NirvanaError) as error:
        make(
            Tea,
            values if not values or "cups" in values or "cup" in values else {"cups": 1, **values},
            where="tea.toml",
        )
    assert error.value.message == sentence


def test_a_recipe_made_by_hand_is_checked_too() -> None:
    with pytest.raises(NirvanaError, match=r"cups = -1 is not allowed"):
        Tea(cups=-1)


def test_a_table_that_grows_allows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "new", 3)
    assert Tea(cups=1, kind="new").kind == "new"


def test_a_field_without_an_option_is_our_mistake() -> None:
    with pytest.raises(TypeError, match=r"Bare\.loose says no Option"):

        @recipe
        class Bare:
            loose: int = 1

        Bare()


def test_fields_say_everything() -> None:
    cups, sugar, *_ = fields_of(Tea)
    assert cups.required and not sugar.required and sugar.default is None and sugar.option.help == "Spoons."
