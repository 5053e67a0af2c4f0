"""The colours of tokens: shades by hand, and nothing but the answer's own text on the page, whatever the file holds."""

import pytest

from rlaif_jax.report.credit import Token, palette
from tests.report.pages import ATTACK, make, sample, write_samples


def after(tokens, credit="log_ratio", response=None, **more):
    text = "".join(text for text, _ in tokens) if response is None else response
    return sample("after", 0, text, credit=credit, tokens=[list(token) for token in tokens], **more)


def test_shades_by_hand():
    """Of 41 numbers the 39th is at the quantile .95: of the largest, 9, 2, 2 and 2, it is 2."""
    tokens = [("a", 2.0), (" b", -1.0), (" c", 0.2), (" d", -9.0), (" e", None), ("", 2.0)] + [("x", 0.0)] * 35
    tokens += [("y", 2.0)]
    colours = palette([after(tokens)])
    assert colours.most == 2.0 and colours.legend.most == "2"
    assert "before training, in nats" in colours.legend.meaning
    assert [part.shade for part in colours.tokens(after(tokens), 100)[:5]] == [4, -2, 0, -4, 0]
    assert [part.value for part in colours.tokens(after(tokens), 100)[:5]] == ["+2.00", "-1.00", "+0.20", "-9.00", ""]


@pytest.mark.parametrize(("credit", "most"), [("log_ratio", 0.1), ("value_change", 0.002)])
def test_a_policy_that_has_hardly_changed_is_hardly_coloured(credit, most):
    """The critic's values have the unit of the reward, of which nobody knows what is little."""
    part = after([("a", 0.002), ("b", -0.001), ("", 0.0)], credit=credit)
    colours = palette([part])
    assert colours.most == pytest.approx(most, rel=0.2)
    assert (max(token.shade for token in colours.tokens(part, 9)) == 0) == (credit == "log_ratio")


def test_tokens_without_text_add_to_the_next_one_and_the_last_is_the_end():
    part = after([("a", 0.5), ("", 1.0), ("\u00e9", 0.5), ("", None), ("b", None), ("", -2.0)])
    assert palette([part]).tokens(part, 100) == [
        Token("a", 1, "+0.50"), Token("\u00e9", 3, "+1.50"), Token("b", 0, ""), Token("", -4, "-2.00")
    ]  # fmt: skip


@pytest.mark.parametrize("limit, texts", [(3, ["ab", "c", "", " … (2 more characters)"]), (5, ["ab", "cd", "e", ""])])
def test_a_long_answer_is_cut(limit, texts):
    part = after([("ab", 1.0), ("cd", 1.0), ("e", 1.0), ("", 1.0)])
    found = [token.text for token in palette([part]).tokens(part, limit)]
    assert "".join(found) == "".join(texts) and found[-1] == texts[-1]


BAD = {
    "no numbers": sample("after", 0, "a b"),
    "of another answer": after([("a", 1.0)], response="b"),
    "unknown kind": after([("a", 1.0)], credit=ATTACK),
    "kind of another type": after([("a", 1.0)], credit=["log_ratio"]),
    "numbers as text": after([("a", "1")]),
    "not a number": after([("a", float("nan"))]),
    "triples": after([("a", 1.0)]) | {"tokens": [["a", 1.0, 2.0]]},
    "text": after([("a", 1.0)]) | {"tokens": "a"},
    "text that is a number": after([("a", 1.0)]) | {"tokens": [[1, 1.0]]},
    "all zero": after([("a", 0.0)]),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_coloured_is_plain_text(bad, tmp_path):
    assert palette([BAD[bad]]).legend is None
    write_samples(tmp_path, sample("before", 0, "x"), BAD[bad])
    page = make(tmp_path)
    assert "Colours after training" not in page.text and not [v for _, name, v in page.attributes if name == "title"]
    assert BAD[bad]["response"] in page.text


def test_the_page_shows_coloured_tokens_as_the_answer_with_a_legend(tmp_path):
    """Hostile tokens are text; together the spans read as the answer, without blanks between them."""
    tokens = [("He", 0.5), ("llo", -2.0), (ATTACK, 1.0), (" end", None), ("", 2.0)]
    write_samples(tmp_path, sample("before", 0, "x"), after(tokens, "value_change"))
    page = make(tmp_path)
    assert not {"script", "img"} & set(page.tags)
    assert [value for _, name, value in page.attributes if name == "title"] == [
        "darkest red", "darkest blue", "+0.50", "-2.00", "+1.00", "+2.00"
    ]  # fmt: skip
    shades = [v for tag, name, v in page.attributes if (tag, name) == ("span", "class") and v[:-1] in ("up", "down")]
    assert shades == ["down4", "up4", "up1", "down4", "up2", "up4"]
    assert "raised (blue) or lowered (red) the reward that the critic expects" in page.text
    assert "Hello" + ATTACK + " end¶" in "".join(page.texts)
