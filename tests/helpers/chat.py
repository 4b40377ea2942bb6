"""Conversations, and a byte-level tokenizer with a chat template."""

import json

import tokenizers as hf

from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Who reads?\n"},
    {"role": "assistant", "content": "Élodie does."},
    {"role": "user", "content": "And learns?"},
    {"role": "assistant", "content": "We all do 😀"},
]
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer(folder, rstrip=False):
    """Writes `tokenizer.json` and its template to a folder, and opens them; few merges.

    rstrip: the special tokens take up the whitespace after them, as in Phi-3.
    """
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("d", "o"), ("Ġ", "do")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = hf.Tokenizer(hf.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([hf.AddedToken(n, special=True, rstrip=rstrip) for n in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return HuggingFaceTokenizer(folder / "tokenizer.json")


def write_chats(path, number, seed=0):
    """JSON lines about sums, a quarter as prompt and completion; returns the records."""
    records = []
    for i in range(number):
        turns = [
            message
            for n in range(1 + i % 3)
            for message in (
                {"role": "user", "content": f"What is {i + seed} plus {n}, please?"},
                {"role": "assistant", "content": f"It is {i + seed + n}."},
            )
        ]
        if i % 4 == 0:
            records.append({"prompt": turns[0]["content"], "completion": turns[1]["content"]})
        else:
            records.append({"messages": turns})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def answers(record):
    """What the assistant says in a record."""
    if "completion" in record:
        return [record["completion"]]
    return [m["content"] for m in record["messages"] if m["role"] == "assistant"]
