"""Answers of models and runs: equal to transformers', side by side with the same numbers, and safe on a terminal."""

import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.readers import FileRecords
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.api.command import read_questions
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf.adapters import save_adapter
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig
from rlaif_jax.recipes.own_prompts import read_records
from rlaif_jax.tools import export, generate
from rlaif_jax.tools.generate import GenerateConfig, Row, main
from rlaif_jax.tools.writers import Answer, Writer, load_writer
from tests.helpers import random_params
from tests.tools.run_folders import LORA, MODEL, TEMPLATE, TOKENIZER, policy_of, write_lm, write_run

ONE = ParallelConfig("shard", 1)
GREEDY = SamplingConfig(8, 0.0)


def config(made, **settings):
    base = {"model": str(made / "whole"), "parallel": ONE, "max_new_tokens": 8, "batch_size": 4}
    return GenerateConfig(**base | settings)


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def writer(name, sampling=GREEDY, *, template="auto", system="", step=None, adapter=None, seed=0):
    loaded = load_writer(str(name), step=step, adapter=adapter, tokenizer=None, dtype="float32")
    return Writer(loaded, sampling, seed=seed, template=template, system=system, parallel=ONE)


def answers(of, *prompts):
    records = [{"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt} for prompt in prompts]
    read = of.read(FileRecords(tuple(records), tuple("?" for _ in records)))
    return [answer.text for answer in of.answer(read.records, 0, len(records))]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    asked = ["a", "b c d", "e e e e", "f g", "h", [{"role": "user", "content": "a b"}]]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    return path


# ---- The answers


def test_greedy_answers_are_those_of_transformers(made):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(made / "lm", attn_implementation="eager").eval()
    asked = {"a": "user a assistant", "b c d": "user b c d assistant"}
    want = []
    for text in asked.values():
        ids = torch.tensor([TOKENIZER.encode(text)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        want.append(TOKENIZER.decode(out[0, ids.shape[1] :].tolist()))
    assert answers(writer(made / "lm"), *asked) == want and len(set(want)) == 2 and all(want)


def test_a_run_answers_by_its_newest_checkpoint_or_by_a_step(made, tmp_path):
    for step in (2, 4):
        save_model(tmp_path / str(step), MODEL, policy_of(step), dataclasses.replace(TOKENIZER, settings={
            **TOKENIZER.settings, "chat_template": TEMPLATE}))  # fmt: skip
    want = {step: answers(writer(tmp_path / str(step)), "a", "b") for step in (2, 4)}
    assert answers(writer(made / "whole"), "a", "b") == want[4] != want[2]
    assert answers(writer(made / "whole", step=2), "a", "b") == want[2]


def test_an_adapter_on_its_base_answers_as_the_run_that_trained_it(made, tmp_path):
    save_adapter(tmp_path / "adapter", MODEL, LORA, policy_of(4, LORA))
    with_adapter = answers(writer(made / "lm", adapter=tmp_path / "adapter"), "a", "b c")
    assert with_adapter == answers(writer(made / "lora"), "a", "b c") != answers(writer(made / "lm"), "a", "b c")
    save_adapter(tmp_path / "named", MODEL, LORA, policy_of(4, LORA), base_name=str(made / "lm"))
    assert with_adapter == answers(writer(tmp_path / "named"), "a", "b c")


def test_the_same_random_numbers_whatever_the_batch_and_its_padding(made, prompts, tmp_path):
    rows = []
    for name, settings in {"x": {"batch_size": 1}, "y": {"batch_size": 5}, "z": {"seed": 1}}.items():
        main(config(made, prompts=str(prompts), out=tmp_path / name, **settings))
        rows.append([row["answers"] for row in written(tmp_path / name)])
    assert rows[0] == rows[1] != rows[2]


def test_a_model_against_itself_gives_the_same_answers_and_against_another_its_own(made, prompts, tmp_path):
    alone = config(made, prompts=str(prompts), out=tmp_path / "lm", model=str(made / "lm"))
    main(alone)
    main(config(made, prompts=str(prompts), out=tmp_path / "same", against=str(made / "whole")))
    main(config(made, prompts=str(prompts), out=tmp_path / "both", against=str(made / "lm")))
    same, both, lm = (written(tmp_path / name) for name in ("same", "both", "lm"))
    assert all(row["answers"][0] == row["answers"][1] for row in same)
    assert [row["answers"][0] for row in both] == [row["answers"][0] for row in same]
    assert [row["answers"][1] for row in both] == [row["answers"][0] for row in lm]
    assert any(row["answers"][0] != row["answers"][1] for row in both)
    assert both[0]["generators"] == [f"{made / 'whole'} step 4", str(made / "lm")]


def test_the_file_is_one_that_the_judge_reads(made, prompts, tmp_path, capsys):
    main(config(made, prompts=str(prompts), out=tmp_path / "out.jsonl", against=str(made / "lm")))
    questions, bad = read_questions(tmp_path / "out.jsonl")
    assert not bad and [q.prompt for q in questions] == ["a", "b c d", "e e e e", "f g", "h", "a b"]
    assert all(len(q.answers) == len(q.generators) == 2 for q in questions)
    shown = capsys.readouterr()
    assert shown.out == "" and "6 of 6 prompts are answered in" in shown.err


def test_answers_that_are_cut_are_counted(made, prompts, tmp_path, capsys):
    main(config(made, prompts=str(prompts), out=tmp_path / "out.jsonl", max_new_tokens=24))
    of = writer(made / "whole", SamplingConfig(24))
    cut = sum(not answer.finished for answer in of.answer(of.read(read_records(str(prompts))).records, 0, 6))
    assert 0 < cut < 6 and f"step 4: {cut} of 6 answers are cut at max_new_tokens" in capsys.readouterr().err


def test_a_run_is_asked_as_it_was_trained_unless_options_say_otherwise(made, tmp_path):
    write_run(tmp_path / "run", made / "lm", system="h h")
    asked = lambda **settings: generate._writers(config(made, model=str(tmp_path / "run"), **settings))[0].read(
        FileRecords(({"prompt": "a"},), ("?",))
    )
    ids = lambda text: TOKENIZER.encode(text)
    assert asked().records[0]["tokens"] == ids("system h h user a assistant")
    assert asked(system="").records[0]["tokens"] == ids("user a assistant")
    assert asked(system="", template="plain").records[0]["tokens"] == [TOKENIZER.bos_id, *ids("a")]


def test_a_run_is_asked_by_the_chat_template_that_it_was_trained_with(tmp_path):
    lm = write_lm(tmp_path / "lm", template=f"{TEMPLATE}{{{{ word }}}}")
    (tmp_path / "other.jinja").write_text(f"b {TEMPLATE}")
    for name, chat in {"run": ChatConfig("", ("word=h",)), "other": ChatConfig(str(tmp_path / "other.jinja"))}.items():
        write_run(tmp_path / name, lm, chat=chat)
    export.main(export.ExportConfig(str(tmp_path / "run"), tmp_path / "exported"))

    def asked(model: str, *variables: str, **settings: str) -> str:
        chat = ChatConfig(settings.pop("template", ""), variables)
        last = generate._writers(config(tmp_path, model=str(tmp_path / model), chat=chat, **settings))[-1]
        return TOKENIZER.decode(last.read(FileRecords(({"prompt": "a"},), ("?",))).records[0]["tokens"])

    assert asked("lm") == "user a assistant"
    assert asked("run") == asked("exported") == "user a assistant h"
    assert asked("other") == "b user a assistant"
    assert (
        asked("run", "word=g")
        == asked("lm", "word=g")
        == asked("run", "word=g", against=str(lm))
        == "user a assistant g"
    )
    assert asked("run", template=str(tmp_path / "other.jinja")) == "b user a assistant"
    with pytest.raises(UserError, match=r"other step 4: .*other\.jinja: the chat template takes no variable word"):
        asked("other", "word=g")


def test_all_devices_answer_alike(made, prompts, tmp_path):
    main(config(made, prompts=str(prompts), out=tmp_path / "one"))
    main(config(made, prompts=str(prompts), out=tmp_path / "all", parallel=ParallelConfig()))
    assert jax.local_device_count() == 8
    assert written(tmp_path / "one") == written(tmp_path / "all")


def test_ctrl_c_keeps_the_answers_that_there_are(made, tmp_path):
    def rows():
        yield Row("a", [Answer("b", True)])
        yield Row("c", [Answer("d", False)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate._write(tmp_path / "out", rows(), [writer(made / "lm")], 9)
    assert [row["answers"] for row in written(tmp_path / "out")] == [["b"], ["d"]]


# ---- On the terminal


def typed(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_typed_conversation_is_kept_until_it_starts_over(made, monkeypatch, capsys):
    typed(monkeypatch, "a", "", "b", "/new", "b")
    main(config(made, temperature=0.0))
    shown = [line.removesuffix(" [cut at max_new_tokens]") for line in capsys.readouterr().out.splitlines()]
    of = writer(made / "whole")
    first = answers(of, "a")[0]
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": first}, {"role": "user", "content": "b"}]
    second, alone = answers(of, said)[0], answers(of, "b")[0]
    assert shown == [first, second, alone] and second != alone


def test_each_of_two_goes_on_with_its_own_answers(made, monkeypatch, capsys):
    typed(monkeypatch, "a", "b")
    main(config(made, temperature=0.0, against=str(made / "lm"), max_new_tokens=4))
    shown = capsys.readouterr().out
    of, other = writer(made / "whole", SamplingConfig(4, 0.0)), writer(made / "lm", SamplingConfig(4, 0.0))
    for one in (of, other):
        first = answers(one, "a")[0]
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": first}]
        for text in (first, answers(one, [*said, {"role": "user", "content": "b"}])[0]):
            assert text in shown
    assert shown.index(str(made)[:20]) and shown.count("step 4") == 2


def test_the_same_message_twice_is_answered_with_other_numbers(made, monkeypatch, capsys):
    typed(monkeypatch, *["a", "/new"] * 4)
    main(config(made))
    assert len(set(capsys.readouterr().out.splitlines())) > 1


def test_a_conversation_that_is_too_long_can_start_over(made, monkeypatch, capsys):
    typed(monkeypatch, " ".join("a" * 70), "a")
    main(config(made, temperature=0.0))
    shown = capsys.readouterr()
    assert (
        "this conversation: the prompt has 72 tokens" in shown.err and "which leaves 56; /new starts over" in shown.err
    )
    assert len(shown.out.splitlines()) == 1


EVIL = ("\x1b[31m", "\x1b]0;t\x07", "\x9b2J", "\u202eabc", "\x07", "\x00", "[bold]x[/bold]")


@pytest.mark.parametrize("against", [False, True])
def test_what_a_terminal_would_obey_is_escaped(tmp_path, capsys, against):
    tokenizer = word_level_tokenizer((*EVIL, "a"))
    model = CausalLM(dataclasses.replace(MODEL.config, vocab_size=tokenizer.vocab_size))
    save_model(tmp_path / "lm", model, random_params(model, scale=0.1), tokenizer)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"a \x1b[2J {i}"}) + "\n" for i in range(8)))
    name = str(tmp_path / "lm")
    settings = {"model": name, "against": name if against else "", "prompts": str(tmp_path / "p.jsonl")}
    main(GenerateConfig(**settings, max_new_tokens=20, parallel=ONE))
    shown = capsys.readouterr().out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    flat = re.sub(r"[\s│]", "", shown)
    assert "a\\x1b[2J" in flat and "[bold]x[/bold]" in flat, "markup of the model is text"
    assert against or all(text in flat for text in ("\\x1b[31m", "\\x9b2J", "\\u202eabc", "\\x07", "\\x00"))
    main(GenerateConfig(**settings, max_new_tokens=20, parallel=ONE, out=tmp_path / "out"))
    assert any("\x1b[31m" in row["answers"][0] for row in written(tmp_path / "out")), "a file has the answer itself"


def test_one_prompt_is_printed_with_its_answer(made, capsys):
    main(config(made, prompt="a b", temperature=0.0))
    prompt, answer = capsys.readouterr().out.splitlines()
    assert (
        prompt == "a b" and answer.removesuffix(" [cut at max_new_tokens]") == answers(writer(made / "whole"), "a b")[0]
    )


# ---- Faults

BAD = {
    "no model": ({"model": ""}, "no model to answer: give --model"),
    "no such model": ({"model": "HERE/none/x/y"}, "no model at HERE/none/x/y"),
    "an adapter": ({"model": "HERE/adapter"}, "HERE/adapter/adapter_config.json: base_model_name_or_path is None: write"),
    "no such adapter": ({"model": "HERE/lm", "adapter": "HERE/none"}, "HERE/none: no adapter_config.json there"),
    "adapter of another": ({"model": "HERE/lm", "adapter": "HERE/other"}, "layers.1.mlp.down_proj.lora_A.weight has no place"),
    "step of a model": ({"model": "HERE/lm", "step": 2}, "HERE/lm is not a run's folder: --step chooses a checkpoint of a run"),
    "no such step": ({"step": 9}, "there is no checkpoint of step 9; those that are left are of step 2, 4"),
    "tokenizer of a run": ({"tokenizer": "HERE/lm"}, "is a run, which has its tokenizer: leave --tokenizer out"),
    "no such prompts": ({"prompts": "HERE/none.jsonl"}, "HERE/none.jsonl"),
    "no prompt in a line": ({"prompts": "HERE/bad.jsonl"}, 'HERE/bad.jsonl:2: field "prompt" is missing'),
    "out is a folder": ({"prompt": "a", "out": "HERE"}, "HERE is a folder; --out is a file"),
    "over the prompts": ({"prompts": "HERE/long.txt", "out": "HERE/long.txt"}, "HERE/long.txt holds the prompts, which"),
    "too long": ({"prompts": "HERE/long.txt"}, "HERE/long.txt:2: the prompt has 72 tokens; "),
    "half a character": ({"prompt": "a \ud800"}, "--prompt: half of a Unicode surrogate pair"),
    "no room": ({"prompt": "a", "max_new_tokens": 64}, "nothing is left for a prompt; give a smaller --max-new-tokens"),
    "no template": ({"model": "HERE/plain", "template": "chat", "prompt": "a"}, "HERE/plain: template=chat, but"),
    "system without template": ({"model": "HERE/plain", "system": "x", "prompt": "a"}, "HERE/plain: system is a message"),
    "two sources": ({"prompt": "a", "prompts": "b.txt"}, "give --prompts, a file, or --prompt, one prompt, not both"),
    "out of a conversation": ({"prompt": "", "out": "HERE/x"}, "--out takes the answers to --prompts or --prompt"),
    "out in no folder": ({"prompt": "a", "out": "HERE/none/x"}, "cannot write HERE/none/x"),
    "temperature": ({"temperature": -1.0}, "temperature must be >= 0, not -1.0"),
    "top_p": ({"top_p": 0.0}, "top_p must lie in (0, 1], not 0.0"),
    "batch": ({"batch_size": 0}, "batch_size must be >= 1, not 0"),
    "seed": ({"seed": -1}, "seed must lie in 0 .. 2**32 - 1, not -1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(made):
    (made / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    (made / "long.txt").write_text(f"a\n{' '.join('a' * 70)}\n")
    save_adapter(made / "adapter", MODEL, LORA, policy_of(4, LORA))
    deeper = CausalLM(dataclasses.replace(MODEL.config, num_layers=2))
    shapes = jax.eval_shape(LORA.init, jax.random.key(0), jax.eval_shape(deeper.init, jax.random.key(0)))
    save_adapter(made / "other", deeper, LORA, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))
    return made


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_work_is_one_line(bad, faulty):
    changed, message = BAD[bad]
    here = lambda x: x.replace("HERE", str(faulty)) if isinstance(x, str) else x
    settings = {name: Path(here(x)) if name == "out" else here(x) for name, x in changed.items()}
    if not settings.keys() & {"prompt", "prompts"}:
        settings["prompt"] = "a"
    with pytest.raises(UserError, match=re.escape(here(message))) as error:
        main(config(faulty, **settings))
    assert "\n" not in str(error.value)
