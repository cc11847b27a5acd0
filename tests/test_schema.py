"""What settings say of themselves: inherited meanings, entries of lists."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass

from pipeline import cli, schema


@dataclass
class Entry:
    """One of a list."""

    weight: float = 1.0
    """How much."""


@dataclass
class Base:
    """Has what the job inherits."""

    input: str = "???"
    """What is read,
    all of it."""


@dataclass
class Job(Base):
    """Adds to it."""

    entries: list[Entry] | None = None
    """Several."""
    nested: Entry = field(default_factory=Entry)
    silent: int = 0


def test_keys_name_sections_and_settings_name_entries():
    """A mixture's weights are settings, though no key of the command line is one of them."""
    assert [key for key, _, _ in schema.keys(Job)] == [
        "input", "entries", "silent", "nested", "nested.weight",
    ]  # fmt: skip
    assert [key for key, _, _ in schema.settings(Job)] == [
        "input", "entries", "entries[].weight", "silent", "nested.weight",
    ]  # fmt: skip


def test_documentation_is_inherited_and_on_one_line():
    """13 of the 18 settings of tokenize come from its base classes, and said nothing."""
    found = {key: schema.documentation(f, owner) for key, f, owner in schema.settings(Job)}
    assert found["input"] == "What is read, all of it."
    assert found["entries[].weight"] == found["nested.weight"] == "How much."
    assert found["silent"] == ""


def test_schemas_of_one_name_do_not_take_each_others_place() -> None:
    """A schema is stored once a process, under the name of its job."""
    first, second = (make_dataclass("Job", [("x", int, value)]) for value in (1, 2))
    found = [cli.compose(kind, [], config="job").x for kind in (first, second, first)]
    assert found == [1, 2, 1]
