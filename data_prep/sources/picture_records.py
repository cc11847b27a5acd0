"""Records of text and pictures: what they say as messages, and where their pictures are.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.png"]}
    {"prompt": "What is it?", "completion": "A cat.", "image": "cat.png"}
    {"image": "cat.png", "text": "A cat."}     or "caption": the user shows, the assistant says it

A content item may name its picture itself, as "path", "url", "image", "bytes" or OpenAI's
"image_url"; those that do not take the next of "images". A picture is a path, an address, bytes, or
an object with one of them, as in tables of Hugging Face datasets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

FIELDS = ("messages", "prompt", "completion", "tools", "images", "image", "text", "caption")
_PLACES = ("bytes", "path", "url", "image", "image_url")
_IMAGE = {"type": "image"}


class Illustrated(NamedTuple):
    """A record, its pictures apart from its words."""

    record: dict[str, Any]
    """With messages whose content is a text or a list of {"type": "image"} and texts."""
    images: list[Any]
    """Bytes, paths or addresses, in the order in which the messages show them."""
    reason: str = ""
    """Why it cannot be used; empty: it can."""
    detail: str = ""


def illustrated(record: dict[str, Any]) -> Illustrated:
    """The messages of a record and their pictures."""
    named = [record[key] for key in ("images", "image") if record.get(key) is not None]
    if len(named) > 1:
        return Illustrated(record, [], "pictures_mismatch", "it has both images and image")
    waiting = named[0] if named else []
    waiting = waiting if isinstance(waiting, list) else [waiting]
    messages = record["messages"] if "messages" in record else _without_messages(record, waiting)
    if not isinstance(messages, list):
        return Illustrated(record, [], "not_a_dialogue", "it has no messages, prompt or caption")
    images: list[Any] = []
    taken, cleaned = 0, []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            cleaned.append(message)
            continue
        parts = []
        for item in content:
            part, source = _part(item)
            if part is None:
                detail = f"message {number} has a part that is neither text nor picture"
                return Illustrated(record, [], "not_a_dialogue", detail)
            parts.append(part)
            if part == _IMAGE:
                if source is None:
                    source = _place_of(waiting[taken]) if taken < len(waiting) else None
                    taken += 1
                images.append(source)
        cleaned.append(message | {"content": parts})
    if taken != len(waiting):
        detail = f"{taken} places for pictures, and {len(waiting)} pictures"
        return Illustrated(record, [], "pictures_mismatch", detail)
    if not images and not {"messages", "prompt"} & record.keys():
        return Illustrated(record, [], "picture_missing", "a caption without a picture")
    return Illustrated({"messages": cleaned, "tools": record.get("tools")}, images)


def _without_messages(record: dict[str, Any], images: list[Any]) -> list[dict[str, Any]] | None:
    """The dialogue that a prompt with its completion is, or a caption; None: it is neither."""
    prompt, answer = record.get("prompt"), record.get("completion")
    if prompt is None and answer is None:
        prompt, answer = [], record.get("text", record.get("caption"))
    if prompt is None or answer is None:
        return None
    if isinstance(prompt, str):
        prompt = [*[_IMAGE] * len(images), {"type": "text", "text": prompt}]
    elif prompt == []:
        prompt = [_IMAGE] * len(images)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _part(item: Any) -> tuple[dict[str, Any] | None, Any]:
    """(a part of a message without its picture, the picture that it names itself or None)."""
    if not isinstance(item, dict):
        return None, None
    if item.get("type") == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}, None
    if item.get("type") in ("image", "image_url"):
        return _IMAGE, _place_of(item) if any(key in item for key in _PLACES) else None
    return None, None


def _place_of(picture: Any) -> Any:
    """Bytes, path or address of a picture, out of the objects that hold it."""
    while isinstance(picture, dict):
        found = [picture[key] for key in _PLACES if picture.get(key) is not None]
        picture = found[0] if found else ""
    return "" if picture is None else picture
