"""A user's own prompts: read, put into the chat template, and held out in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.chat.records import chat_records
from rlaif_jax.data.prompts import Records, place
from rlaif_jax.data.readers import FileRecords, jsonl_records, plain, plain_text, tfds_records
from rlaif_jax.data.rendering import chat_tokenizer, learned_with_bos
from rlaif_jax.data.tokenizers import Tokenizer

TFDS = "tfds:"

Template = Literal["auto", "chat", "plain"]


class OwnPrompts(NamedTuple):
    """Prompts of a run.

    Attributes:
        training: prompts to learn on.
        held_out: prompts to measure on; none of them is learned on.
        left_out: reason -> number of prompts that are not used.
        add_bos: whether BOS goes before each prompt.
    """

    training: FileRecords
    held_out: FileRecords
    left_out: Mapping[str, int]
    add_bos: bool


def read_prompts(
    source: str,
    tokenizer: Tokenizer,
    *,
    eval_source: str | None,
    held_out: int,
    multiple_of: int,
    template: Template,
    system: str,
    prompt_length: int,
    seed: int,
) -> OwnPrompts:
    """Reads prompts, puts them into the chat template and holds some out.

    Prompts that occur twice are used once, and prompts longer than `prompt_length` are left out; both are counted.

    Args:
        source: a .jsonl, .parquet or .txt file, or tfds:NAME/SPLIT.
        tokenizer: the policy's.
        eval_source: held-out prompts; None: `held_out` of the prompts, drawn by `seed`.
        held_out: number of held-out prompts.
        multiple_of: devices, which share the held-out prompts: their number is rounded down to a multiple of these.
        template: auto: the chat template where the tokenizer has one; chat: it must have one; plain: no template.
        system: the system message of conversations without one; "" = none.
        prompt_length: P, most tokens of a prompt.
        seed: of the draw.

    Raises:
        UserError: a file cannot be read, a chat template is missing or does not take a conversation, or too few prompts
            are left.
    """
    chat, add_bos = prompt_style(tokenizer, template, system)
    left_out: dict[str, int] = {}

    def fitting(name: str, known: frozenset[str] = frozenset()) -> FileRecords:
        records = read_records(name)
        return _fitting(
            chat_records(records, tokenizer, system=system, template=chat),
            tokenizer,
            prompt_length,
            add_bos,
            left_out,
            known,
        )

    found = fitting(source)
    if eval_source is not None:
        measured = fitting(eval_source, frozenset(_key(record) for record in found.records))
        training, held = found, _rows(measured, range(min(held_out, len(measured)) // multiple_of * multiple_of))
    else:
        require(
            len(found) > held_out,
            f"{source}: {len(found)} prompts are left{_reasons(left_out)}, and held_out={held_out} of them are only measured "
            "on: give more prompts or a smaller held_out",
        )
        order, held_out = (
            np.random.default_rng((seed, 14)).permutation(len(found)),
            held_out // multiple_of * multiple_of,
        )
        held, training = (_rows(found, sorted(part)) for part in (order[:held_out], order[held_out:]))
    least = max(multiple_of, 2)
    require(
        len(held) >= least,
        f"{eval_source or source}: {len(held)} held-out prompts are left{_reasons(left_out)}; {least} are needed at least",
    )
    return OwnPrompts(training, held, left_out, add_bos)


def prompt_style(tokenizer: Tokenizer, template: Template, system: str) -> tuple[bool, bool]:
    """Returns (whether prompts are read in the chat template, whether BOS goes before others).

    Args:
        tokenizer: the policy's.
        template: auto: the chat template where the tokenizer has one; chat: it must have one; plain: no template.
        system: the system message of conversations without one; "" = none.

    Raises:
        UserError: a chat template is asked for, or needed by a system message, and the tokenizer has none.
    """
    has_template = chat_tokenizer(tokenizer) is not None
    chat = has_template if template == "auto" else template == "chat"
    require(
        not chat or has_template,
        "template=chat, but the tokenizer's files have no chat template: take the model's chat version, or template=plain",
    )
    require(
        chat or not system,
        "system is a message of a chat, and this model has no chat template: put it into the prompts",
    )
    return chat, not chat and learned_with_bos(tokenizer)


def read_records(name: str) -> Records:
    """Returns the records of a .jsonl, .parquet or .txt file (a prompt a line), or of tfds:NAME/SPLIT.

    Raises:
        UserError: it cannot be read; the message names it.
    """
    if name.startswith(TFDS):
        data_set, _, split = name.removeprefix(TFDS).rpartition("/")
        require(bool(data_set), f"prompts {name!r}: expected tfds:NAME/SPLIT, such as tfds:imdb_reviews/train")
        return tfds_records(data_set, split)
    path = Path(name)
    if path.suffix == ".txt":
        lines = plain_text(path).split("\n")
        kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        return FileRecords(tuple({"prompt": line} for _, line in kept), tuple(f"{path}:{number}" for number, _ in kept))
    return jsonl_records(path)


def _key(record: Mapping[str, object]) -> str:
    return str(record.get("model_text", record["prompt"]))


def _rows(records: FileRecords, rows: Sequence[int] | range) -> FileRecords:
    return FileRecords(tuple(records.records[i] for i in rows), tuple(records.places[i] for i in rows))


def _reasons(left_out: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} left out: {reason}' for reason, count in left_out.items())})" if left_out else ""


def _fitting(
    records: FileRecords,
    tokenizer: Tokenizer,
    length: int,
    add_bos: bool,
    left_out: dict[str, int],
    known: frozenset[str],
) -> FileRecords:
    """Returns the records that fit and are new; counts the others in `left_out`."""
    kept, seen = [], set(known)
    for index in range(len(records)):
        text = _key(plain(records[index]))
        templated = "model_text" in records[index]
        reason = ""
        if text in seen:
            reason = "the same prompt once more"
        elif len(tokenizer.encode(text, add_bos=add_bos and not templated)) > length:
            reason = f"longer than train.prompt_length ({length} tokens)"
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            kept.append(index)
            seen.add(text)
    require(bool(kept), f"{place(records, 0)}: no prompt is left{_reasons(left_out)}")
    return _rows(records, kept)
