"""Models that answer prompts: loaded from whatever names them, compiled once, asked in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlaif_jax.config import UserError, require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.chat.records import chat_records
from rlaif_jax.data.prompts import Records, bucket_length, padded
from rlaif_jax.data.readers import FileRecords
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf.adapters import load_adapter
from rlaif_jax.models.hf.files import load_with_tokenizer
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig, make_runner
from rlaif_jax.policies.text import answer_texts, make_generator
from rlaif_jax.recipes.own_prompts import Template, prompt_style
from rlaif_jax.tools.runs import Dtype, is_run, load_run_policy
from rlaif_jax.types import SAMPLES, Params, Prompts, step_key


class Loaded(NamedTuple):
    """A model as it was named.

    Attributes:
        name: what people call it.
        model: the model.
        params: its parameters, an adapter merged.
        tokenizer: its tokenizer.
        bos: whether BOS goes before a prompt without a chat template; None: as for a user's own prompts.
    """

    name: str
    model: CausalLM
    params: Params
    tokenizer: Tokenizer
    bos: bool | None = None


class Answer(NamedTuple):
    """An answer as text, and whether it ended before the length limit."""

    text: str
    finished: bool


def load_writer(
    name: str,
    *,
    step: int | None,
    adapter: Path | None,
    tokenizer: Path | None,
    chat: ChatConfig = ChatConfig(),
    dtype: Dtype,
) -> Loaded:
    """Loads a model that answers.

    Args:
        name: a run's folder, a Hugging Face folder, a hub id, a .gguf file or a llama2.c .bin file.
        step: of the run's checkpoint; None: the newest.
        adapter: the folder of an adapter of that model; None: none.
        tokenizer: the tokenizer's file or folder; None: it is with the model.
        chat: the chat template and its variables, where they are not those of the model or of the run.
        dtype: of activations.

    Raises:
        UserError: a file is missing or damaged, or what is named does not fit together.
    """
    folder, bos = Path(name), None
    if is_run(folder):
        require(tokenizer is None, f"{folder} is a run, which has its tokenizer: leave --tokenizer out")
        policy = load_run_policy(folder, step, dtype=dtype)
        model, params, found, bos = policy.model, policy.params, policy.tokenizer, policy.bos
        name = f"{name} step {policy.step}" if policy.step is not None else name
    else:
        require(step is None, f"{name} is not a run's folder: --step chooses a checkpoint of a run")
        model, params, found = load_with_tokenizer(name, tokenizer, compute_dtype=dtype)
    if adapter is not None:
        lora, added = load_adapter(adapter, model)
        params, name = lora.merge(params, added), f"{name} + {adapter}"
    try:
        return Loaded(name, model, params, chat.apply(found), bos)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


class Writer:
    """A loaded model that answers prompts.

    Two writers with the same seed answer a prompt of the same number with the same random numbers.

    Args:
        loaded: the model.
        sampling: how answers are drawn.
        seed: of the random numbers.
        template: whether prompts are read in the chat template; see `own_prompts.prompt_style`.
        system: the system message of conversations without one; "" = none.
        parallel: how the devices are used.

    Raises:
        UserError: no chat template where one is needed, or a length limit that leaves no room for a prompt.
    """

    def __init__(
        self,
        loaded: Loaded,
        sampling: SamplingConfig,
        *,
        seed: int,
        template: Template,
        system: str,
        parallel: ParallelConfig,
    ) -> None:
        self.name, self._tokenizer, self._system = loaded.name, loaded.tokenizer, system
        try:
            self._chat, bos = prompt_style(loaded.tokenizer, template, system)
        except UserError as error:
            raise UserError(f"{loaded.name}: {error}") from error
        self._bos = bos if loaded.bos is None else loaded.bos and not self._chat
        context = loaded.model.config.context_length
        self._room = context - sampling.max_new_tokens
        self._limits = f"{loaded.name} reads {context} tokens, max_new_tokens={sampling.max_new_tokens} of them answers"
        require(self._room > 0, f"{self._limits}: nothing is left for a prompt; give a smaller --max-new-tokens")
        runner = make_runner(parallel, loaded.model.rules)
        self.devices = runner.devices
        self._params = runner.place(loaded.params)
        self._key = step_key(seed, 0, SAMPLES)
        self._generate = make_generator(runner, loaded.model, loaded.tokenizer, sampling)

    def read(self, records: Records) -> FileRecords:
        """Returns the records as this model reads them, with `prompt` for people and `tokens`.

        Args:
            records: see `chat_records`.

        Raises:
            UserError: a record asks nothing or is too long; the message names it.
        """
        read = chat_records(records, self._tokenizer, system=self._system, template=self._chat)
        made = []
        for record, place in zip(read.records, read.places):
            text = record.get("model_text", record["prompt"])
            require(not any("\ud800" <= c <= "\udfff" for c in text), f"{place}: half of a Unicode surrogate pair")
            tokens = self._tokenizer.encode(text, add_bos=self._bos)
            require(bool(tokens), f"{place}: the prompt has no tokens")
            require(
                len(tokens) <= self._room,
                f"{place}: the prompt has {len(tokens)} tokens; {self._limits}, which leaves {self._room}",
            )
            made.append({**record, "tokens": tokens})
        return FileRecords(tuple(made), read.places)

    def answer(self, records: Sequence[dict[str, Any]], first: int, rows: int) -> list[Answer]:
        """Returns an answer to each record of a batch.

        Args:
            records: of `read`, at most `rows`.
            first: the number of the first prompt, from which random numbers are derived.
            rows: of the compiled batch, a multiple of `devices`; records are repeated to fill it.
        """
        chosen = [i % len(records) for i in range(rows)]
        longest = max(len(record["tokens"]) for record in records)
        length = min(bucket_length(longest), self._room)
        tokens, mask = padded([records[i]["tokens"] for i in chosen], length, self._tokenizer.pad_id, "left")
        prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray([first + i for i in chosen], jnp.uint32))
        rollout = self._generate((self._params, self._key), prompts)
        texts, finished = answer_texts(rollout, self._tokenizer), jax.device_get(rollout.finished)
        return [Answer(texts[i], bool(finished[i])) for i in range(len(records))]
