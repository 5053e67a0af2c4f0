"""Chat templates, against transformers; those that would never end; the token that ends a turn."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.chat import template as chat
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from tests.data.chat.styles import (
    CHATML,
    CONVERSATIONS,
    FOLDED,
    HEADERS,
    INST,
    STYLES,
    TAGS,
    THINKING,
    TURNS,
    chat_folder,
    talk,
)

REAL = Path(os.environ.get("RLAIF_JAX_CHAT_MODEL", "models/smollm2"))


def loaded(folder: Path) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


# ------------------------------------------------------------------------------------------ as transformers


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[HuggingFaceTokenizer, Any]:
    """A tokenizer with all special tokens, read by us and by transformers."""
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(tmp_path_factory.mktemp("chat") / "all", None)
    return loaded(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("style", STYLES)
def test_the_text_and_its_tokens_are_those_of_transformers(both, style: str):
    ours, theirs = both
    settings, took = {**ours.settings, "chat_template": STYLES[style]}, 0
    for name, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            try:
                text = theirs.apply_chat_template(
                    messages, chat_template=STYLES[style], tokenize=False, add_generation_prompt=prompt
                )
            except Exception as error:  # what the template raises
                with pytest.raises(UserError, match=re.escape(str(error))):
                    chat.render(settings, messages, "here", add_generation_prompt=prompt)
                continue
            assert chat.render(settings, messages, "here", add_generation_prompt=prompt) == text, name
            assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, name
            took += 1
    assert took >= 10


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = messages[0].content %}{% generation %}{% set x = 'inner' %}{{ x }}{% endgeneration %}{{ x }}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}{{ messages[0].content }}",
        "{{ messages | map(attribute='content') | join('|') }}{{ dict(a=1, b=[1.5, none, true]) | tojson }}",
        "{{ messages[0]['content'].split()[-1] }}{{ messages[0].get('name', 'x') }}{{ messages[::-1][0].content }}",
        "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}{{ messages | length }}",
        "{{ messages[0] | tojson(indent=4, sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}{{ pad_token }}",
        "{% set parts = namespace(all=[]) %}{% for m in messages %}{% set parts.all = parts.all + [m.content] %}"
        "{% endfor %}{{ parts.all }}{{ cls_token is defined }}{{ bos_token is defined }}",
        "{% call(x) list(1) %}{{ x }}{% endcall %}{% macro list(n) %}{{ caller(messages[0].content) }}{% endmacro %}",
        "{{ '%s-%d' | format(messages[0].content, 3) }}{{ '{0!r}'.format('q') }}{{ messages[0].content[:2] }}",
        "   {% if true %}\n  {{ messages[0].content }}\n   {% endif %}\n x {#- c -#} \n",
    ],
)
def test_what_jinja_can_do_is_as_in_transformers(both, template: str):
    ours, theirs = both
    for messages in (talk("a big question"), talk("q", "a", "r s", system="S")):
        try:
            want = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:
            with pytest.raises(UserError, match=re.escape(str(error))):
                chat.render({**ours.settings, "chat_template": template}, messages, "here", add_generation_prompt=False)
            continue
        settings = {**ours.settings, "chat_template": template}
        assert chat.render(settings, messages, "here", add_generation_prompt=False) == want


def test_a_real_chat_model():
    if not REAL.is_dir():
        pytest.skip("needs SmolLM2-135M-Instruct: `make smollm2`, or its folder in RLAIF_JAX_CHAT_MODEL")
    transformers = pytest.importorskip("transformers")
    ours, theirs = loaded(REAL), transformers.AutoTokenizer.from_pretrained(REAL)
    for messages in CONVERSATIONS.values():
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.chat_text(messages) == text
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_bos=True) == ours.encode(text) == ids
    assert ours.stop_ids == (2,)


# ---------------------------------------------------------------------------------------------- sources


NAMED = [{"name": "tool_use", "template": "tool {{ messages[0].content }}"}, {"name": "default", "template": CHATML}]


@pytest.mark.parametrize(
    ("template", "files"),
    [
        (CHATML, {}),
        (NAMED, {}),
        (NAMED[:1], {}),
        ({entry["name"]: entry["template"] for entry in NAMED}, {}),
        (None, {"chat_template.jinja": TAGS}),
        (CHATML, {"chat_template.jinja": TAGS}),
        (NAMED, {"chat_template.jinja": TAGS}),
        (CHATML, {"additional_chat_templates/rag.jinja": TAGS}),
        (CHATML, {"additional_chat_templates/default.jinja": TAGS}),
        (None, {"chat_template.jinja": TAGS, "additional_chat_templates/rag.jinja": CHATML}),
        (None, {"chat_template.jinja": CHATML, "additional_chat_templates/default.jinja": TAGS}),
        (None, {}),
    ],
)
def test_the_template_that_wins_is_that_of_transformers(tmp_path: Path, template: object, files: dict[str, str]):
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(tmp_path / "a", template)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    theirs, messages = transformers.AutoTokenizer.from_pretrained(folder), talk("q", system="s")
    try:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except ValueError as error:
        said = "named default" if "no default specified" in str(error) else "no chat template"
        with pytest.raises(UserError, match=rf"{re.escape(str(folder))}.*{said}"):
            loaded(folder).chat_text(messages)
        return
    assert loaded(folder).chat_text(messages) == text
    loaded(folder).save(tmp_path / "b")
    assert loaded(tmp_path / "b").chat_text(messages) == text
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text


# ------------------------------------------------------------------------------------ choice and variables

VALUES = {"x": "false", "y": '[1, -2.5e-7, null, {"a b": true}]', "z": "it's \"%}{{ }}\\ é 🎈\n", "n": "null", "e": ""}
EACH = (
    "\n  {% if x %}no{% endif %} {% macro f(m) %}{{ m.content }}{{ y | tojson }}{{ z }}{% endmacro %}{% for m in messages %}"
    "{{ f(m) }}{% generation %}{{ n is none }}{{ x }}{% endgeneration %}{% set x = 3 %}{% endfor %}|{{ x }}{{ e }}|"
)
SHOUT = "  {% if true %}\n{{ messages | map(attribute='content') | join('|') }}!{% endif %}\r\n</s>"


def chosen(folder: Path, template: str = "", *variables: str) -> HuggingFaceTokenizer:
    tokenizer = ChatConfig(template, variables).apply(load_tokenizer(folder))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        (THINKING, {"enable_thinking": "false"}),
        (THINKING, {"enable_thinking": "true"}),
        (HEADERS, {"date_string": "1 Jan 1970"}),
        (EACH, VALUES),
        (SHOUT, {}),
    ],
)
def test_variables_are_those_that_transformers_gives_to_the_template(tmp_path: Path, template: str, variables):
    """Also of the folder that a run writes, where nobody gives them again."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder(tmp_path / "a", template))
    ours = chosen(tmp_path / "a", "", *(f"{name}={text}" for name, text in variables.items()))
    ours.save(tmp_path / "b")
    saved, again = loaded(tmp_path / "b"), transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    given = {name: json.loads(text) if text and text[0] in "[ftn" else text for name, text in variables.items()}
    for name, messages in CONVERSATIONS.items():
        want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
        assert ours.chat_text(messages) == saved.chat_text(messages) == want, name
        assert again.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == want, name
    if not variables:
        return
    # Whoever gives them again, to us or to transformers, has his own.
    name = next(iter(variables))
    want = theirs.apply_chat_template(talk("q"), tokenize=False, add_generation_prompt=True, **given | {name: "w"})
    assert chosen(tmp_path / "b", "", f"{name}=w").chat_text(talk("q")) == want
    assert again.apply_chat_template(talk("q"), tokenize=False, add_generation_prompt=True, **{name: "w"}) == want


