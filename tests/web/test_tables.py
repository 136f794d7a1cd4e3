"""Tables of a page."""

from web.tables import Share, notice, table


def test_a_table_has_its_rows_and_bars():
    made = table("Versions", ("version", "thumbs up"), [("0", Share(0.625, 8)), ("1", "none")])
    assert "<h2>Versions</h2>" in made
    assert "<th scope=col>thumbs up</th>" in made
    assert '<i style="width: 62%"></i></span>62% of 8</td>' in made
    assert made.count("<tr>") == 3


def test_what_others_wrote_is_text():
    hostile = "<script>alert(1)</script>"
    made = table(hostile, (hostile,), [(hostile,)]) + notice(hostile)
    assert "<script" not in made
    assert made.count("&lt;script&gt;") == 5


def test_a_table_without_rows_says_so():
    assert "None yet." in table("Decisions", ("when",), [])
