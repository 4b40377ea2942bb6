"""Settings of `tttjax prepare`, with their defaults. Imports no JAX."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from tttjax.errors import UserError

TEXT_KEY = "text"  # of JSON Lines and Parquet
CHAT_KEY = "messages"  # of conversations
EXACT, NEAR = "exact", "near"  # duplicates to drop
LARGEST_VOCABULARY = 1 << 24  # SentencePiece training hangs near 2**31


@dataclass(frozen=True)
class PrepareSettings:
    """Everything besides the text that determines the prepared tokens."""

    inputs: tuple[str, ...]
    tokenizer: str = "bytes"
    vocab_size: int = 4096
    bos_id: int | None = None
    eos_id: int | None = None
    val_fraction: float = 0.05
    split_manifest: str = ""
    seed: int = 0
    pattern: str = ""
    text_key: str = TEXT_KEY
    chat: bool = False
    min_document_tokens: int = 0
    add_bos: bool = True
    add_eos: bool = False
    shard_tokens: int = 1 << 27
    drop_duplicates: str = ""

    def check(self) -> None:
        """Raises UserError for a value outside its range."""
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"val_fraction={self.val_fraction} must be at least 0 and less than 1: the share "
                "of documents that is held out."
            )
        if self.chat and (self.add_eos or self.text_key != TEXT_KEY):
            raise UserError(
                "add_eos and text_key do not apply to conversations: the chat template ends them, "
                "and their keys are fixed; remove them."
            )
        if self.drop_duplicates not in ("", EXACT, NEAR):
            raise UserError(f"drop_duplicates={self.drop_duplicates} must be {EXACT} or {NEAR}.")
        if not self.text_key:
            raise UserError("text_key is empty; name the key of the text in JSON lines or Parquet.")
        for name in ("vocab_size", "shard_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.vocab_size > LARGEST_VOCABULARY:
            raise UserError(f"vocab_size={self.vocab_size} must be at most {LARGEST_VOCABULARY}.")
        if self.min_document_tokens < 0:
            raise UserError(f"min_document_tokens={self.min_document_tokens} must not be negative.")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them: a tuple is a list."""
        return json.loads(json.dumps(asdict(self)))
