"""Chat templates: exact tokens, and exactly the answers as targets."""

import json

import numpy as np
import pytest
import tokenizers as hf
from helpers.chat import CHATML, MESSAGES, chatml_tokenizer

from tttjax.data.chat import ChatTemplate
from tttjax.data.conversations import parse_conversation
from tttjax.data.tokenizers.base import ByteTokenizer, load_tokenizer
from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from tttjax.data.tokenizers.vocabulary import open_tokenizer
from tttjax.errors import UserError

ANSWERS = [m["content"] for m in MESSAGES if m["role"] == "assistant"]


def target_spans(chat):
    """The tokens of every run of targets."""
    edges = np.flatnonzero(np.diff(chat.targets.astype(int), prepend=0, append=0))
    return [chat.tokens[a:b] for a, b in edges.reshape(-1, 2)]


def test_the_built_in_template_marks_answers_and_their_ends():
    tokenizer = ByteTokenizer()
    chat = ChatTemplate(tokenizer).encode(MESSAGES)
    text = "".join(
        f"{m['role'].capitalize()}:\n{m['content']}" + "\x00" * (m["role"] == "assistant") + "\n\n"
        for m in MESSAGES
    )
    expected = [257 if byte == 0 else byte for byte in text.encode()]
    assert chat.tokens.tolist() == expected
    assert chat.num_bytes == len(text.encode()) - len(ANSWERS)
    assert [tokenizer.decode(s[:-1]) for s in target_spans(chat)] == ANSWERS
    assert [s[-1] for s in target_spans(chat)] == [257] * len(ANSWERS)


@pytest.mark.parametrize("cut", range(1, len(MESSAGES), 2))
def test_a_prompt_is_what_comes_before_the_answer(tmp_path, cut):
    for tokenizer in (ByteTokenizer(), chatml_tokenizer(tmp_path)):
        template = ChatTemplate(tokenizer)
        chat, prompt = template.encode(MESSAGES), template.encode_prompt(MESSAGES[: cut + 1])
        np.testing.assert_array_equal(chat.tokens[: len(prompt)], prompt)
        assert chat.targets[len(prompt)]
        assert not chat.targets[len(prompt) - 1]


@pytest.mark.parametrize("rstrip", [False, True])
def test_tokens_of_a_hugging_face_template_are_those_of_transformers(tmp_path, rstrip):
    transformers = pytest.importorskip("transformers")
    tokenizer = chatml_tokenizer(tmp_path, rstrip)
    chat = ChatTemplate(tokenizer).encode(MESSAGES)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|im_end|>"
    )
    text = theirs.apply_chat_template(MESSAGES, chat_template=CHATML, tokenize=False)
    assert chat.tokens.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert ChatTemplate(tokenizer).end.text == "<|im_end|>"
    ends = [theirs.decode(s) for s in target_spans(chat)]
    assert ends == [f"{answer}<|im_end|>" for answer in ANSWERS]


def test_the_end_of_answers_can_be_a_stop_string(tmp_path):
    """By which `generate --chat` stops where the end is no EOS."""
    tokenizer = chatml_tokenizer(tmp_path)
    end = ChatTemplate(tokenizer).end
    assert end.id not in tokenizer.eos_ids
    assert tokenizer.decode([end.id]) == end.text


def test_names_of_special_tokens_within_messages_are_text(tmp_path):
    tokenizer = chatml_tokenizer(tmp_path)
    sly = [
        {"role": "user", "content": "<|im_end|> \ue0000\ue001"},
        {"role": "assistant", "content": "</s><|im_start|>"},
    ]
    chat = ChatTemplate(tokenizer).encode(sly)
    ids = {token.text: token.id for token in tokenizer.special_tokens()}
    start, end = ids["<|im_start|>"], ids["<|im_end|>"]
    assert (chat.tokens == start).sum() == (chat.tokens == end).sum() == 2
    assert tokenizer.decode(target_spans(chat)[0][:-1]) == "</s><|im_start|>"


def test_a_template_is_kept_with_its_tokenizer(tmp_path):
    tokenizer = chatml_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.chat_template == tokenizer.chat_template == CHATML
    (tmp_path / "chat_template.jinja").unlink()
    config = tmp_path / "tokenizer_config.json"
    for value in (CHATML, [{"name": "default", "template": CHATML}]):
        config.write_text(json.dumps({"chat_template": value}))
        assert open_tokenizer(tmp_path / "tokenizer.json").chat_template == CHATML
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(UserError, match=r"chat template in .* is damaged"):
        open_tokenizer(tmp_path / "tokenizer.json")


PREFIXED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def prefixing_tokenizer(folder, template):
    """One token a character, and of `Hello`; a space comes before every text."""
    letters = ["▁", *map(chr, range(33, 127))]
    words = ["▁H", "He", "▁He"]
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters, *words])}
    model = hf.models.BPE(vocab, [("▁", "H"), ("▁H", "e")])
    tokenizer = hf.Tokenizer(model)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = hf.decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    return HuggingFaceTokenizer(folder / "tokenizer.json")


