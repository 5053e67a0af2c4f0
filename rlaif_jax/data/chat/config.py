"""The choice of a chat template, and values for the variables that it takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.data.chat.template import named_templates, template_of, with_variables
from rlaif_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from rlaif_jax.data.tokenizer_files import read_text
from rlaif_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How conversations become text, where the model's own chat template leaves a choice.

    Attributes:
        template: the name of one of the model's chat templates, or a file with another one; "" = the model's.
        variables: values for the template, NAME=VALUE, such as enable_thinking=false for Qwen3: VALUE is JSON, else a text.
    """

    template: str = ""
    variables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.values  # which checks them

    @property
    def values(self) -> dict[str, Any]:
        """Returns the variables, name -> JSON value."""
        found: dict[str, Any] = {}
        for line in self.variables:
            name, _, text = line.partition("=")
            require(
                name.isidentifier() and "=" in line,
                f"chat.variables: {line!r} should be NAME=VALUE, such as enable_thinking=false",
            )
            require(name not in found, f"chat.variables: {name} is given twice")
            try:
                found[name] = json.loads(text)
                json.dumps(found[name], allow_nan=False)  # Python reads NaN and Infinity, which are no JSON
            except ValueError:
                found[name] = text
        return found

    def apply(self, tokenizer: Tokenizer) -> Tokenizer:
        """Returns a tokenizer with the chosen template, which `save` writes with the variables in it.

        Args:
            tokenizer: the tokenizer; without any choice it is returned as it is.

        Raises:
            UserError: it has no chat template of this name and there is no such file, or the template is malformed or takes
                no variable of a name.
        """
        if self == ChatConfig():
            return tokenizer
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise UserError("chat.template and chat.variables need a tokenizer with chat templates, a tokenizer.json")
        own, where = tokenizer.settings.get("chat_template"), tokenizer.template_file
        found = named_templates(own)
        if not self.template:
            template = template_of(own, where)
        elif self.template in found:
            template = found[self.template]
        else:
            require(
                Path(self.template).is_file(),
                f"chat.template: {where} has no chat template {self.template} (it has {', '.join(sorted(found)) or 'none'}), "
                "and there is no such file",
            )
            template, where = read_text(Path(self.template)), self.template
            require(bool(template.strip()), f"chat.template: the file {where} is empty")
        template = with_variables(template, self.values, where)
        return dataclasses.replace(
            tokenizer, settings={**tokenizer.settings, "chat_template": template}, template_file=where
        )
