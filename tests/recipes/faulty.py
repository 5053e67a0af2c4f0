"""A folder with one fault of each kind, and how a tool ends on it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rlaif_jax.__main__ import tool
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.hf.adapters import save_adapter
from rlaif_jax.models.hf.classifiers import save_reward_model
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.models.lora import LoRAConfig
from tests.helpers import random_params
from tests.recipes.test_rlaif import MODEL, TEMPLATE, TOKENIZER

REWARDS = """
from pathlib import Path
calls = 0

def count_a(answer):
    return answer.split().count("a")

def raises(answer):
    raise ValueError("no such thing")

def not_a_number(answer):
    return float("nan")

def text(answer):
    return "good"

def seven(answer):
    return 7

def two_answers(first, second):
    return 1

def fussy(answer):
    words = set(answer.split())
    if words & {"b", "E", "user"}:
        raise ValueError("no b, please")
    return float("nan") if words & {"c", "F"} else "good" if words & {"d", "G"} else len(words)

def breaks(completions):
    global calls
    calls += 1
    if calls > int(Path(__file__).with_name("calls").read_text()):
        raise OSError("the disk of the reference answers has gone")
    return [len(text) for text in completions]
"""
HANG, EAT = (f"\n```python\n{code}\n```\n" for code in ("while True: pass", "x = bytearray(10**12)"))
BASE = {
    "--policy": "HERE/lm", "--prompts": "HERE/prompts.txt", "--feedback": "'function HERE/rewards.py:count_a'",
    "--out": "OUT", "--held-out": "8", "--scale-answers": "8", "--train.steps": "1", "--train.prompts-per-step": "8",
    "--ppo.answers-per-prompt": "2", "--train.prompt-length": "8", "--sampling.max-new-tokens": "6",
}  # fmt: skip
TOOLS = {"train": BASE, "sft": {"--model": "HERE/lm", "--max-length": "64"}}
TOOLS["reward-model"] = TOOLS["sft"]


def edited(file: str, **changed) -> Callable[[Path], None]:
    """Returns an edit of a JSON file in a folder; None removes an entry."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / file).read_text()) | changed
        (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit


def templated(template: str) -> Callable[[Path], None]:
    return edited("tokenizer_config.json", chat_template=template)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_end(folder: Path) -> None:
    edited("tokenizer_config.json", eos_token=None)(folder)
    edited("config.json", eos_token_id=None)(folder)


def with_code_and_without_padding(folder: Path) -> None:
    """Two words become programs, and no file names a token of padding."""
    edited("tokenizer_config.json", pad_token=None)(folder)
    edited("config.json", pad_token_id=None)(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    names = {"A": HANG, "B": EAT}
    values["model"]["vocab"] = {names.get(word, word): index for word, index in values["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(values))


FAULTY = {
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "config": lambda folder: (folder / "config.json").write_text("{"),
    "family": edited("config.json", model_type="mamba"),
    "shape": edited("config.json", hidden_size=32),
    "cut": cut,
    "no_tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no_end": without_end,
    "plain": edited("tokenizer_config.json", chat_template=None),
    "undefined": templated("{{ nothing.there }}"),
    "reach": templated("{{ ''.__class__.__mro__ }}"),
    "unclosed": templated("{% for m in messages %}"),
    "endless": templated("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "code": with_code_and_without_padding,
}
FILES = {
    "rewards.py": REWARDS,
    "syntax.py": "def f(:\n",
    "imports.py": "import nothing_there\n",
    "prompts.txt": "".join(f"{x} {y}\n" for x in "abcdefgh" for y in "abcdefgh"),
    "coded.jsonl": "".join(
        json.dumps(
            {"prompt": f"{x} {y}", "tests": "assert f() == 1", "slow": r"^((\w|\s|.)+)+[XY]$" if x in "ab" else "a"}
        )
        + "\n"
        for x in "abcdefgh"
        for y in "abcdefgh"
    ),
    "long.txt": "a b c d e f g h a b\n",
    "blank.txt": "\n\n",
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a"}\n{"prompt": \n',
    "steps.json": '{"train": {"steps": -5}}',
    "list.json": '[{"text": "a"}]\n',
    "lines.json": '{\n "text": "a"\n}\n',
    "unnamed.jsonl": '{"question": "a"}\n',
    "number.jsonl": '{"prompt": 3}\n',
    "no_formula.toml": 'name = "a"\n[[rule]]\nname = "short"\nlength = "words"\nat_most = 3\n',
    "broken.toml": "name = \n",
    "schema.json": '{"type": 3}',
    "template.txt": "form: ranking\nlabels: A = first, B = second\n[user]\n{prompt} {answer_1} {answer_2}\n[direct]\nA or B?\n",
}


def write_inputs(here: Path) -> None:
    """Writes a chat model, copies of it with one fault each, and files of prompts and rewards."""
    for name, content in FILES.items():
        (here / name).write_text(content)
    (here / "latin.txt").write_bytes(b"\xff\xfea\n")
    (here / "cut.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 40)
    (here / "word.gguf").write_bytes(b"hello")
    tokenizer = dataclasses.replace(TOKENIZER, settings={**TOKENIZER.settings, "chat_template": TEMPLATE})
    params = random_params(MODEL, scale=0.2)
    save_model(here / "lm", MODEL, params, tokenizer)
    for name, edit in FAULTY.items():
        shutil.copytree(here / "lm", here / name)
        edit(here / name)
    params["trunk"]["layers_0"]["q"]["kernel"][0, 0] = np.nan
    save_model(here / "nan", MODEL, params, tokenizer)
    small = CausalLM(dataclasses.replace(MODEL.config, vocab_size=10))
    save_model(here / "small", small, random_params(small))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(here / "lm" / name, here / "small" / name)
    scorer = ScalarModel(MODEL.config, "normal", bias=False)
    scores = random_params(scorer)
    save_reward_model(here / "rm", scorer, scores, tokenizer)
    jax.tree.leaves(scores)[0].flat[0] = np.inf
    save_reward_model(here / "infinite", scorer, scores, tokenizer)
    deeper, lora = CausalLM(dataclasses.replace(MODEL.config, num_layers=2)), LoRAConfig(rank=2)
    save_adapter(here / "adapter", deeper, lora, lora.init(jax.random.key(0), random_params(deeper)), base_name="deep")


# ---- Tools


def arguments(name: str, line: str, here: Path, out: Path) -> list[str]:
    """Returns a tool's arguments: those of a line, and for options that it does not have those that work."""
    words, options = shlex.split(line), {word for word in shlex.split(line) if word.startswith("--")}
    given = [f"{option} {value}" for option, value in TOOLS.get(name, {}).items() if option not in options]
    words = [*shlex.split(" ".join(given)), *words]
    return [word.replace("HERE", str(here)).replace("OUT", str(out)) for word in words]


def ended(name: str, given: list[str], capsys) -> tuple[int, list[str]]:
    """Runs a tool in this process; returns its exit status and what it said on the standard error."""
    try:
        tool([name, *given])
        status = 0
    except SystemExit as end:
        status = end.code
    return status, [line for line in capsys.readouterr().err.splitlines() if " loading" not in line]


def is_one_line(status: int, said: list[str], message: str, here: Path, out: Path) -> None:
    assert status == 2 and len(said) == 1, said
    assert said[0].startswith("error: ") and message.replace("HERE", str(here)).replace("OUT", str(out)) in said[0]
