"""The example stays small, and the places that list its files agree."""

import re

import examples.mimo
from tests.helpers.commands import ROOT

PACKAGE = ROOT / "examples/mimo"
FILES = sorted(PACKAGE.rglob("*.py"))


def num_lines(path):
    return len(path.read_text().splitlines())


def reading_order():
    """The files that the package's docstring lists before the rooms around them."""
    example, _, _ = examples.mimo.__doc__.partition("Around it")
    return re.findall(r"^    (\S+\.py)  +\S", example, re.MULTILINE)


def readme_table():
    """The files in the README's table of the reading order."""
    section = (ROOT / "README.md").read_text().split("\n## Read it\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\S+\.py)` \|", section, re.MULTILINE)


def test_the_example_is_at_most_14_files_and_3000_lines():
    order = reading_order()
    assert len(set(order)) == len(order)
    assert 0 < len(order) <= 14
    assert sum(num_lines(PACKAGE / file) for file in order) <= 3_000


def test_the_readme_lists_the_same_files_in_the_same_order():
    assert readme_table() == reading_order()


def test_the_package_is_at_most_75_files():
    assert len(FILES) <= 75


def test_no_file_is_over_450_lines():
    assert [path for path in FILES if num_lines(path) > 450] == []


def test_every_room_and_command_has_a_place_on_the_map():
    _, _, around = examples.mimo.__doc__.partition("Around it")
    rooms = {path.relative_to(PACKAGE).parts[0] for path in FILES} - {"__init__.py"}
    on_the_map = {file.split("/")[0] for file in reading_order()}
    on_the_map |= set(re.findall(r"(\w+)/ ", around)) | set(re.findall(r"\w+\.py", around))
    assert on_the_map == rooms
