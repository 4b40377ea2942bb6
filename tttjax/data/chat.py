"""Conversations to tokens by a chat template, with the answers marked as targets.

A template is a Jinja program that renders messages to text, as Hugging Face tokenizers have it
(`chat_template.jinja`, or the key `chat_template` of their `tokenizer_config.json`). A tokenizer
without one gets `BUILT_IN`. Targets are what the assistant says and the token that ends it.

Contents are located exactly: the template renders placeholders, and that rendering, with the
contents substituted for them, must equal the rendering of the messages themselves; else the
template is refused. An answer is tokenized apart from the prompt, as at inference, where the prompt
ends there. A tokenizer that adds a space to the beginning of a text reads both together, and must
have a token boundary between them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np

from tttjax.data.conversations import ASSISTANT, ROLES, Message
from tttjax.data.text_spans import encode_text
from tttjax.data.tokenizers.base import SpecialToken, Tokenizer
from tttjax.errors import UserError

BUILT_IN = (
    "{% for message in messages %}"
    r"{{ message.role | capitalize + ':\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    r"{{ '\n\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
_PLACEHOLDER, _PLACEHOLDERS = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")
# Roles whose contents a template may strip of surrounding whitespace.
_STRIPPED: tuple[tuple[str, ...], ...] = ((), ROLES, ROLES[:2], ROLES[2:])


class EncodedChat(NamedTuple):
    """tokens: int32 [N], without BOS at the beginning. targets: bool [N]. num_bytes: of the text,
    as UTF-8, special tokens aside."""

    tokens: np.ndarray
    targets: np.ndarray
    num_bytes: int


class _Part(NamedTuple):
    """Text of a rendered conversation, or one special token."""

    content: str | int
    is_target: bool


class ChatTemplate:
    """The chat template of a tokenizer, else `BUILT_IN`.

    Raises UserError for a template that is no Jinja, and for `BUILT_IN` without EOS.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._specials = tokenizer.special_tokens()
        patterns = map(_pattern, self._specials)
        self._special = re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)")
        names = {token.id: token.text for token in self._specials}
        self._variables = {
            f"{name}_token": names.get(getattr(tokenizer, f"{name}_id"), "")
            for name in ("bos", "eos")
        }
        if not tokenizer.chat_template and not self._variables["eos_token"]:
            raise UserError(
                "The tokenizer has neither a chat template nor an EOS to end answers with; put "
                "chat_template.jinja beside its tokenizer.json, or give --eos-id."
            )
        # As in transformers, but without the date: the same messages give the same text always.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(tokenizer.chat_template or BUILT_IN)
        except jinja2.TemplateError as error:
            raise UserError(f"The chat template of the tokenizer is damaged ({error}).") from error
        apart = np.concatenate([tokenizer.encode("a"), tokenizer.encode("b")])
        self._adds_space = tokenizer.decode(apart) != "ab"

    @property
    def end(self) -> SpecialToken:
        """The token that ends an answer."""
        turns = (("user", "a"), (ASSISTANT, "b"))
        parts = self._parts([{"role": role, "content": content} for role, content in turns])
        ends = [p.content for p in parts if p.is_target and isinstance(p.content, int)]
        return next(token for token in self._specials if token.id == ends[-1])

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """The tokens of a conversation. Raises UserError if the answers cannot be located."""
        return self._encode(self._parts(messages))

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [N] tokens of a conversation that the assistant is to continue, without BOS.

        Spaces that the template writes before an answer are left to the answer.
        """
        parts = self._parts(messages, prompt=True)
        last = parts[-1]
        if isinstance(last.content, str):
            parts[-1] = last._replace(content=last.content.rstrip(" "))
        return self._encode(parts).tokens

    def _encode(self, parts: Sequence[_Part]) -> EncodedChat:
        tokens: list[np.ndarray] = [np.zeros(0, np.int32)]
        targets: list[np.ndarray] = [np.zeros(0, bool)]
        before, num_bytes = "", 0  # before: the text since the last special token
        for content, is_target in _merged(parts):
            if isinstance(content, int):
                new, before = np.array([content], np.int32), ""
            else:
                new, before = self._encode_after(before, content), before + content
                num_bytes += len(content.encode("utf-8"))
            tokens.append(new)
            targets.append(np.full(len(new), is_target))
        tokens_N, targets_N = np.concatenate(tokens), np.concatenate(targets)
        first = int(len(tokens_N) > 0 and tokens_N[0] == self._tokenizer.bos_id)
        return EncodedChat(tokens_N[first:], targets_N[first:], num_bytes)

    def _encode_after(self, before: str, text: str) -> np.ndarray:
        """Tokens of a text that follows `before`."""
        if not before or not self._adds_space:
            return encode_text(self._tokenizer, text)
        head, both = self._tokenizer.encode(before), self._tokenizer.encode(before + text)
        if not np.array_equal(both[: len(head)], head):
            raise UserError(
                f"the tokenizer has no token boundary between the template's {before[-20:]!r} and "
                f"the answer {text[:20]!r}; use a template with a special token or a line break "
                "before answers"
            )
        return both[len(head) :]

    def _parts(self, messages: Sequence[Message], *, prompt: bool = False) -> list[_Part]:
        """The rendered conversation in parts. prompt: an answer is to follow."""
        texts, contents = self._located(messages, prompt)
        parts: list[_Part] = []
        for i, (text, (role, content)) in enumerate(zip(texts, contents, strict=False)):
            parts += self._template_parts(
                text, after_answer=i > 0 and contents[i - 1][0] == ASSISTANT
            )
            spaces = ""
            if role == ASSISTANT and parts and isinstance(written := parts[-1].content, str):
                spaces = written[len(written.rstrip(" ")) :]
                parts[-1] = parts[-1]._replace(content=written.rstrip(" "))
            parts.append(_Part(spaces + content, role == ASSISTANT))
        return parts + self._template_parts(texts[-1], after_answer=contents[-1][0] == ASSISTANT)

    def _template_parts(self, text: str, after_answer: bool) -> list[_Part]:
        """What a template writes between contents; what ends an answer is a target."""
        parts, position = [], 0
        for match in self._special.finditer(text):
            assert match.lastindex is not None
            parts.append(_Part(text[position : match.start()], False))
            parts.append(_Part(self._specials[match.lastindex - 1].id, False))
            position = match.end()
        parts.append(_Part(text[position:], False))
        if after_answer:
            if len(parts) == 1 or str(parts[0].content).strip():
                raise UserError(
                    "the chat template does not end the assistant's messages with a special token "
                    f"(but with {text[:20]!r}), so a model could not learn to end them"
                )
            parts[:2] = [part._replace(is_target=True) for part in parts[:2]]
        return parts

    def _located(
        self, messages: Sequence[Message], prompt: bool
    ) -> tuple[list[str], list[tuple[str, str]]]:
        """(what the template writes around contents, (role, content) of each), in order."""
        marked = [
            {"role": message["role"], "content": _PLACEHOLDER.format(i)}
            for i, message in enumerate(messages)
        ]
        split = _PLACEHOLDERS.split(self._render(marked, prompt))
        order = [int(number) for number in split[1::2]]
        rendered = self._render(messages, prompt)
        if sorted(order) == list(range(len(messages))):
            for roles in _STRIPPED:
                contents = [_content(messages[i], roles) for i in order]
                split[1::2] = [content for _, content in contents]
                if "".join(split) == rendered:
                    return split[::2], contents
        raise UserError(
            "the chat template changes, repeats or leaves out what messages say, so the answers "
            "cannot be located exactly; use a template that inserts each content once, as it is"
        )

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, **self._variables
            )
        except Exception as error:  # a template is a program of someone else
            raise UserError(f"the chat template refuses the conversation ({error})") from error


def _content(message: Message, stripped_roles: Sequence[str]) -> tuple[str, str]:
    role, content = message["role"], message["content"]
    return role, content.strip() if role in stripped_roles else content


def _merged(parts: Sequence[_Part]) -> Iterator[_Part]:
    """The parts with neighbouring texts of one kind joined, so that they are tokenized as one."""
    text, of_target = "", False
    for content, is_target in parts:
        if isinstance(content, int) or is_target != of_target:
            if text:
                yield _Part(text, of_target)
            text, of_target = "", is_target
        if isinstance(content, int):
            yield _Part(content, is_target)
        else:
            text += content
    if text:
        yield _Part(text, of_target)


def _pattern(token: SpecialToken) -> str:
    """A special token within a template, with the whitespace that it takes up on either side."""
    space = r"\s*"
    return space * token.lstrip + re.escape(token.text) + space * token.rstrip


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark answers for transformers; not needed here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
