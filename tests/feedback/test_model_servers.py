"""The API judge against servers with a real language model behind them: the stories260K model.

- a small server around this project's own model, which returns log-probabilities like the older /completions API and
  like the chat API;
- llama.cpp's, through `python -m llama_cpp.server` (packages llama-cpp-python[server] and gguf, built from source; the
  variable LLAMA_CPP_PYTHON names an interpreter that has them): log-probabilities too. What the judge records is compared
  with this project's own computation on the same weights;
- `transformers serve`: it refuses requests for log-probabilities, so verdicts are read from words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.data.tokenizers import load_tokenizer
from rlaif_jax.feedback.api.builtin_templates import CRITIQUE
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import ApiJudge, Outcome
from rlaif_jax.feedback.api.template_files import parse_template
from rlaif_jax.feedback.api.templates import Question
from rlaif_jax.feedback.api.verdicts import choice_distribution
from rlaif_jax.models.hf.files import load_model, save_model
from tests.data.llama2c_vocabulary import to_tokenizer_json
from tests.feedback.api_server import serve
from tests.feedback.model_servers import Shared, llama_cpp_python, llama_cpp_server, running, stories_gguf

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")
NextToken = Callable[[str], list[tuple[str, float]]]

# What a model of children's stories can be asked: how it goes on.
FEELING = parse_template(
    """form: ranking
