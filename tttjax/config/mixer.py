"""What the configuration of a sequence mixer declares besides its fields.

A mixer is one folder of tttjax/models: `config.py` with a `MixerConfig`, which imports no JAX, and
`layer.py` with the layer. It becomes known by its line in `MIXERS` and its field in `ModelConfig`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tttjax.config.model import ModelConfig


@dataclass(frozen=True)
class MixerConfig(ABC):
    """The fields of a mixer, `model.<mixer>.*`, and what follows from them.

    kinds: the words in `model.mixers` that choose it. layer: `module:class`, imported when a model
    is built. All methods get the whole model, since sizes default to those of attention.
    """

    kinds: ClassVar[tuple[str, ...]]
    layer: ClassVar[str]

    @abstractmethod
    def check(self, model: "ModelConfig") -> None:
        """UserError for sizes that do not fit, in one sentence that names the fields."""

    @abstractmethod
    def sharded_by_tensor(self, model: "ModelConfig") -> list[tuple[int, str]]:
        """The sizes sharded over the mesh axis `tensor`, with their names."""

    @abstractmethod
    def parameter_count(self, kind: str, model: "ModelConfig") -> int:
        """Scalars of one layer."""

    @abstractmethod
    def recurrence_flops(self, kind: str, model: "ModelConfig") -> float:
        """FLOPs of the matrix products of a token's state update and read; 0 for attention."""
