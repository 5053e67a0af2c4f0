"""Chat templates, against transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer
from tests.data.token_folders import byte_tokenizer_folder

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3's: BOS, trimmed contents, loops with break, a tag of transformers, JSON, and what it refuses.
RICH = (
    "{{ bos_token }}\n{%- for m in messages %}\n{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}\n"
    "    {%- if loop.index > 5 %}{% break %}{% endif %}{% generation %}[{{ m.role }}]{{ m.content | trim }}"
    "{% endgeneration %}{{ eos_token }}{% endfor %}{{ messages[0] | tojson }}"
    "{% if tools is not none %}tools{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be <kind> & é."}, {"role": "user", "content": "  1 + 1 = \n"}]


def chat_folder(folder: Path, template: object) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    return byte_tokenizer_folder(
        folder, "<s>", "</s>", "<|im_start|>", "<|im_end|>",
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **names},
    )  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, RICH])
def test_the_text_and_its_tokens_are_those_of_transformers(tmp_path: Path, template: str):
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(tmp_path, template)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.chat_text(MESSAGES) == text
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text) == ids
    begun = ids if template == RICH else [256, *ids]
    assert ours.encode(text, add_bos=True) == begun, "a template that writes BOS gets no second one"


def test_a_template_of_several_and_one_in_a_file(tmp_path: Path):
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}]
    one = load_tokenizer(chat_folder(tmp_path / "a", CHATML))
    assert load_tokenizer(chat_folder(tmp_path / "b", several)).chat_text(MESSAGES) == one.chat_text(MESSAGES)
    (chat_folder(tmp_path / "c", None) / "chat_template.jinja").write_text(CHATML)
    found = load_tokenizer(tmp_path / "c")
    assert found.chat_text(MESSAGES) == one.chat_text(MESSAGES)
    found.save(tmp_path / "d")
    assert load_tokenizer(tmp_path / "d").chat_text(MESSAGES) == one.chat_text(MESSAGES)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template: a base model continues text"),
        (RICH, "does not take a conversation of tool: no role tool"),
        ("{% for", "does not take a conversation of tool: "),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_what_a_template_cannot_say(tmp_path: Path, template: str | None, said: str):
    tokenizer = load_tokenizer(chat_folder(tmp_path, template))
    with pytest.raises(UserError, match=re.escape(said)):
        tokenizer.chat_text([{"role": "tool", "content": "x"}])
