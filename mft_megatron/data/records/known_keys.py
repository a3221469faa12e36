"""Keys that records and turns of other tools have beside their text, by meaning.

A known key is read, or it refuses the record by its name where its meaning cannot be honoured. Others are counted.
"""

from collections.abc import Mapping

from .conversation import RecordError

# system text, text that a question is asked about, and declarations of tools
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
PASSAGES = ("input", "context", "passage")
TOOLS = ("tools", "functions")

# how much the tokens of a turn, or a whole record, count in the loss
WEIGHTS = ("weight", "loss_weight", "loss_scale")
# whether a turn, or the whole record, is learnt; True where the flag says so by being false
FLAGS = {
    "train": False,
    "train_on_turn": False,
    "learn": False,
    "training": False,
    "trainable": False,
    "loss": False,
    "mask": True,
    "masked": True,
    "is_masked": True,
    "ignore": True,
    "no_train": True,
    "skip": True,
}
# whether the answer is a wanted one; a class label, which is other text or a number, is another key of the same name
LABELS = ("label", "kto_tag")

_ONLY_TEXT = "unsupported_content", "cannot be used, only text can be read"
_PAIR = "preference_pair", "cannot be used: an unwanted answer cannot be trained on; write the wanted one as an answer"
_WHOLE_TURNS = "unsupported_key", "cannot be used: a turn is learnt as a whole or not at all"
# keys that cannot be honoured: reason, and rest of the sentence
REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _ONLY_TEXT),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PAIR),
    "chat_template_kwargs": ("unsupported_key", "cannot be used: a template gets no further arguments"),
}
REFUSED_IN_TURNS = REFUSED | {
    "refusal": ("unsupported_key", "cannot be used; write it as the content of the turn"),
    "train_detail": _WHOLE_TURNS,
    "training_detail": _WHOLE_TURNS,
}

# weights above 0 are within these bounds, so that fp32 holds them and their products with others
_LEAST, _MOST = 1e-20, 1e20
# roles that a mask may name
_UNLEARNT = frozenset({"user", "human", "system", "tool"})


def refused_key(name: str, path: str, reason: str, why: str) -> RecordError:
    """Make the error of a key that cannot be honoured.

    Args:
        name: position of the key, in the record or in the turn.
        path: of the key as ``--ignore-keys`` takes it.
        reason: name that the record is counted under.
        why: rest of the sentence that begins with the name.
    """
    return RecordError(reason, f"{name} {why}; --ignore-keys {path} reads records as if they did not have it")


def read_weight(key: str, value: object, name: str, path: str) -> float:
    """Read a key of :data:`FLAGS` or :data:`WEIGHTS` as a weight; a flag is 1 where it says learnt, else 0.

    Args:
        key: the key.
        value: of a flag true or false, or 1 or 0; of a weight a number, or one of these.
        name, path: as in :func:`refused_key`.

    Raises:
        RecordError: it is something else, for example a negative weight.
    """
    weighs = key in WEIGHTS
    if not isinstance(value, bool | int | float):
        asked = "a number, 0 or above" if weighs else "true or false, or 1 or 0"
        raise refused_key(name, path, "wrong_type", f"must be {asked}, not {type(value).__name__}")
    if weighs:
        if value and not _LEAST <= value <= _MOST:
            why = f"must be 0 or from {_LEAST:g} to {_MOST:g}, not {str(value)[:40]}"
            raise refused_key(name, path, "unsupported_weight", why)
        return float(value)
    if value not in (0, 1):
        why = "must be 0 or 1; a number that tokens count by is written as weight"
        raise refused_key(name, path, "unsupported_weight", why)
    return float(bool(value) is not FLAGS[key])


def one_weight(weights: Mapping[str, float], name: str) -> float:
    """Combine the keys of a turn or record that say how much it counts; 1 where there is none.

    Args:
        weights: values of :func:`read_weight` by key.
        name: of what has them, which the message begins with.

    Raises:
        RecordError: two keys have different weights.
    """
    given = {key: weight for key, weight in weights.items() if key in WEIGHTS}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{key} {weight:g}" for key, weight in given.items())
        raise RecordError("two_weights", f"{name} has different weights ({listed}); keep one")
    return 0.0 if 0 in weights.values() else next(iter(given.values()), 1.0)


def record_weight(key: str, value: object) -> float:
    """Read a key of :data:`FLAGS` or :data:`WEIGHTS` that belongs to a whole record: it must not exclude the answers.

    A ``mask`` may name the roles whose turns are masked, as in NeMo; answers are learnt unless it names the assistant.

    Raises:
        RecordError: it excludes the answers, or it cannot be read.
    """
    if key == "mask" and isinstance(value, str):
        for role in value.replace(",", " ").split():
            if role.lower() not in _UNLEARNT:
                why = f"masks turns of {role[:40]!r}, but answers are learnt"
                raise refused_key(key, key, "no_learned_turn", why)
        return 1.0
    weight = read_weight(key, value, key, key)
    if weight == 0:
        raise refused_key(key, key, "no_learned_turn", "excludes the whole record from training")
    return weight


def is_label(value: object, name: str, path: str) -> bool:
    """Whether a key of :data:`LABELS` says that the answer is wanted; False for a label of another meaning.

    Args:
        value: of the key.
        name, path: as in :func:`refused_key`.

    Raises:
        RecordError: it says that the answer is not wanted.
    """
    text = value.strip().lower() if isinstance(value, str) else ""  # a table's booleans may have become text
    if value is False or text == "false":
        why = "is false: the answer is not wanted, so it cannot be trained on"
        raise refused_key(name, path, "unwanted_answer", why)
    return value is True or text == "true"


def refuse_placeholders(text: str, name: str) -> None:
    """Refuse a question in which a picture, film or sound is to be put.

    ``<image>`` at an end of a line is such a placeholder, ``<video>`` and ``<audio>`` at an end of the text. The same
    words are tags of HTML and XML: where one is closed, or stands within a sentence, it is text.

    Raises:
        RecordError: a placeholder is in it.
    """
    if "<" in text and ("<image>" in text or "<video>" in text or "<audio>" in text):
        for tag in ("<image>", "<video>", "<audio>"):
            lines = text.splitlines() if tag == "<image>" else [text]
            at_an_end = any(tag in (line.strip()[: len(tag)], line.strip()[-len(tag) :]) for line in lines)
            if at_an_end and f"</{tag[1:]}" not in text:
                raise RecordError(
                    "unsupported_content",
                    f"{name} has a placeholder {tag}; only text can be read, so remove it or the record",
                )