@pytest.mark.parametrize("place", ["list", "files"])
def test_a_template_is_chosen_by_its_name_or_its_file(tmp_path: Path, place: str):
    transformers = pytest.importorskip("transformers")
    named = {"default": CHATML, "shout": SHOUT, "thinking": THINKING}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    folder = chat_folder(tmp_path / "a", listed if place == "list" else None)
    if place == "files":
        (folder / "additional_chat_templates").mkdir()
        for name, text in named.items():
            (folder / "additional_chat_templates" / f"{name}.jinja").write_bytes(text.encode())
    (tmp_path / "tags.jinja").write_bytes(TAGS.encode())
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for ours, template, given in (
        (chosen(folder, "shout"), "shout", {}),
        (chosen(folder, "default"), None, {}),
        (chosen(folder, "thinking", "enable_thinking=false"), "thinking", {"enable_thinking": False}),
        (chosen(folder, str(tmp_path / "tags.jinja")), TAGS, {}),
    ):
        want = theirs.apply_chat_template(
            talk("q", "a", "r"), chat_template=template, tokenize=False, add_generation_prompt=True, **given
        )
        assert ours.chat_text(talk("q", "a", "r")) == want
    assert chosen(folder, "thinking").stop_ids == (257, 259) != chosen(folder, "shout").stop_ids
    assert chosen(chat_folder(tmp_path / "plain", None), str(tmp_path / "tags.jinja")).chat_text(talk("q")) == (
        "<|user|>\nq</s>\n<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("template", "variables", "said"),
    [
        ("", ["thinking"], "chat.variables: 'thinking' should be NAME=VALUE"),
        ("", ["=3"], "chat.variables: '=3' should be NAME=VALUE"),
        ("", ["x=1", "x=2"], "chat.variables: x is given twice"),
        ("", ["enable_thinkng=false"], "HERE/tokenizer_config.json: the chat template takes no variable enable_thinkng "
                                       "(chat.variables); it takes enable_thinking, parts, thought"),
        ("", ["messages=[]"], "the chat template takes no variable messages"),
        ("chatml", ["x=1"], "HERE/tokenizer_config.json has no chat template chatml (it has default), and there is"),
        ("HERE/for.jinja", [], "HERE/for.jinja: the chat template cannot be used: it is malformed: line 2"),
        ("HERE/latin.jinja", [], "HERE/latin.jinja is not UTF-8 text"),
        ("HERE", [], "and there is no such file"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_is_one_line(tmp_path: Path, template: str, variables: list[str], said: str):
    folder = chat_folder(tmp_path, THINKING)
    (folder / "for.jinja").write_text("x\n{% for")
    (folder / "latin.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=re.escape(said.replace("HERE", str(folder)))) as error:
        chosen(folder, template.replace("HERE", str(folder)), *variables)
    assert "\n" not in str(error.value)


def test_a_choice_needs_a_template(tmp_path: Path):
    with pytest.raises(UserError, match="this tokenizer has no chat template: a base model continues text"):
        chosen(chat_folder(tmp_path, None), "", "x=1")
    with pytest.raises(UserError, match=r"named default.*choose one by chat\.template"):
        chosen(chat_folder(tmp_path, NAMED[:1]), "", "x=1")
    with pytest.raises(UserError, match=r"need a tokenizer with chat templates, a tokenizer\.json"):
        ChatConfig("shout").apply(None)
    assert ChatConfig().apply(None) is None


# ------------------------------------------------------------------------------------- hostile and broken

ENDLESS = "computed for seconds without an end"
TOO_LARGE = "characters, or needs more than"
EITHER = f"{ENDLESS}|{TOO_LARGE}"  # a busy machine takes longer to fill the memory
TWICE = (
    "{% set ns = namespace(x=['x'], y=['x']) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for", "malformed: line 1"),
        ("\n{{ x | no_such_filter }}", "malformed: line 2: No filter named"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ (1).__init__ }}", "wrote nothing of the messages"),
        ("{% import 'x' as x %}", "includes or imports another file"),
        ("{% include '/etc/passwd' %}", "includes or imports another file"),
        ("{{ open('/etc/passwd').read() }}", "'open' is undefined"),
        ("{{ message.content.x }}", "'message' is undefined"),
        ("{{ messages[0].words.x }}", "has no attribute 'words'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('only\n two lines') }}", r"conversation of user: only\n two lines"),
        ("{{ content }}{{ prompt }}", "wrote nothing of the messages, only ''"),
        ("{% for m in conversation %}{{ m.value }}{% endfor %}Assistant:", "wrote nothing of the messages, only 'Ass"),
        ("{{ range(10**12) | list }}", "Range too big"),
        ("{{ 'x' * 10**12 }}", TOO_LARGE),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", EITHER),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}{% endfor %}", TOO_LARGE),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself without end, or nests too deeply"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", ENDLESS),
    ],
)
def test_a_broken_template_is_one_line_that_names_its_file(tmp_path: Path, template: str, said: str):
    tokenizer, began = loaded(chat_folder(tmp_path, template)), time.monotonic()
    with pytest.raises(UserError) as error:
        tokenizer.chat_text(talk("hello"))
    assert any(words in str(error.value) for words in said.split("|"))
    assert str(error.value).startswith(str(tmp_path / "tokenizer_config.json")) and "\n" not in str(error.value)
    assert time.monotonic() - began < 30
    assert chat.render({"chat_template": CHATML}, talk("q"), "here").startswith("<|im_start|>"), "others go on"


