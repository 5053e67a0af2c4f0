"""`python -m rlaif_jax judge`: put the questions of a file to a model behind an API, record its judgements."""

from __future__ import annotations

import dataclasses
import json
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
from rlaif_jax.feedback.api.judge import JudgeClient, Outcome
from rlaif_jax.feedback.api.templates import Form, Question, read_template, single
from rlaif_jax.feedback.api.transport import Spent
from rlaif_jax.feedback.records.forms import Judgement
from rlaif_jax.progress import ProgressDisplay

NAMED_MISSING = 20  # so many are named on the terminal; the store has them all


@dataclasses.dataclass(frozen=True)
class JudgeConfig(ApiConfig):
    """Judge the answers in files with a model behind an OpenAI-compatible server. What is answered is not asked again.

    Attributes:
        items: JSONL files: {"prompt": ..., "answers": [..., ...]} a line, and if wanted "principle", "rubric",
          "reference", "critique", "generators". A ranking is asked of every pair of the answers, in both orders; the
          other forms of every answer.
        form: what to ask for.
        template: a template file of your own, or FILE.jsonl#NAME of a FastChat file; its form counts. None: the built-in one.
        show_template: print the built-in template of the form, to copy and change, and do nothing else.
        store: the feedback store that the judgements go into; created if absent.
        report: print the quality report of the store in the end; without items that is all that happens.
    """

    items: tuple[Path, ...] = ()
    form: Form = "ranking"
    template: Path | None = None
    show_template: bool = False
    store: Path = Path("feedback.sqlite")
    report: bool = False


_FIELDS = {"prompt", "answers", "principle", "rubric", "reference", "critique", "generators"}


def read_questions(path: Path) -> tuple[list[Question], list[str]]:
    """(the good questions of a JSONL file, one message with file and line for each bad line). UserError if it cannot be
    read."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    good: list[Question] = []
    bad: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            good.append(_question(json.loads(line.decode()), where))
        except UserError as error:
            bad.append(f"{where}: {error}")
        except (ValueError, RecursionError) as error:
            bad.append(f"{where}: no valid JSON ({error})")
    return good, bad


def _question(values: Any, where: str) -> Question:
    require(isinstance(values, Mapping), f"an item is a JSON object, not {str(values)[:60]!r}")
    unknown = sorted(set(values) - _FIELDS)
    require(not unknown, f"an item has no field {', '.join(unknown)}; it has {', '.join(sorted(_FIELDS))}")
    require("prompt" in values and "answers" in values, "an item needs prompt and answers")
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
    """Ask, show progress, say what came of it; the number of judgements that are missing.

    Raises UserError where there is nothing to ask, or the server answers nothing at all.
    """
    if config.show_template:
        print(_builtin_text(config.form), end="")
        return 0
    if not config.items:
        require(config.report, "items is missing: --items FILE.jsonl, or --report for a report of the store alone")
        return 0
    questions: list[Question] = []
    bad: list[str] = []
    for path in config.items:
        good, wrong = read_questions(path)
        questions, bad = questions + good, bad + wrong
    for message in bad:
        print(message, file=sys.stderr)
    if bad:
        print(f"{len(bad)} bad lines are left out, {len(questions)} good ones asked", file=sys.stderr)
    template = read_template(config.template) if config.template else builtin.template_for(config.form, questions)
    asked = [one for question in questions for one in single(question, template.form)]
    require(bool(asked), f"{', '.join(map(str, config.items))}: there is nothing to ask for a {template.form}")
    total = len(asked) * config.repeats * (2 if template.form == "ranking" else 1)
    seen: Counter[bool] = Counter()  # judgements that are answered (True) and missing (False)
    with ProgressDisplay(stderr=True) as display:
        bar = display.add(f"{config.model}: {template.name}", total, unit="judgement")
        client = JudgeClient(config, store=config.store, listener=lambda entry: seen.update([entry.answered]))
        try:
            futures = client.submit(asked, template)
            for done in as_completed(futures):
                done.result()
                used = f"{client.spent.tokens} tokens, ${client.spent.usd:.4f}"
                bar.update(seen.total(), f"{seen[False]} missing, {used}")
            outcomes = [future.result() for future in futures]
        except KeyboardInterrupt:
            print(
                f"\nstopped: {seen[True]} judgements are in {config.store}; the same command goes on", file=sys.stderr
            )
            raise
        finally:
            bar.close()
            client.close()
            spent = client.spent
    print(summary(outcomes, spent))
    print(f"recorded in {config.store}")
    return sum(len(outcome.missing) for outcome in outcomes)


def _builtin_text(form: Form) -> str:
    if form == "ranking":
        return builtin.PAIRWISE_TEXT
    if form == "rating":
        return f"{builtin.RATING_TEXT}\n# ---- where every item has a rubric:\n{builtin.RUBRIC_TEXT}"
    if form == "comment":
        return builtin.CRITIQUE_TEXT
    return f"{builtin.CORRECTION_TEXT}\n# ---- where every item has a critique:\n{builtin.REVISION_TEXT}"


def summary(outcomes: Sequence[Outcome], spent: Spent) -> str:
    """What came of it, in lines: answered, missing by name and reason, money, position bias."""
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
    lines += [f"  missing: {_named(question, entry)}" for question, entry in missing[:NAMED_MISSING]]
    if len(missing) > NAMED_MISSING:
        lines.append(f"  ... and {len(missing) - NAMED_MISSING} more; the store names them all")
    lines.append(
        f'{spent.requests} requests ({spent.retries} retries, {spent.throttled} "too many requests"), '
        f"{spent.kept} replies from the cache; {spent.tokens} tokens, ${spent.usd:.4f}"
    )
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
    order = f", shown as {', '.join(str(i + 1) for i in entry.shown)}" if entry.shown else ""
    why = " ".join(entry.raw.split())[:160]
    mass = f"the labels have a probability of {entry.label_mass:.3g}; it said " if entry.label_mass is not None else ""
    return f"{question.where or entry.item[:12]}{order}: {entry.status}: {mass}{why!r}"
