"""Text as it is drawn, up to a stop string or the end of a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the stop string that is the first to be whole, which is left out.

    Not up to the one that begins first: whether that goes on is not known yet when drawing ends.
    """
    found = [(at + len(end), at) for end in stop if end and (at := text.find(end)) >= 0]
    return text[: min(found)[1]] if found else text


class Outlet:
    """Hands a growing text on, but for an end that may be the beginning of a stop string."""

    def __init__(self, on_text: Callable[[str], None], stop: Sequence[str]) -> None:
        self._on_text, self._stop, self._shown = on_text, stop, 0

    def show(self, text: str, *, is_whole: bool) -> None:
        """Hand on what is new.

        Args:
            text: all that there is so far.
            is_whole: no more of it comes.
        """
        allowed = cut_at_stop(text, self._stop)
        if allowed == text and not is_whole:
            begun = (n for end in self._stop for n in range(1, len(end)) if text.endswith(end[:n]))
            allowed = text[: len(text) - max(begun, default=0)]
        self._on_text(allowed[self._shown :])
        self._shown = max(self._shown, len(allowed))


def stop_at(stop: Sequence[str], tokenizer: Any, prompt_length: int) -> Any:
    """Stopping criterion that reads the text; transformers 5.23's fails on some tokenizers."""
    import torch
    from transformers import StoppingCriteria

    class StopAt(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            texts = tokenizer.batch_decode(input_ids[:, prompt_length:], skip_special_tokens=True)
            ended = [any(end in text for end in stop) for text in texts]
            return torch.tensor(ended, device=input_ids.device)

    return StopAt()


def streamer(
    tokenizer: Any, on_text: Callable[[str], None], *, stop: Sequence[str], ends: Sequence[int]
) -> Any:
    """Transformers' streamer that hands on whole words, up to a stop string or an end's id."""
    from transformers import TextStreamer

    outlet = Outlet(on_text, stop)

    class Streamer(TextStreamer):
        seen = ""

        def put(self, value: Tensor) -> None:
            if self.next_tokens_are_prompt or int(value.view(-1)[-1]) not in ends:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.seen += text
            outlet.show(self.seen, is_whole=stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