def test_a_template_without_end_stops_in_a_thread_while_others_are_rendered():
    """Lists that hold each list twice, forty times over, are compared: one operation, and no loop that one could count."""
    found: dict[int, str] = {}

    def render(number: int, template: str) -> None:
        try:
            found[number] = chat.render({"chat_template": template}, talk(f"question {number}"), "here")
        except UserError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=render, args=(i, (TWICE, CHATML)[i > 0])) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ENDLESS in found[0]
    assert [f"question {i}" in found[i] for i in range(9)] == [False] + [True] * 8


def test_a_template_without_end_is_not_asked_for_every_row_of_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "MOST_ENDLESS", 1)
    asked = chat.Renderer()
    request = {"template": TWICE, "messages": talk("q"), "names": {}, "prompt": False}
    first, began = asked.ask(request), time.monotonic()
    assert [asked.ask(request) for _ in range(9)] == [first] * 9 and ENDLESS in first["error"]
    assert time.monotonic() - began < 1 and "text" in asked.ask(request | {"template": CHATML}), "others go on"


def test_a_process_that_dies_or_cannot_start_is_replaced(monkeypatch: pytest.MonkeyPatch):
    ask = lambda asked: asked.ask({"template": CHATML, "messages": talk("q"), "names": {}, "prompt": False})
    asked = chat.Renderer()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/no/python")
        with pytest.raises(UserError, match="cannot start /no/python, which renders"):
            ask(asked)
    assert ask(asked) == {"text": "<|im_start|>user\nq<|im_end|>\n"}
    process = asked._process
    process.terminate()
    process.wait()
    assert ask(asked) == {"error": f"the process that renders it ended with status {-signal.SIGTERM}"}
    assert "text" in ask(asked) and asked._process is not process
    process = asked._process
    del asked
    gc.collect()
    assert process.returncode is not None, "it ends with the object"


