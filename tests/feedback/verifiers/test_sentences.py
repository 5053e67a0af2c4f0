"""Sentences, words, paragraphs and list items, counted by hand."""

import time

import pytest

from rlaif_jax.feedback.verifiers.sentences import list_items, paragraphs, sentences, words


@pytest.mark.parametrize(
    "count, text",
    [
        (0, ""),
        (0, "!!! ... \n\n - "),
        (1, "no mark at the end"),
        (3, "One. Two! Three?"),
        (2, "Really?! Yes!"),
        (2, "Use fruit, e.g. apples. Done."),
        (2, "Pi is 3.14. The next digit is 1."),
        (2, "See example.com/a.html for more. Good luck."),
        (2, "Wait... what? Fine."),
        (3, "Wait... What? Fine."),
        (2, "Hm\u2026 well. Fine."),
        (3, '"Stop!" he said. "Why?" She left.'),
        (2, 'He said "no." Then he left.'),
        (2, "He said \u201cno.\u201d Then he left."),
        (2, "Dr. Smith and J. R. Lee met at 5 p.m. They ate."),
        (1, "We met at 5 p.m. today."),
        (3, "The U.S. Army won. It was in the U.S. The end."),
        (2, "i like it. you do too."),
        (2, "A sentence here.Another one."),
        (3, "What?Nothing!Fine"),
        (1, "I use Node.js daily"),
        (2, "So did I. Then we went."),
        (2, "It costs $5. 3 people came."),
        (1, "No. 5 is alive."),
        (2, "No. That is wrong."),
        (3, "Cats, dogs, etc. are pets. We like cats, dogs, etc. We like them."),
        (1, "He has a Ph.D. in maths."),
        (4, "**Bold.** Next one. (In brackets.) _End._"),
        (2, "Hello \U0001f44b. Bye \U0001f44b"),
        (4, "- a\n- b. c\n- d"),
        (3, "1. First\n2. Second thing. And more"),
        (3, "A title\n\nThe text. The end."),
        (2, "# A title\nThe text."),
        (1, "A line that\ngoes on."),
        (2, "Under \u00c4rzte. \u00dcber alles."),
    ],
)
def test_sentences(count, text):
    found = sentences(text)
    assert len(found) == count and all(found)


def test_the_text_of_sentences():
    assert sentences('1. He said "e.g."\n   to us. Go!\n\n* x') == ['He said "e.g." to us.', "Go!", "x"]


def test_long_answers_take_no_time():
    started = time.monotonic()
    for text in (
        "." * 20000,
        "a.b." * 20000,
        "a. " * 20000,
        "w" * 20000 + ".",
        " " * 20000,
        "\n- " * 20000,
        '."' * 20000,
    ):
        sentences(text), words(text), list_items(text), paragraphs(text)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("  two words\n", ["two", "words"]),
        ("don't use well-known e.g. words", ["don't", "use", "well-known", "e.g.", "words"]),
        ("a - b -- c \u2014 d", ["a", "b", "c", "d"]),
        ("one\u2014two--three", ["one", "two", "three"]),
        ("3.14 * 2 = 6.28!", ["3.14", "2", "6.28!"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("no list", []),
        ("Here:\n- a\n- b\n", ["a", "b"]),
        ("* a\n+ b\n\u2022 c", ["a", "b", "c"]),
        ("1. a\n2) b\n10. c", ["a", "b", "c"]),
        ("- a\n  - inner\n  - inner\n- b", ["a", "b"]),
        ("  - a\n  - b", ["a", "b"]),
        ("**bold** text\n-5 degrees\n3.14 is pi\n---\n- ", []),
    ],
)
def test_list_items(text, expected):
    assert list_items(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [("", []), ("a", ["a"]), ("a\nb", ["a\nb"]), ("a\n\nb", ["a", "b"]), ("\n\na\n \t\n\n\nb\n\n", ["a", "b"])],
)
def test_paragraphs(text, expected):
    assert paragraphs(text) == expected
