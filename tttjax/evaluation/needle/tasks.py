"""RULER's single-needle tasks, by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NeedleTask:
    """A RULER task. title: RULER's name. in_noise: whether its haystack is always noise."""

    name: str
    title: str
    kind: str
    in_noise: bool = False


TASKS = {
    task.name: task
    for task in (
        NeedleTask("passkey", "S-NIAH-1 (pass-key)", "number", in_noise=True),
        NeedleTask("number", "S-NIAH-2 (number)", "number"),
        NeedleTask("uuid", "S-NIAH-3 (UUID)", "uuid"),
    )
}
