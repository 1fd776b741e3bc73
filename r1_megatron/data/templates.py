"""How a question becomes the text that the policy continues.

``r1_zero`` is the template of DeepSeek-R1-Zero (arXiv 2501.12948v2, table 1). It ends with ``Assistant:`` and names
the tags without opening one: the response itself starts with ``<think>``, and the format reward checks that it does.
``compact`` keeps the shape for small models that cannot read instructions; ``none`` leaves the text alone.

Chat messages (``[{"role": ..., "content": ...}, ...]``) always go through the tokenizer's own chat template, because
only the model's authors know which control tokens it was trained on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from r1_megatron.data.tokenizers import Tokenizer

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {prompt}. Assistant:"
)
COMPACT = "User: {prompt} Assistant:"
TEMPLATES = {"r1_zero": R1_ZERO, "compact": COMPACT, "none": "{prompt}"}

Messages = Sequence[dict[str, Any]]


def render(template: str, prompt: str | Messages, tokenizer: Tokenizer) -> str:
    """The text to tokenize and continue.

    Args:
        template: a key of ``TEMPLATES``; it applies to plain text only.
        prompt: plain text, or chat messages for the tokenizer's chat template.

    Raises:
        ValueError: unknown template, malformed messages, or messages without a chat template.
    """
    if not isinstance(prompt, str):
        return _render_messages(prompt, tokenizer)
    if template not in TEMPLATES:
        raise ValueError(f"data.template: {template!r} is unknown; the templates are {', '.join(TEMPLATES)}.")
    # Not str.format: the prompt may hold braces.
    return TEMPLATES[template].replace("{prompt}", prompt)


def chat_template(template: str) -> str:
    """The template in Jinja, for tokenizers that have none: the last message is the prompt. What an exported model's
    ``apply_chat_template`` renders is then what it was trained on."""
    return TEMPLATES[template].replace("{prompt}", "{{ messages[-1]['content'] }}")


def check_messages(messages: Any) -> str | None:
    """What is wrong with a list of chat messages, or ``None``."""
    if not isinstance(messages, list) or not messages:
        return "expected text or a list of {role, content} messages"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} is not an object with a role"
        if not isinstance(message.get("content"), str):
            return f"message {number} ({message['role']}) has no text content"
    return None


def _render_messages(messages: Messages, tokenizer: Tokenizer) -> str:
    problem = check_messages(messages)
    if problem:
        raise ValueError(f"chat messages: {problem}.")
    source = tokenizer.chat_template
    if source is None:
        raise ValueError(
            "the prompt is a list of chat messages, but the tokenizer has no chat template. Give the prompt as text, "
            "or a Hugging Face tokenizer whose tokenizer_config.json holds chat_template."
        )
    import jinja2

    try:
        return _compile(source).render(messages=messages, add_generation_prompt=True, **tokenizer.special_tokens)
    except jinja2.TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> Any:
    """A chat template comes with downloaded weights: it runs in jinja2's sandbox, without access to Python objects."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        import jinja2

        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source)