def test_a_request_that_is_interrupted_leaves_no_reply_for_the_next(monkeypatch: pytest.MonkeyPatch):
    ask = lambda text: asked.ask({"template": CHATML, "messages": talk(text), "names": {}, "prompt": False})["text"]
    asked = chat.Renderer()
    assert "first" in ask("first")

    class Interrupted:
        def register(self, *of: object) -> None: ...
        def poll(self, wait: float) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chat.select, "poll", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask("interrupted")
    assert "second" in ask("second")


def test_a_tokenizer_may_keep_to_a_day(tmp_path: Path):
    """A run that is resumed on another day reads the same prompts."""
    asked = loaded(chat_folder(tmp_path / "dated", HEADERS))
    assert asked.prints_day and not loaded(chat_folder(tmp_path / "chatml", CHATML)).prints_day
    text = asked.on_day("2024-07-26").chat_text(talk("q"))
    assert "26 Jul 2024" in text and "26 Jul 2024" not in asked.chat_text(talk("q"))


def test_messages_and_words_that_a_template_does_not_know():
    with pytest.raises(UserError, match="must have a message"):
        chat.render({"chat_template": CHATML}, [], "here")
    with pytest.raises(UserError, match="System role not supported"):
        chat.render({"chat_template": TURNS, "bos_token": "<s>"}, talk("q", system="s"), "here")
    with pytest.raises(UserError, match="conversation of user, user: Conversation roles must alternate"):
        chat.render({"chat_template": INST, "bos_token": "<s>"}, [*talk("q"), *talk("r")], "here")
    # A message that a template leaves out is its choice, and a message without words has none to look for.
    assert chat.render({"chat_template": "{{ messages[-1].content }}"}, talk("q", system="s"), "here") == "q"
    assert chat.render({"chat_template": "{{ bos_token }}"}, talk("..."), "here") == ""