labels: happy = first, sad = second
[user]
{prompt} Lily saw {answer_1} and {answer_2}.
[direct]
She was very""",
    "feeling",
)
QUESTIONS = [
    Question("One day,", ("a big dog", "a bird")),
    Question("It was dark.", ("her mom", "a wolf")),
    Question("Tom was sick.", ("a cake", "his toys")),
]


@pytest.fixture(scope="module")
def stories() -> NextToken:
    """(text) -> every token with its log-probability after the text, by this project's own model."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not (shared / "lm_stories260k_hf").exists():
        pytest.skip("needs the real data folder lm_stories260k_hf, which is not part of this repository")
    model, params = load_model(shared / "lm_stories260k_hf")
    tokenizer = load_tokenizer(shared / "lm_stories260k" / "tok512.bin")
    logits = jax.jit(model.__call__)
    pieces = [piece.decode(errors="replace") for piece in tokenizer.pieces]  # type: ignore[attr-defined]

    def after(text: str) -> list[tuple[str, float]]:
        ids = tokenizer.encode(text, add_bos=True)
        tokens = jnp.zeros((1, 128), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        mask = (jnp.arange(128) < len(ids))[None]
        logprobs = jax.nn.log_softmax(logits(params, tokens, mask)[0, len(ids) - 1])
        return list(zip(pieces, np.asarray(logprobs, float)))

    return after


def prompt_of(question: Question, order: tuple[int, int]) -> str:
    return FEELING.render(question, order, ending="direct").messages[-1]["content"]


def expected(stories: NextToken, question: Question, order: tuple[int, int]) -> tuple[tuple[float, ...], float]:
    return choice_distribution(stories(prompt_of(question, order)), ["happy", "sad"])


def check(outcomes: list[Outcome], stories: NextToken, tolerance: float) -> None:
    """Every record holds the probabilities that the weights give, in both orders."""
    for outcome, question in zip(outcomes, QUESTIONS):
        for entry in outcome.judgements:
            assert entry.answered, entry.raw
            probabilities, mass = expected(stories, question, entry.shown)
            assert entry.probabilities == pytest.approx(probabilities, abs=tolerance)
            assert entry.label_mass == pytest.approx(mass, abs=0.03)  # all but the rare beginnings below the top 20
        assert outcome.preference is not None and outcome.preference.bias is not None


def ask(url: str, **settings: Any) -> list[Outcome]:
    fixed = {"server": url, "model": "stories", "constrain": "none", "min_mass": 0.1, "timeout_s": 30.0}
    with ApiJudge(ApiConfig(**(fixed | settings))) as judge:
        return judge.judge(QUESTIONS, FEELING)


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_against_this_projects_own_model(api: str, stories: NextToken):
    def behave(body: dict[str, Any], number: int) -> dict[str, Any]:
        text = body["prompt"] if api == "completion" else body["messages"][-1]["content"]
        count = body["logprobs"] if api == "completion" else body["top_logprobs"]
        top = sorted(stories(text), key=lambda entry: -entry[1])[:count]
        usage = {"prompt_tokens": len(text), "completion_tokens": 1, "total_tokens": len(text) + 1}
        if api == "completion":
            logprobs = {"tokens": [top[0][0]], "token_logprobs": [top[0][1]], "top_logprobs": [dict(top)]}
            choice = {"text": top[0][0], "finish_reason": "length", "logprobs": logprobs}
        else:
            tops = [{"token": t, "logprob": p, "bytes": None} for t, p in top]
            choice = {
                "message": {"role": "assistant", "content": top[0][0]},
                "finish_reason": "length",
                "logprobs": {"content": [tops[0] | {"top_logprobs": tops}]},
            }
        return {"choices": [choice], "usage": usage}

    with serve(behave) as server:
        check(ask(server.url, api=api), stories, 0.02)


@pytest.mark.slow
def test_against_llama_cpp(tmp_path: Path, shared_data: Shared, stories: NextToken):
    model = stories_gguf(llama_cpp_python(), shared_data, tmp_path)
    command = llama_cpp_server(model, "stories", context=512)
    with running(command, "/v1/models", tmp_path / "log") as url:
        check(ask(url, api="completion"), stories, 0.02)
        store = tmp_path / "f.sqlite"
        for _ in range(2):
            with ApiJudge(
                ApiConfig(server=url, model="stories", api="completion", min_mass=0.1, constrain="none"), store=store
            ) as judge:
                judge.judge(QUESTIONS, FEELING)
        assert judge.spent.requests == 0 and judge.spent.cached == 6
        with ApiJudge(ApiConfig(server=url, model="stories", max_tokens=16)) as judge:  # the chat API
            [remark] = judge.judge([Question("Hi.", ("Hello.",))], CRITIQUE)
        assert remark.judgements[0].answered and remark.judgements[0].call.completion_tokens == 16


@pytest.mark.slow
def test_against_transformers_serve(tmp_path: Path, shared_data: Shared):
    """No log-probabilities: a story model then gives no verdicts, and says so: unparsed, nothing is made up."""
    command = Path(sys.executable).with_name("transformers")
    if not command.exists():
        pytest.skip("needs transformers[serving]")
    folder = tmp_path / "model"
    model, params = load_model(shared_data("lm_stories260k_hf"))
    tokenizer = load_tokenizer(shared_data("lm_stories260k/tok512.bin"))
    save_model(folder, model, params, tokenizer)
    to_tokenizer_json(tokenizer).save(str(folder / "tokenizer.json"))  # type: ignore[arg-type]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    start = [str(command), "serve", str(folder), "--host", "127.0.0.1", "--device", "cpu"]
    with running(start, "/health", tmp_path / "log") as url:
        short = Question("Say hi.", ("Hi.", "No."))
        for api in ("chat", "completion"):
            config = ApiConfig(server=url, model=str(folder), api=api, max_tokens=8, timeout_s=60.0, attempts=2)  # type: ignore[arg-type]
            with ApiJudge(config) as judge:
                [outcome] = judge.judge([short], REASONED)
                assert [entry.status for entry in outcome.judgements] == ["unparsed"] * 2, outcome.judgements
                assert all(entry.raw and entry.label_mass is None for entry in outcome.judgements)


REASONED = parse_template(
    """form: ranking
labels: A = first, B = second
verdict: So {label}
[user]
{prompt} A: {answer_1} B: {answer_2}
""",
    "reasoned",
)
