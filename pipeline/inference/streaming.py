"""Text as it is drawn, up to a stop string or the end of a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings, which is left out."""
    ends = [text.find(end) for end in stop if end and end in text]
    return text[: min(ends)] if ends else text


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

    class Streamer(TextStreamer):
        seen = ""
        shown = 0

        def put(self, value: Tensor) -> None:
            if self.next_tokens_are_prompt or int(value.view(-1)[-1]) not in ends:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.seen += text
            allowed = cut_at_stop(self.seen, stop)
            on_text(allowed[self.shown :])
            self.shown = max(self.shown, len(allowed))

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
