"""The tree of errors, and what scripts read from an exit code."""

import ast
import inspect
import re
import tempfile

import pytest

from pipeline import errors


def classes() -> dict[str, type[BaseException]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return {name: kind for name, kind in found if issubclass(kind, BaseException)}


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes():
    tree = re.findall(
        r"^    (?:[|] {3})?(?:[|`]-- )?(\w+) {2,}", errors.__doc__ or "", re.MULTILINE
    )
    assert set(tree) == set(classes())


def test_every_error_is_one_the_command_line_prints_without_a_traceback():
    assert all(issubclass(kind, errors.PipelineError) for kind in classes().values())


def test_exit_codes_are_told_apart():
    """launch/pretrain.slurm and people's scripts go by them."""
    codes = {kind.exit_code for kind in classes().values()} | {errors.EXIT_BUG, errors.EXIT_HANG}
    assert codes == {1, 2, 3, 4}
    assert errors.DivergedError.exit_code == 3


def test_every_error_says_what_it_stands_for():
    names = {
        n.name
        for n in ast.parse(inspect.getsource(errors)).body
        if isinstance(n, ast.ClassDef) and ast.get_docstring(n)
    }
    assert names >= set(classes())


def test_a_message_commands_no_terminal():
    """A name of a stranger's file could clear the screen, or turn the rest of the line around."""
    name = "a\x1b[2Jb\rc\x07\u202e\x9b" + "\udcff"
    found = errors.printed(errors.DataError(f"{name}\tis bad\nand é is good"))
    assert found == (r"error: a\x1b[2Jb\rc\x07\u202e\x9b\udcff" + "\tis bad\n       and é is good")


def test_a_machine_without_room_for_temporary_files_is_a_users_problem(monkeypatch):
    """Python calls it a file that was not found, which is a bug of ours elsewhere."""
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    found = errors.of_the_machine(caught.value)
    assert found is not None and str(found).endswith("or name a folder with TMPDIR=...")
    assert errors.of_the_machine(FileNotFoundError(2, "No such file or directory", "x")) is None
