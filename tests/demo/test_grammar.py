import pytest

from demo.grammar import is_well_formed


@pytest.mark.parametrize(
    "reply",
    [
        "The Quiet Harbour was gripping.",
        " The Quiet Harbour was gripping.\n",
        "Thank you for asking. I loved The Golden Letter. Kind regards.",
        "I enjoyed the soup at Nora's Kitchen, but the sauce was bland. Everyone praised the taste.",
        "The taxi service from Otto's Office was very slow. I paid ten pounds for it.",
    ],
)
def test_whole_replies_are_well_formed(reply):
    assert is_well_formed(reply)


@pytest.mark.parametrize(
    ("reply", "flaw"),
    [
        ("", "empty"),
        ("   ", "blank"),
        ("...", "no words"),
        ("The Quiet Harbour was gripping", "no end"),
        ("The Quiet Harbour was gripping. The plot was", "cut short"),
        ("The support the support was slow.", "stutter"),
        ("The plot was very very moving.", "stutter"),
        ("The Quiet Harbour was quite truly moving.", "stutter"),
        ("The plot was grippping.", "broken word"),
        ("I loved The Quiet Harbour. I loved The Quiet Harbour.", "repeated sentence"),
        ("was gripping.", "fragment"),
        ("The plot was moving.The acting was weak.", "no space between sentences"),
        ("The plot was moving.  The acting was weak.", "two spaces"),
        ("Kind regards.", "courtesies alone"),
        ("Thank you for asking. Kind regards.", "courtesies alone"),
        ("Kind regards. I loved The Quiet Harbour.", "closing first"),
        ("I loved The Quiet Harbour. Thank you for asking.", "opening last"),
        ("The taste was fresh. The sauce was fresh. The smell was fresh. "
         "The texture was fresh. The portion was fresh. The seasoning was fresh. "
         "The presentation was fresh.", "rambling"),
        ("<|up|> The plot was moving.", "a special token"),
    ],
)  # fmt: skip
def test_broken_replies_are_not_well_formed(reply, flaw):
    assert not is_well_formed(reply), flaw
