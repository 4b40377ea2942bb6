"""Conversations of JSON lines: messages of the system, the user and the assistant."""

from collections.abc import Mapping
from typing import Any

from tttjax.data import json_lines
from tttjax.data.streams import check_unicode
from tttjax.errors import UserError

ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT)

Message = Mapping[str, str]  # its role and content


def parse_conversation(raw: bytes, where: str) -> list[Message]:
    """The messages of a JSON line: `messages`, or `prompt` and `completion` as a single exchange.

    Raises UserError, beginning with `where`, for anything but messages of text with known roles, at
    least one of them the assistant's.
    """
    record = json_lines.parse(raw, where)
    messages = record.get("messages")
    if messages is None and {"prompt", "completion"} <= record.keys():
        turns = (("user", record["prompt"]), (ASSISTANT, record["completion"]))
        messages = [{"role": role, "content": content} for role, content in turns]
    if messages is None:
        raise UserError(
            f'{where}: a conversation needs the key "messages", or "prompt" and "completion" '
            f"(keys: {', '.join(record) or 'none'})."
        )
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(f'{where}: "messages" must be a list of objects with role and content.')
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"{where}, message {number}")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise UserError(f"{where}: no message is the assistant's, so there is nothing to learn.")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _check_message(message: Mapping[str, Any], where: str) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"{where}: the role {role!r} must be one of {', '.join(ROLES)}.")
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{where}: the content must be text that is not empty.")
    if ignored := [key for key in message if key not in ("role", "content") and message[key]]:
        raise UserError(f"{where}: the key {ignored[0]!r} is not supported; remove it.")
    check_unicode(content, f"{where}: the content")
