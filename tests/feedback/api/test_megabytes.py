"""Texts of a megabyte from servers and authors of answers: read in a time that grows with their length, no faster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlaif_jax.feedback.api.builtin_templates import CORRECTION, CRITIQUE, PAIRWISE, RATING
from rlaif_jax.feedback.api.failures import error_in
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.replies import Reply, Token, read_reply
from rlaif_jax.feedback.api.template_files import parse_template
from rlaif_jax.feedback.api.templates import Question, RenderedQuestion, Template
from rlaif_jax.feedback.api.verdicts import read_verdict
from tests.feedback.api.questions import ONE, config
from tests.feedback.api_server import Wrong, completion, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")

NUMBERS = parse_template(
    "form: rating\nlabels: 1 .. 10\nverdict: Score: {label}\n[user]\n{prompt} {answer}\n", "numbers"
)
TEMPLATES = [PAIRWISE, RATING, NUMBERS, CRITIQUE, CORRECTION]
ASKED = RenderedQuestion((), "abc123")
PIECES = [" ", "\n", "<", "[", "{", "(", "*", "`", "'", "$", "1", "1.", "-", ",", "A", "A or ", "out of ", "Score: ",
          "<think>", "</think>", "<|", "<|im_end", "[INST", "<s", "\\boxed{", "I can't ", "Verdict ", "Verdict abc123: ",
          "abc123", "<corrected-abc123>", "</corrected-abc123>"]  # fmt: skip


def megabytes(unit: str, before: str, size: int) -> str:
    return before + unit * (size // len(unit))


def seconds(work: Callable[[], object]) -> float:
    """The CPU time of this thread, whatever else runs."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def require_linear(work: Callable[[str], object], unit: str, before: str) -> None:
    """Four times the length takes at most eight times as long, and no more than some slow walks over the text.

    A busy machine slows a thread down for a moment: what holds once in five times holds.
    """
    short, long = (megabytes(unit, before, size) for size in (250_000, 1_000_000))
    for _ in range(5):
        quarter = seconds(lambda: work(short))
        assert quarter < 2, (before, unit)  # a quadratic pattern takes minutes
        whole, walk = seconds(lambda: work(long)), seconds(lambda: sum(map(ord, long)))
        if whole < max(8 * quarter, walk) and whole < 20 * walk:
            return
    raise AssertionError((before, unit, quarter, whole, walk))


def read(text: str, template: Template) -> None:
    read_verdict(Reply(text), template, ASKED, direct=False)


def ask(text: str, template: Template) -> None:
    count = 2 if template.form == "ranking" else 1
    template.render(
        Question("p", (text, "b")[:count]), tuple(range(count)), ending="reasons" if template.reasons else ""
    )


def receive(text: str, template: Template) -> None:
    read_reply(completion(text))
    error_in({"error": {"message": text, "metadata": {"raw": text}}})


@pytest.mark.parametrize("work", [read, ask, receive], ids=lambda work: work.__name__)
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_the_time_of_a_text_grows_with_its_length(work: Callable[[str, Template], None], data: st.DataObject):
    texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)
    unit, before, template = data.draw(texts), data.draw(texts), data.draw(st.sampled_from(TEMPLATES))
    require_linear(lambda text: work(text, template), unit, before)


@pytest.mark.parametrize("start", ["", "ab", "Ab"])
def test_the_time_of_finding_a_verdicts_token_grows_with_the_length(start: str):
    """A reply that its tokens do not spell, but nearly."""

    def work(text: str) -> None:
        tokens = tuple(Token("a" * 1000, (("A", -0.1),)) for _ in range(3 * len(text) // 1000))
        reply = Reply(f"{start}{text}\nVerdict abc123: A", (*tokens, Token("\nVerdict abc123: A", (("A", -0.1),))))
        assert read_verdict(reply, PAIRWISE, ASKED, direct=False).label == "A"

    require_linear(work, "a", "")


MEGABYTE = 1_000_000
INNER = 450 * '[{"thinking":' + '"x"' + 450 * "}]"
THOUGHTS = '{"choices": [{"message": {"content": ' + INNER + "}}]}"
STRANGE = {
    "lists": Wrong(200, body=b"[" + b"[]," * (MEGABYTE // 3) + b"1]"),
    "nested lists": Wrong(200, body=b"[" + (b"[" * 400 + b"]" * 400 + b",") * (MEGABYTE // 801) + b"1]"),
    "depth": Wrong(200, body=b"[" * MEGABYTE),
    "digits": Wrong(200, body=b"1" * MEGABYTE),
    "thoughts in thoughts": Wrong(200, body=THOUGHTS.encode()),
    "an error of lists": Wrong(400, body=b"[" * MEGABYTE),
    "an error of nested lists": Wrong(400, body=b"[" + (b"[" * 400 + b"]" * 400 + b",") * (MEGABYTE // 801) + b"1]"),
    "an error of words": Wrong(400, body=b"a " * (MEGABYTE // 2)),
    "an error in a good response": Wrong(200, body=b'{"error": ' + b"[" * 600 + b"]" * 600 + b"}"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_response_is_one_missing_judgement(name: str):
    """And takes little time of the loop's thread, in which all other calls run."""

    async def now() -> float:
        return time.thread_time()

    behave = lambda body, number: STRANGE[name] if "strange" in body["messages"][-1]["content"] else right(body)
    with serve(behave) as server, ApiJudge(config(server.url, attempts=1, timeout_s=60.0), store=None) as judge:
        judge.judge([ONE], RATING)
        started = asyncio.run_coroutine_threadsafe(now(), judge._loop).result()
        strange, good = judge.judge([Question("strange", ("quality 7",)), Question("p", ("quality 7",))], RATING)
        spent = asyncio.run_coroutine_threadsafe(now(), judge._loop).result() - started
    walk = max(seconds(lambda: sum(map(ord, "a" * MEGABYTE))) for _ in range(3))
    assert spent < 10 * walk
    assert good.rating is not None
    (entry,) = strange.judgements
    assert entry.status == "error" and len(entry.raw) < 500, entry.raw


def test_a_reply_of_brackets_is_read():
    """The bound on lists does not meet what a judge writes at the longest."""
    text = "[{" * 40_000 + "\n"

    def behave(body: dict[str, Any], number: int) -> Any:
        good = right(body, logprobs=False)
        if "quality" in body["messages"][-1]["content"]:
            good["choices"][0]["message"]["content"] = text + good["choices"][0]["message"]["content"]
        return good

    with serve(behave) as server, ApiJudge(config(server.url, attempts=1, reading="reasons")) as judge:
        assert judge.judge([ONE], RATING)[0].rating is not None
