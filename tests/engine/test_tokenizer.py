"""E8: the tokenizer and the chat template, as transformers runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from raytier.checkpoint.manifest import TokenizerSpec
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import InvalidRequestError

CHATML = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + \
'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA31 = """{{- bos_token }}
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
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- generation %}
        {%- if message.reasoning_content is string and loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
    {%- if loop.index0 > 20 %}{%- break %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": 'Hi <b>&amp; "you"\'s 日本 😀'}],
    [
        {"role": "user", "content": "  one\n"},
        {"role": "assistant", "content": "two "},
        {"role": "user", "content": "\tthree"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Sunny", "reasoning": "it is warm", "tool_calls": None},
    ],
    [{"role": "user", "content": "x", "name": None}, {"role": "assistant", "content": "y", "thinking": "\nhm\n"}],
]
TOOLS = [{"type": "function", "function": {"name": "get <x> & 'y'", "description": "Größe", "parameters": {"a": [1]}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def backend() -> Backend:
    words = ["<unk>", "<s>", "</s>", "hello", "world", "[INST]"]
    tokenizer = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def spec(template: str | None = CHATML, **changes: Any) -> TokenizerSpec:
    return replace(TokenizerSpec(backend().to_str(), template, dict(SPECIAL), 1, (2,)), **changes)


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend(), **SPECIAL)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA31, MISTRAL, QWEN3])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_templates_render_as_in_transformers(
    transformers_tokenizer: Any, template: str, conversation: list[dict[str, Any]]
) -> None:
    tokenizer = Tokenizer(spec(template))
    compared = 0
    for variables in ({}, {"tools": TOOLS}, {"enable_thinking": False, "date_string": "1 Jan 2000"}):
        for generation_prompt in (False, True):
            try:
                expected = transformers_tokenizer.apply_chat_template(
                    conversation,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **variables,
                )
            except Exception as error:
                with pytest.raises(InvalidRequestError, match=str(error)):
                    tokenizer.apply_chat_template(conversation, generation_prompt, **variables)
                continue
            assert tokenizer.apply_chat_template(conversation, generation_prompt, **variables) == expected
            compared += 1
    assert compared == 6 or (template == MISTRAL and conversation[0]["role"] == "system")


def test_content_parts_become_text() -> None:
    tokenizer = Tokenizer(spec("{% for m in messages %}[{{ m.content }}]{% endfor %}"))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}]) == "[one\ntwo]"
    assert tokenizer.apply_chat_template([{"role": "user", "content": []}]) == "[]"
    assert tokenizer.apply_chat_template([{"role": "user", "content": None}]) == "[]"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\] must be an object with a role"),
        ([{"content": "x"}], r"messages\[0\] must be an object with a role"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be a string or a list"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "parts of type text.*'image_url'"),
        ([{"role": "user", "content": ["plain"]}], "parts of type text.*'str'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "parts of type text"),
        ([{"role": "user", "content": "x", "tool": object()}], "JSON values are expected, got a object"),
    ],
)
def test_messages_that_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        Tokenizer(spec()).apply_chat_template(messages)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template: use /v1/completions"),
        (MISTRAL, "refuses these messages: Only user|refuses these messages: Conversation roles must alternate"),
        ("{{ messages[0].missing.attribute }}", "refuses these messages: .*no attribute 'missing'"),
        ("{{ messages[0].content + 1 }}", "fails on these messages: TypeError"),
        ("{% if %}", "refuses these messages: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "underscore"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    tokenizer = Tokenizer(spec(template))
    with pytest.raises(InvalidRequestError, match=message) as refused:
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
    assert refused.value.param == "messages"


def test_request_variables_do_not_replace_the_messages() -> None:
    template = "{{ messages[0].content }} {{ add_generation_prompt }} {{ dict(a=1).a }} {{ dict.fromkeys('ab') }}"
    text = Tokenizer(spec(template)).apply_chat_template([{"role": "user", "content": "x"}], documents=[], other=1)
    assert text == "x True 1 {'a': None, 'b': None}"
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs: JSON values"):
        Tokenizer(spec(template)).apply_chat_template([{"role": "user", "content": "x"}], documents=object())


def test_encode_adds_special_tokens_where_the_model_says_so() -> None:
    tokenizer = Tokenizer(spec())
    assert tokenizer.encode("hello world") == [1, 3, 4]
    assert tokenizer.encode("<s> hello", add_special_tokens=False) == [1, 3]
    assert Tokenizer(spec(add_special_tokens=False)).encode("hello") == [3]
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (6, {1, 2})
    assert tokenizer.decode([1, 3, 4, 2]) == "hello world"
    assert (tokenizer.token(3), tokenizer.token(99)) == ("hello", None)


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    shortening = backend()
    shortening.enable_truncation(2)
    shortening.enable_padding(length=20)
    tokenizer = Tokenizer(spec(tokenizer_json=shortening.to_str()))
    assert tokenizer.encode("hello world hello world") == [1, 3, 4, 3, 4]
