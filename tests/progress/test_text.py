"""What a model wrote can change nothing but one line of the terminal."""

import pytest
from rich.cells import cell_len

from rlaif_jax.progress.text import cut_end, cut_start, duration, escaped, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x1b[31mb", "ab"),
        ("\x1b]0;a title\x07x", "x"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\x9b31mb", "ab"),
        ("\x1bPq#0\x1b\\x\x1b(0y", "x0y"),
        ("never ended\x1b]0;title", "never ended"),
        ("tab\tnew\r\nline\x07 \x00\x7f end", "tab new line end"),
        ("\u202eevil\u200b\u2066", "evil"),
        ("[bold]é 日本[/bold]", "[bold]é 日本[/bold]"),
        ("\x1b", ""),
    ],
)
def test_one_line_has_no_control_characters(text, shown):
    assert one_line(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc é 日本 [bold]", "a\tb\nc é 日本 [bold]"),
        ("\x1b[2J\r\x9b\x00\x7f", "\\x1b[2J\\r\\x9b\\x00\\x7f"),
        ("\u202eevil\u2066\u200b\ufeff\u2028", "\\u202eevil\\u2066\\u200b\\ufeff\\u2028"),
        ("\ud800", "\\ud800"),
        ("\U0001f469\u200d\U0001f52c", "\U0001f469\u200d\U0001f52c"),
    ],
)
def test_what_a_terminal_obeys_is_escaped_and_text_stays(text, shown):
    assert escaped(text) == shown


@pytest.mark.parametrize("cut", [cut_end, cut_start])
def test_a_text_is_cut_to_columns_not_characters(cut):
    assert cut("日本語", 6) == "日本語"
    assert cell_len(cut("日本語 " * 9, 20)) <= 20
    assert cell_len(cut("abc " * 9, 20)) == 20


def test_the_end_of_a_prompt_and_the_beginning_of_an_answer_are_kept():
    assert cut_start("abcdefghij", 6) == "...hij"
    assert cut_end("abcdefghij", 6) == "abc..."


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (7.4, "0:07"), (754, "12:34"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert duration(seconds) == text
