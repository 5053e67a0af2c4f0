"""The tool `python -m rlaif_jax judge`: asks a model behind an API and records its judgements.

The questions come from files.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.api import builtin_templates as builtin
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import CUT, ApiJudge, Outcome
from rlaif_jax.feedback.api.limits import Spent
from rlaif_jax.feedback.api.template_files import read_template
from rlaif_jax.feedback.api.templates import Form, Question, split_question
from rlaif_jax.feedback.records.forms import Judgement
from rlaif_jax.files import read_json_lines
from rlaif_jax.progress.display import ProgressDisplay

NAMED_MISSING = 20  # missing judgements that are named on the terminal; the store has them all


@dataclasses.dataclass(frozen=True)
class JudgeConfig(ApiConfig):
    """Judges the answers in files with a model behind an OpenAI-compatible server.

    Questions that have an answer in the store or in the cache are not asked again.

    Attributes:
        items: JSONL files: {"prompt": ..., "answers": [..., ...]} a line, and optionally
            any of the fields "principle", "rubric", "reference", "critique", "generators". A ranking is asked of every pair
            of the answers, in both orders; the other forms of every answer.
        form: the form of the judgements.
        template: your template file, or FILE.jsonl#NAME of a FastChat file; its form counts. None = the
            built-in template.
        show_template: print the built-in template of the form, to copy and change, and do nothing else.
        store: the feedback store that the judgements go into; created if absent.
        report: print the quality report of the store in the end; without items nothing else happens.
    """

    items: tuple[Path, ...] = ()
    form: Form = "ranking"
    template: Path | None = None
    show_template: bool = False
    store: Path = Path("feedback.sqlite")
    report: bool = False


def help_text() -> str:
    """Returns the description of --help: what the tool does, and examples."""
    return (
        "Asks a model behind an OpenAI-compatible server about the answers in files, and records its judgements in a\n"
        "feedback store. A question whose answer is in the store or in the cache is not asked again. `--report` measures\n"
        "how good the judgements of a store are.\n\n"
        "  python -m rlaif_jax judge --server http://127.0.0.1:8000/v1 --model qwen3-8b --items answers.jsonl\n"
        "  python -m rlaif_jax judge --store runs/rlaif/feedback.sqlite --report"
    )


_FIELDS = {"prompt", "answers", "principle", "rubric", "reference", "critique", "generators"}


def read_questions(path: Path) -> tuple[list[Question], list[str]]:
    """Reads a JSONL file of items; returns (questions, one message with its place for each bad line).

    Raises:
        UserError: the file cannot be read.
    """
    return read_json_lines(path, _question)


def _question(values: Any, where: str) -> Question:
    """Checks the fields of an item."""
    require(isinstance(values, Mapping), f"an item is a JSON object, not {str(values)[:60]!r}")
    unknown = sorted(set(values) - _FIELDS)
    require(not unknown, f"an item has no field {', '.join(unknown)}; it has {', '.join(sorted(_FIELDS))}")
    for name in ("prompt", "answers"):
        require(values.get(name) is not None, f"an item needs prompt and answers; {name} is missing or null")
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("answers", "generators"):
            right = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
            require(right, f"{name} must be a list of texts, not {str(value)[:60]!r}")
            built[name] = tuple(value)
        elif value is not None:
            require(isinstance(value, str), f"{name} must be text, not {str(value)[:60]!r}")
            built[name] = value
        try:
            "".join(value or ()).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} holds half of a Unicode surrogate pair") from error
    require(bool(built["answers"]), "answers is empty")
    generators = built.get("generators", ())
    require(
        len(generators) in (0, len(built["answers"])),
        f"generators names {len(generators)} writers of {len(built['answers'])} answers",
    )
    return Question(**built, where=where)


def main(config: JudgeConfig) -> int:
    """Asks the questions, prints a summary and returns the number of missing judgements.

    Raises:
        UserError: no question to ask, or a setting that cannot work.
    """
    if config.show_template:
        print(_builtin_text(config.form), end="")
        return 0
    if not config.items:
        require(config.report, "items is missing: --items FILE.jsonl, or --report for a report of the store alone")
        return 0
    items = _read_items(config.items)
    template = read_template(config.template) if config.template else builtin.template_for(config.form, items)
    questions = [question for item in items for question in split_question(item, template.form)]
    require(bool(questions), f"{', '.join(map(str, config.items))}: there is nothing to ask for a {template.form}")
    total = len(questions) * config.repeats * (2 if template.form == "ranking" else 1)
    seen: Counter[bool] = Counter()  # judgements that are answered (True) and missing (False)
    judge = ApiJudge(config, store=config.store, listener=lambda entry: seen.update([entry.answered]))
    with ProgressDisplay(stderr=True) as display:
        bar = display.add(f"{config.model}: {template.name}", total, unit="judgement")
        try:
            futures = judge.submit(questions, template)
            for done in as_completed(futures):
                done.result()
                used = f"{judge.spent.tokens} tokens, ${judge.spent.usd:.4f}"
                bar.update(seen.total(), f"{seen[False]} missing, {used}")
            outcomes = [future.result() for future in futures]
        except KeyboardInterrupt:
            judge.finish()
            message = f"stopped: {seen[True]} judgements are in {config.store}; the same command goes on"
            print(f"\n{message}", file=sys.stderr)
            raise
        finally:
            bar.close()
            judge.close()
            spent = judge.spent
    print(summarise_outcomes(outcomes, spent))
    print(f"recorded in {config.store}")
    return sum(len(outcome.missing) for outcome in outcomes)


def _read_items(paths: Sequence[Path]) -> list[Question]:
    """Reads all files and prints a message for each bad line."""
    items: list[Question] = []
    bad: list[str] = []
    for path in paths:
        good, wrong = read_questions(path)
        items, bad = items + good, bad + wrong
    for message in bad:
        print(message, file=sys.stderr)
    if bad:
        print(f"{len(bad)} bad lines are left out, {len(items)} good ones asked", file=sys.stderr)
    return items


def _builtin_text(form: Form) -> str:
    """Returns the text of the built-in template, or templates, of a form."""
    return {
        "ranking": builtin.PAIRWISE_TEXT,
        "rating": f"{builtin.RATING_TEXT}\n# ---- where every item has a rubric:\n{builtin.RUBRIC_TEXT}",
        "comment": builtin.CRITIQUE_TEXT,
        "correction": f"{builtin.CORRECTION_TEXT}\n# ---- where every item has a critique:\n{builtin.REVISION_TEXT}",
    }[form]


def summarise_outcomes(outcomes: Sequence[Outcome], spent: Spent) -> str:
    """Summarises outcomes in lines: answered, missing by name and reason, money, position bias.

    Args:
        outcomes: the outcomes of all questions.
        spent: the calls, tokens and money that they used.
    """
    entries = [(outcome.question, entry) for outcome in outcomes for entry in outcome.judgements]
    answered = sum(entry.answered for _, entry in entries)
    ties = sum(entry.status == "tie" for _, entry in entries)
    missing = [(question, entry) for question, entry in entries if not entry.answered]
    kinds = Counter(entry.status for _, entry in missing)
    lines = [
        f"{len(entries)} judgements of {len(outcomes)} questions: {answered} answered"
        + (f" ({ties} ties)" if ties else "")
        + f", {len(missing)} missing"
        + (f" ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})" if missing else "")
    ]
    cut = sum(entry.answered and entry.raw.startswith(CUT) for _, entry in entries)
    if cut:
        lines.append(f"  {cut} of the answered texts break off at max_tokens: --max-tokens raises the limit")
    lines += [f"  missing: {_named(question, entry)}" for question, entry in missing[:NAMED_MISSING]]
    if len(missing) > NAMED_MISSING:
        lines.append(f"  ... and {len(missing) - NAMED_MISSING} more; the store names them all")
    lines.append(
        f'{spent.requests} requests ({spent.retries} retries, {spent.throttled} "too many requests"), '
        f"{spent.cached} replies from the cache; {spent.tokens} tokens, ${spent.usd:.4f}"
    )
    lines += [f"note: {note}" for note in spent.notes]
    preferences = [
        found for outcome in outcomes if len(outcome.question.answers) == 2 and (found := outcome.preference)
    ]
    if preferences:
        same = sum(found.consistent for found in preferences) / len(preferences)
        lines.append(f"both orders prefer the same answer in {100 * same:.1f} % of {len(preferences)} pairs")
        biases = [found.bias for found in preferences if found.bias is not None]
        if biases:
            lines.append(f"position bias: {statistics.fmean(biases):+.3f} log-odds for the answer shown first")
    return "\n".join(lines)


def _named(question: Question, entry: Judgement) -> str:
    """Names a missing judgement and its reason in one line."""
    order = f", shown as {', '.join(str(i + 1) for i in entry.shown)}" if entry.shown else ""
    why = " ".join(entry.raw.split())[:160]
    mass = f"the labels have a probability of {entry.label_mass:.3g}; it said " if entry.label_mass is not None else ""
    return f"{question.where or entry.item[:12]}{order}: {entry.status}: {mass}{why!r}"