# ------------------------------------------------------------------------------------- the end of a turn


@pytest.mark.parametrize(
    ("template", "names", "stops"),
    [
        (CHATML, {"eos_token": "</s>"}, ("</s>", "<|im_end|>")),
        (CHATML, {"eos_token": "<|im_end|>"}, ("<|im_end|>",)),
        (CHATML, {"eos_token": None}, ("<|im_end|>",)),
        (HEADERS, {}, ("</s>", "<|eot_id|>")),
        (TURNS, {}, ("</s>", "<end_of_turn>")),
        (INST, {}, ("</s>",)),
        (TAGS, {}, ("</s>",)),
        (FOLDED, {}, ("</s>",)),
        (None, {}, ("</s>",)),
        ("{{ raise_exception('only tools') }}", {}, ("</s>",)),
        ("{% for m in messages %}{{ m.content }}<|not_in_the_vocabulary|>{% endfor %}", {}, ("</s>",)),
        # As Phi 3's: the end of the turn comes before the end of the text.
        ("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}{{ eos_token }}", {}, ("</s>", "<|im_end|>")),
        ([{"name": "default", "template": CHATML}], {}, ("</s>", "<|im_end|>")),
    ],
)
def test_the_token_after_an_answer_ends_it(tmp_path: Path, template: object, names: dict[str, Any], stops):
    tokenizer = loaded(chat_folder(tmp_path / "a", template, **names))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids] == list(stops)
    assert tokenizer.eos_id == (tokenizer.stop_ids[0] if names.get("eos_token", "</s>") else None)
    tokenizer.save(tmp_path / "b")
    assert set(loaded(tmp_path / "b").stop_ids) == set(tokenizer.stop_ids)
    if len(stops) > 1:  # for programs that do not render the template to find out
        assert json.loads((tmp_path / "b/generation_config.json").read_text())["eos_token_id"] == list(
            tokenizer.stop_ids
        )


def test_a_turn_may_end_with_an_added_token_that_is_not_special(tmp_path: Path):
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    added = {"267": {"content": "<end>", **flags}}
    folder = chat_folder(
        tmp_path, "{% for m in messages %}{{ m.content }}<end>{% endfor %}", added_tokens_decoder=added
    )
    assert loaded(folder).stop_ids == (257, 267)


def test_a_model_whose_texts_end_at_the_next_one_has_no_turns(tmp_path: Path):
    tokenizer = loaded(chat_folder(tmp_path / "a", CHATML)).stopping_at_bos()
    assert tokenizer.stop_ids == (256,)
    tokenizer.save(tmp_path / "b")
    assert loaded(tmp_path / "b").stop_ids == (256,)
