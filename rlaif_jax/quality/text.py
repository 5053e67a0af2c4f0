"""The quality report for people: tables of short text, for the terminal and for the run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_NAME = 40
"""Names of raters and generators are cut to this number of characters, in the middle."""

_KEPT_END = 17  # as long as "(prompt 12345678)"
_SHARES = frozenset(
    (
        "agreement", "longer", "first", "ties", "consistent", "same_position", "same", "distance", "rate",
        "length_controlled", "accuracy", "eta", "ece", "unanswered", "unparsed", "refused", "error", "abstained", "most_common",
        "alone",
    )
)  # columns of shares, written as percentages  # fmt: skip


class Table(NamedTuple):
    """A table of text.

    Attributes:
        title: of the table.
        note: a sentence of explanation, or "".
        head: heads of the columns.
        rows: cells, one for each head.
    """

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def quality_text(report: Mapping[str, Any]) -> str:
    """Returns the report of `quality` as plain text: tables with a blank line between, without colour.

    Names come from outside: characters that a terminal would obey are shown as "?".
    """
    share = f"{100 * report['level']:g} %"
    lines = [
        f"Feedback: {report['used']:,} of {report['records']:,} records count (the others are superseded or retracted); "
        f"{report['prompts']:,} prompts. Brackets: {share} interval over whole prompts.",
        *sentences(report),
    ]
    for table in tables(report):
        widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
        lines += ["", table.title, *([table.note] if table.note else [])]
        for row in (table.head, tuple("-" * width for width in widths), *table.rows):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return "\n".join(lines) + "\n"


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Returns what a reader should know before the tables.

    It is that people are simulated, and which judges are worse than chance against people: the interval of kappa is below 0.
    """
    found = []
    if report["people"] == "simulated":
        found.append('No person has compared answers: "people" below are SIMULATED people.')
    for form, part in report["agreement"].items():
        for row in part["judges"]:
            high = row["kappa"]["high"]
            if high is not None and high < 0:
                name, kappa = clean(row["rater"]), cell(row["kappa"])
                found.append(
                    f"{name} is WORSE THAN CHANCE against people: kappa {kappa} on {row['count']:,} {form}. Its verdicts "
                    "lean to the opposite."
                )
    return found


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of a report of `quality` that have rows."""
    found = [
        _table(
            "Records", "", [row | {"adjudicated": row["adjudicated"] or ""} for row in report["counts"]],
            source="source", form="form", raters="raters", records="records", answered="answered", adjudicated="adjudicated",
        ),
        *_agreement(report["agreement"]),
        _table(
            "Verdicts of each rater",
            "Of the verdicts on pairs: ties; of the rest the share for the longer answer and for the one shown first.",
            report["habits"],
            rater="rater", source="source", count="verdicts", ties="ties", longer="the longer", first="the first",
        ),
        _table(
            "Both orders",
            "Same verdict in both; same position in both; position bias b in nats, 0 = none, + = for what is shown first.",
            report["order"],
            rater="rater", count="pairs", consistent="consistent", same_position="same position", bias="bias b",
        ),
        _table(
            "Asked again",
            "How often the same question has the same answer; of ratings the mean difference, as a share of the scale.",
            report["repeats"],
            rater="rater", form="form", count="questions", same="same", distance="distance",
        ),
        _table(
            "Length",
            "How much more than people a judge prefers an answer that is longer by one standard deviation.",
            report["length_slope"],
            rater="rater", count="pairs", characters="characters", slope="slope",
        ),
        _table(
            "Probabilities against people's verdicts",
            "Brier: 0 is perfect, .25 is always saying one half. ECE: mean distance of confidence and share right, "
            "without what chance adds to it.",
            report["calibration"],
            rater="rater", count="pairs", brier="Brier", ece="ECE",
        ),
        _table(
            "Ratings against people's comparisons",
            "How often the better rated answer is the one that people prefer: (right + ties / 2) / pairs; a tie is two equal "
            "ratings. Pairs on which people are undecided are left out.",
            report["scores"],
            rater="rater", source="source", count="pairs", right="right", wrong="wrong", ties="ties", undecided="undecided",
            accuracy="accuracy",
        ),
        *_wins(report["win_rates"]),
        _reliability(report["raters"]),
        *_missing(report["missing"]),
        _table(
            "Cost",
            "Over all records, the superseded too.",
            [row | {"failed": _failures(row["failures"])} for row in report["cost"]],
            rater="rater", source="source", records="records", answered="answered", failed="failed", cost="cost",
            prompt_tokens="tokens in", completion_tokens="tokens out", median_latency_s="median s",
        ),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def _agreement(parts: Mapping[str, Any]) -> list[Table]:
    found = []
    for form, part in parts.items():
        columns = {"a": "one", "b": "other", "count": form, "agreement": "agree", "kappa": "kappa"}
        if form == "comparisons":
            columns |= {"longer": "always the longer", "first": "always the first"}
            note = (
                "Kappa: 0 is chance. For comparison: how often always taking the longer answer, or the one shown first, "
                "agrees with the other."
            )
        elif form == "labels":
            columns |= {"most_common": "always the most common"}
            note = "Choices among three or more options, compared by what was chosen. Kappa: 0 is chance."
        else:
            columns |= {"correlation": "correlation"}
            note = "Agree: the same value. Kappa with quadratic weights."
        left = part["raters_left_out"]
        more = f" {left:,} pairs of raters with fewer in common are left out." if left else ""
        found += [
            _table(f"Agreement of sources on {form}", note, part["sources"], **columns),
            _table(f"Agreement of raters on {form}", more.strip(), part["raters"], **columns),
            _table(
                f"Judges against people on {form}",
                "People's votes together, or the adjudication alone where there is one, are the truth.",
                part["judges"],
                rater="rater", source="source", count=form, agreement="agree", kappa="kappa",
            ),
            _table(
                f"Krippendorff's alpha on {form}",
                "1 is agreement, 0 chance; among the raters of a source, and of all.",
                part["alpha"],
                source="source",
                count="judged twice or more",
                nominal="nominal",
                ordinal="ordinal",
                interval="interval",
            ),
        ]  # fmt: skip
    return found


def _wins(part: Mapping[str, Any]) -> list[Table]:
    left = f" {part['left_out']} further matches are left out." if part["left_out"] else ""
    rows = [
        row | {"name": f"{clean(row['a'])} against {clean(row['b'])}", "of": row.get("labelled", "")}
        for row in part["rows"]
    ]
    debiased = [row for row in rows if "budget" in row]
    budget = [
        {"name": row["name"], **entry, "alone": f"± {share(entry['alone'])}", "powered": f"± {share(entry['powered'])}"}
        | {"worth": f"{entry['worth']:.0f}"}
        for row in debiased
        for entry in row["budget"]
    ]
    return [
        _table(
            "Win rates",
            "(wins + ties / 2) / n; and at equal lengths (logistic in the length difference)." + left,
            [row for row in rows if "budget" not in row],
            name="match", source="by", count="pairs", rate="win rate", length_controlled="at equal lengths",
        ),
        _table(
            "Win rates of the judge, debiased by people's labels",
            "Right if the labelled pairs are a random part: not those that were chosen because they are hard.",
            debiased,
            name="match", source="by", count="pairs", of="labelled", rate="win rate", alone="labels alone",
            weight="judge's weight",
        ),
        _table(
            "What labels would buy",
            "Half-width of the interval: of labels alone, and with the judge; worth: labels alone that would be as good.",
            budget,
            name="match", labels="labels", alone="alone", powered="with the judge", worth="worth",
        ),
    ]  # fmt: skip


def _reliability(part: Mapping[str, Any]) -> Table:
    return _table(
        "Reliability of raters, people and judges in one model",
        part.get("note", "") or part.get("reason", ""),
        part["rows"],
        rater="rater",
        source="source",
        count="verdicts",
        accuracy="accuracy (Dawid-Skene)",
        eta="right in pairs (Crowd-BT)",
    )


def _missing(parts: Sequence[Mapping[str, Any]]) -> list[Table]:
    rows: list[dict[str, Any]] = []
    for part in parts:
        rows.append(dict(part) | {"what": "all"})
        if part["unanswered"]["value"]:
            rows += [
                dict(row) | {"source": "", "what": f"{row['low']}-{row['high']} characters"}
                for row in part["by_length"]
            ]
            rows += [
                dict(row) | {"source": "", "what": f"by {clean(row['generator'])}"} for row in part["by_generator"]
            ]
    return [
        _table(
            "Questions without an answer",
            "",
            rows,
            source="source", what="answers", count="asked", unanswered="without", unparsed="unparsed", refused="refused",
            error="error", abstained="abstained",
        )
    ]  # fmt: skip


def _failures(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in failures.items()) or "0"


def _table(title: str, note: str, rows: Sequence[Mapping[str, Any]], **columns: str) -> Table:
    """Returns a table with the columns key = head; a column that no row fills is left out.

    What an estimate's "note" says is part of the table's note, and its cell has a "*".
    """
    kept = {key: head for key, head in columns.items() if any(row.get(key) not in (None, "") for row in rows)}
    cells = [row[key] for row in rows for key in kept if isinstance(row.get(key), Mapping)]
    marked = dict.fromkeys(estimate["note"] for estimate in cells if "note" in estimate)
    return Table(
        title,
        " ".join([*([note] if note else []), *(f"* {sentence}." for sentence in marked)]),
        tuple(kept.values()),
        tuple(tuple(cell(row.get(key), key in _SHARES) for key in kept) for row in rows),
    )


def share(value: float) -> str:
    """Returns a share as a percentage: 72.5 %."""
    return f"{100 * value:.1f} %"


def cell(value: Any, is_share: bool = False) -> str:
    """Returns a value of the report as short text; "-" for None and for an estimate without a value.

    Args:
        value: a number, a text, None, or an estimate {"value", "low", "high"}.
        is_share: whether numbers are shares.
    """
    if value is None:
        return "-"
    show = share if is_share else "{:.3f}".format
    if isinstance(value, Mapping):
        if value["value"] is None:
            return "-"
        whole = show(value["value"]) + ("*" if "note" in value else "")
        return whole if value["low"] is None else f"{whole} [{show(value['low'])}, {show(value['high'])}]"
    if isinstance(value, float) and is_share:
        return share(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else clean(str(value))


def clean(name: str) -> str:
    """Returns a name from outside as one that can be printed, cut to `MAX_NAME` in the middle.

    Unprintable characters become "?". Begin and end are kept: names differ in their end, such as two revisions of a judge.
    """
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1 - _KEPT_END]}…{text[-_KEPT_END:]}"