def test_an_answer_begins_at_a_token_where_texts_begin_with_a_space(tmp_path):
    """As in Llama 2: the space before the answer is part of its first token."""
    tokenizer = prefixing_tokenizer(tmp_path, PREFIXED)
    messages = [
        {"role": "user", "content": " Hey\n"},
        {"role": "assistant", "content": "Hello "},
        {"role": "user", "content": "You?"},
        {"role": "assistant", "content": "He."},
    ]
    template = ChatTemplate(tokenizer)
    chat = template.encode(messages)
    parts = ["[INST] Hey [/INST] Hello ", "[INST] You? [/INST] He. "]
    expected = [token for part in parts for token in (*tokenizer.encode(part), tokenizer.eos_id)]
    assert chat.tokens.tolist() == expected
    assert [tokenizer.decode(s) for s in target_spans(chat)] == ["Hello ", "He. "]
    prompt = template.encode_prompt(messages[:1])
    assert prompt.tolist() == tokenizer.encode("[INST] Hey [/INST]").tolist()
    within = PREFIXED.replace("[/INST]", "[/INST] H").replace("{% else %} ", "{% else %}")
    template = ChatTemplate(prefixing_tokenizer(tmp_path, within))
    with pytest.raises(UserError, match="no token boundary"):
        template.encode([messages[0], {"role": "assistant", "content": "ello"}])


CONTENT = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (CONTENT.replace("m.content", "m.content | upper"), "changes, repeats or leaves out"),
        (CONTENT.replace("</s>", "{{ m.content }}</s>"), "changes, repeats or leaves out"),
        (CONTENT.replace("messages", "messages[1:]"), "changes, repeats or leaves out"),
        (CONTENT.replace("</s>", "###"), "does not end the assistant's messages with a special"),
        (CONTENT.replace("</s>", " stop</s>"), "does not end the assistant's messages"),
        ("{{ raise_exception('no systems') }}", "refuses the conversation .no systems"),
        ("{{ messages[9].content }}", "refuses the conversation"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{% for", "is damaged"),
    ],
)
def test_templates_that_cannot_be_split_exactly_are_refused(tmp_path, template, sentence):
    tokenizer = prefixing_tokenizer(tmp_path, template)
    with pytest.raises(UserError, match=sentence):
        ChatTemplate(tokenizer).encode(MESSAGES)


def test_marks_of_answers_for_transformers_are_passed_over(tmp_path):
    marked = CONTENT.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    plain, other = (
        ChatTemplate(prefixing_tokenizer(tmp_path, template)).encode(MESSAGES)
        for template in (CONTENT, marked)
    )
    np.testing.assert_array_equal(plain.tokens, other.tokens)


def test_a_tokenizer_without_template_and_end_is_refused(tmp_path):
    tokenizer = prefixing_tokenizer(tmp_path, "")
    tokenizer.eos_id, tokenizer.eos_ids = None, ()
    with pytest.raises(UserError, match="neither a chat template nor an EOS"):
        ChatTemplate(tokenizer)


def test_an_ordinary_token_may_end_answers(tmp_path):
    """EOS given by id is special, whatever the tokenizer calls it."""
    prefixing_tokenizer(tmp_path, "")
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json", eos_id=3)
    assert ChatTemplate(tokenizer).end.id == 3
    assert ChatTemplate(tokenizer).end.text == "!"


def test_prompt_and_completion_are_one_exchange():
    line = json.dumps({"prompt": "2 + 2?", "completion": "4", "source": "school"}).encode()
    assert parse_conversation(line, "x") == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "a"}, r'needs the key "messages", or .*\(keys: text\)'),
        ({"prompt": "a"}, 'needs the key "messages"'),
        ({"prompt": "a", "completion": None}, "message 2: the content must be text"),
        ({"messages": {}}, "must be a list of objects"),
        ({"messages": ["a"]}, "must be a list of objects"),
        ({"messages": [USER, {"role": "tool", "content": "b"}]}, "message 2: the role 'tool'"),
        ({"messages": [USER, {"content": "b"}]}, "the role None"),
        ({"messages": [USER, {"role": ["user"], "content": "b"}]}, "the role"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "message 2: the content must be text"),
        ({"messages": [USER, {**ANSWER, "content": [{"text": "b"}]}]}, "the content must be text"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "key 'tool_calls' is not supported"),
        ({"messages": [USER, {**ANSWER, "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": [USER]}, "no message is the assistant's"),
        ({"messages": []}, "no message is the assistant's"),
    ],
)
def test_lines_that_are_no_conversation_are_refused(record, sentence):
    with pytest.raises(UserError, match=f"chats.jsonl, line 3.*{sentence}"):
        parse_conversation(json.dumps(record).encode(), "chats.jsonl, line 3")
