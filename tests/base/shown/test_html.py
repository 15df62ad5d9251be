"""A notebook is shown little, and nothing that it would obey."""

from __future__ import annotations

import json

from nirvana_deploy.base.shown.html import Record, html_table


def test_what_strangers_wrote_is_text() -> None:
    shown = html_table(["<b>"], [["<script>alert(1)</script>\x1b[2J"]], title='"&', note="</table>")
    assert shown.count("<") == shown.count("</") * 2
    assert "<script>" not in shown and "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J" in shown
    assert "&quot;&amp;" in shown and "&lt;/table&gt;" in shown


def test_of_very_many_rows_the_first_are_shown() -> None:
    shown = html_table(["n"], [[n] for n in range(1234)])
    assert shown.count("<tr>") == 101 and "1,134 more rows." in shown


def test_without_rows_a_line_is_left() -> None:
    assert html_table((), (), title="Done") == "<p><strong>Done</strong></p>"


def test_a_record_is_a_dictionary_that_prints_in_one_line() -> None:
    content = {"variants": {"dense": {"samples": list(range(1000))}}}
    record = Record(content, line="dense", html=lambda: "<table></table>")
    assert repr(record) == "Record(dense)" and record._repr_html_() == "<table></table>"
    assert record == content and json.loads(json.dumps(record)) == content
