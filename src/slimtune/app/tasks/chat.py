"""Rows of every supported form as one text plus the spans of it that the loss is taken on.

Forms, the first that the table's columns fit:

* text_column of the configuration: trained whole
* messages: [{role, content}, ...]; conversations: [{from, value}, ...]: trained on the assistant's turns
* prompt, completion (texts, or messages), or question, answer: trained on the second; texts are joined as they are
* instruction, output and perhaps input: a user's and an assistant's message
* text: trained whole

Messages go through the tokenizer's chat template. A tokenizer without one gets, for each message,
`### Role:\\n<content>\\n\\n`, the assistant's content followed by the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.app.tables import Table
from slimtune.app.tasks.base import brief
from slimtune.errors import DataError

PAIRS = (("prompt", "completion"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
FORMS = "text; prompt, completion; question, answer; instruction, output (input); messages; conversations"


@dataclass(frozen=True)
class Sample:
    """Text, the [start, end) character spans to train on (None: everything), and what encoding has to add."""

    text: str
    spans: list[tuple[int, int]] | None
    templated: bool = False


def form_of(table: Table, text_column: str | None) -> tuple[str, ...]:
    """The columns of the form that the table has. Raises DataError listing the forms when there is none."""
    if text_column:
        return (text_column,)
    for form in (("messages",), ("conversations",), *PAIRS, ("instruction", "output"), ("text",)):
        if all(column in table.columns for column in form):
            return form
    raise DataError(
        f"{table.name}: no form of training text fits; columns: {', '.join(table.columns)}; forms: {FORMS}; "
        "or set text_column"
    )


def read_samples(table: Table, form: tuple[str, ...], tokenizer: Any) -> list[Sample]:
    """Every row as a sample. Raises DataError naming the row that does not hold what its form needs."""
    return [_sample(table, i, form, tokenizer) for i in range(len(table))]


def _sample(table: Table, i: int, form: tuple[str, ...], tokenizer: Any) -> Sample:
    row, where = table.row(i), table.where(i)
    if len(form) == 1 and form[0] not in ("messages", "conversations"):
        return Sample(_text(row, form[0], where), None)
    if len(form) == 1:
        return render(read_messages(row[form[0]], f"{where}: '{form[0]}'"), tokenizer, where, row.get("tools"))
    if form == ("instruction", "output"):
        extra = row.get("input")
        asked = _text(row, "instruction", where) + (f"\n\n{extra}" if extra else "")
        messages = [("user", asked), ("assistant", _text(row, "output", where))]
        return render(messages, tokenizer, where)
    prompt, completion = form
    if isinstance(row[prompt], Sequence) and not isinstance(row[prompt], str):
        asked_messages = read_messages(row[prompt], f"{where}: '{prompt}'")
        answer = row[completion]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        answered = read_messages(answer, f"{where}: '{completion}'")
        return render(asked_messages + answered, tokenizer, where, row.get("tools"), first=len(asked_messages))
    before, after = _text(row, prompt, where), _text(row, completion, where)
    return Sample(before + after, [(len(before), len(before) + len(after))])


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(row[column], str):
        found = "nothing" if row[column] is None else type(row[column]).__name__
        raise DataError(f"{where}: '{column}' is {found}; expected text")
    return row[column]


def read_messages(value: Any, where: str) -> list[tuple[str, str]]:
    """[(role, content)] from {role, content} or {from, value} objects; content may be a list of text parts."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: expected a list of messages, found {type(value).__name__}")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} is {type(message).__name__}; expected role and content")
        role, content = (
            (message.get("from"), message.get("value"))
            if "from" in message
            else (message.get("role"), message.get("content"))
        )
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: message {number} has no text in role and content; keys: {list(message)}")
        messages.append((ROLES.get(role, role), content))
    return messages


def render(messages: list[tuple[str, str]], tokenizer: Any, where: str, tools: Any = None, first: int = 0) -> Sample:
    """Messages as text; the assistant's turns from number `first` on are the spans, with what ends each turn.

    A turn that says nothing is no span: its end alone would teach to say nothing.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _render_plain(messages, tokenizer.eos_token or "", first)
    turns = [{"role": role, "content": content} for role, content in messages]

    def template(upto: int, open_turn: bool) -> str:
        if upto == 0 and not open_turn:
            return ""
        return tokenizer.apply_chat_template(turns[:upto], tools=tools, tokenize=False, add_generation_prompt=open_turn)

    try:
        text = template(len(turns), False)
        spans = []
        for i in range(first, len(turns)):
            if turns[i]["role"] == "assistant" and turns[i]["content"]:
                start = _common(text, template(i, True))
                end = _common(text, template(i + 1, False))
                content = messages[i][1].strip()
                if content not in text[start:end]:
                    raise DataError(f"{where}: the chat template rewrites message {i}; its place cannot be found")
                spans.append((start, end))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: the chat template refuses the messages: {brief(error)}") from error
    return Sample(text, spans, templated=True)


def _common(text: str, prefix: str) -> int:
    """Length of the part of `prefix` that `text` begins with."""
    if text.startswith(prefix):
        return len(prefix)
    return next((i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b), min(len(text), len(prefix)))


def _render_plain(messages: list[tuple[str, str]], end_token: str, first: int) -> Sample:
    text, spans = "", []
    for i, (role, content) in enumerate(messages):
        text += f"### {role.capitalize()}:\n"
        start = len(text)
        text += content
        if role == "assistant":
            text += end_token
            if i >= first and content:
                spans.append((start, len(text)))
        text += "\n\n"
    return Sample(text.rstrip("\n") if spans and messages[-1][0] == "assistant" else text, spans)
