"""Text that other programs wrote is read as they meant it, and what is nested or numbered past all sense is refused."""

from __future__ import annotations

import codecs
import json
import re
import tomllib
from pathlib import Path

import pytest

from trifuse.architectures.storage.atomic_files import damage_advice
from trifuse.architectures.storage.pretrained import read_description
from trifuse.architectures.storage.record import read_record
from trifuse.architectures.storage.text import listed, natural_key, parse_json, read_parsed, read_table, read_text
from trifuse.kernels import CheckpointError

SOURCES = Path(__file__).resolve().parents[3] / "architectures"
MARKED = [
    pytest.param(lambda text: codecs.BOM_UTF8 + text.encode(), id="utf-8"),
    pytest.param(lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"), id="utf-16-le"),
    pytest.param(lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"), id="utf-16-be"),
]


@pytest.mark.parametrize("encoded", MARKED)
def test_d38_a_byte_order_mark_is_no_text(encoded, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(encoded("ä,b\r\n1,2\r\n"))
    assert read_text(file) == "ä,b\r\n1,2\r\n"
    assert read_table(file) == (["ä", "b"], [{"ä": "1", "b": "2"}])
    file.write_bytes(encoded('{"ä": [1]}'))
    assert read_parsed(file, json.loads) == {"ä": [1]}
    file.write_bytes(encoded('a = "ä"\r\n'))
    assert read_parsed(file, tomllib.loads) == {"a": "ä"}


def test_d38_every_text_is_read_by_one_function():
    """Whatever reads a file in another way forgets the byte order mark that somebody's editor puts there.

    What the system itself tells in ``/proc`` has none.
    """
    reading = re.compile(r"\.read_text\(|json\.load\(|tomllib\.load\(|open\([^)]*encoding")
    of_others = re.compile(r"^(?!.*(?:/proc/|\"w\"))")
    found = {
        f"{path.relative_to(SOURCES)}: {line.strip()}"
        for path in SOURCES.rglob("*.py")
        for line in path.read_text().splitlines()
        if reading.search(line) and of_others.match(line)
    }
    assert not found


@pytest.mark.parametrize("read", [read_record, lambda path: read_description(path.parent)], ids=["record", "network"])
def test_l3_broken_json_is_named_with_its_line_and_column(read, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n  "format": "trifuse",\n  config\n}')
    with pytest.raises(CheckpointError, match=r"config.json: expected JSON, .*line 3 column 3"):
        read(path)


@pytest.mark.parametrize("levels", [60, 900, 200_000])
def test_l3_l18_what_is_nested_too_deep_is_refused(levels, tmp_path):
    file = tmp_path / "file"
    file.write_text("[" * levels + "]" * levels)
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        read_parsed(file, json.loads)
    file.write_text(".".join("a" * min(levels, 5000)) + " = 1")
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        read_parsed(file, tomllib.loads)


def test_l18_what_is_nested_as_deep_as_allowed_is_read(tmp_path):
    (tmp_path / "file").write_text("[" * 50 + "1" + "]" * 50)
    assert read_parsed(tmp_path / "file", json.loads)


def test_l18_numbers_in_names_may_be_of_any_length():
    longest, longer = f"case_1{'0' * 5000}", f"case_{'9' * 5000}"
    assert sorted([longest, "case_10", longer, "case_2"], key=natural_key) == ["case_2", "case_10", longer, longest]
    assert natural_key("a007") == natural_key("a7")


def test_l19_a_list_of_more_than_ten_is_cut_and_counted():
    assert listed(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": [{"a": 1, "c": 2, "a": 3}]}'])
def test_l17_a_name_that_an_object_has_twice_is_refused(text):
    with pytest.raises(ValueError, match="'a' more than once in one object"):
        parse_json(text)
    assert parse_json('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,a\n1,2,3\n", "column a more than once"),
        ("a,b\n1,2\n\n3\n", "line 4 has 1 cells, and the first line 2"),
        ("a,b\n1,2,3\n", "line 2 has 3 cells"),
        ('a,b\n"1\n",2\n3,4,5\n', "line 4 has 3 cells"),
    ],
)
def test_a_table_whose_cells_belong_to_no_one_column_is_refused(text, message, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "file")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (EOFError("x"), "copy it again"),
        (ValueError("EOF: reading array data, expected 8 bytes got 3"), "copy it again"),
        (OSError("Unable to open file (truncated file: eof = 96)"), "copy it again"),
        (ValueError("Object arrays cannot be loaded when allow_pickle=False"), ""),
        (KeyError("image"), ""),
        (ValueError("unconverted data remains: 14"), ""),
    ],
)
def test_only_damage_is_mended_by_another_copy(error, advice):
    assert damage_advice(error) == advice
