"""Chat templates in the styles of published models, and conversations for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.data.token_folders import byte_tokenizer_folder

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As SmolLM2's and Qwen2.5's: a system message of the template where the conversation has none.
CHATML_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3.2's: headers, BOS, the day, the system message taken off the list, trimmed contents, generation marks.
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
        {%- else %}
            {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# As Llama 2's and Mistral's: [INST], the system message within the first question, roles that must alternate.
INST = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
# As Gemma's: turns, the assistant is called model, and no system message.
TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
# As Zephyr's: plain tags, EOS after each message, lines of the template between the tags.
TAGS = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
# The system message in front of the first question; a namespace, a macro, break and continue, JSON.
FOLDED = """\
{%- macro turn(role, content) -%}
### {{ role | capitalize }}:
{{ content }}

{% endmacro -%}
{%- set ns = namespace(system='', seen=0) -%}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- continue -%}{%- endif -%}
    {%- if loop.index > 20 -%}{%- break -%}{%- endif -%}
    {%- set ns.seen = ns.seen + 1 -%}
    {%- if ns.seen == 1 and ns.system -%}
        {{- turn(m.role, ns.system ~ '\\n' ~ m.content) -}}
    {%- else -%}
        {{- turn(role=m.role, content=m.content) -}}
    {%- endif -%}
{%- endfor -%}
{{- undefined_name }}{{ {'b': messages[-1:], 'a': 'é<'} | tojson(indent=2) }}{{ messages[0] | tojson }}
{%- if add_generation_prompt %}### Assistant:
{% endif %}"""
# As Qwen3's: an empty thought is written for the model where thinking is switched off; earlier thoughts are left out.
THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and loop.index0 > ns.last %}
        {%- set parts = message.content.split('</think>') %}
        {%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + parts[-1].lstrip('\\n') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
STYLES = {
    "ChatML": CHATML,
    "ChatML with a system message": CHATML_SYSTEM,
    "headers": HEADERS,
    "INST": INST,
    "turns": TURNS,
    "tags": TAGS,
    "folded": FOLDED,
    "thinking": THINKING,
}
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>",
)  # fmt: skip


def chat_folder(folder: Path, template: object, **names: Any) -> Path:
    """Writes a tokenizer of bytes, with the special tokens of all styles, and a chat template."""
    named = {"bos_token": "<s>", "eos_token": "</s>", **names, "chat_template": template}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    return byte_tokenizer_folder(folder, *SPECIAL, tokenizer_config=config)


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Returns a conversation that the user begins."""
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return said if system is None else [{"role": "system", "content": system}, *said]


CONVERSATIONS = {
    "question": talk("What is 1 + 1?"),
    "system": talk("q", system="Be <kind> & é."),
    "turns": talk("q", "a", "r", "b", "s", system="Be brief."),
    "assistant last": talk("q", "So, "),
    "empty": talk("", "", "q", system=""),
    "unicode": talk("Ünï → 🎈 \u2028 \u00a0", "漢字", "\u0301e"),
    "braces": talk("{{ messages }} {% raw %} {# x #} {0} %s {}"),
    "spaces": talk("  1 + 1 = \n\n", "\n 2 \n", "\tq\n", system="\n s \n"),
    "quotes": talk("'it' \"is\" \\n </s>\r\n<b>&amp;"),
}
