"""Talk to a model on a page of this machine, or through OpenAI's clients.

    python -m pipeline.serve runs/NAME              http://127.0.0.1:8000/
    python -m pipeline.serve FOLDER port=9000       a Hugging Face folder

The page has a dialogue where the model was trained on dialogues, else a text that the model
continues. Programs have http://127.0.0.1:8000/v1 (chat/completions, completions, models) with the
model's name, which is the run's. `transformers serve` computes, on an export of the checkpoint
(pip install -e ".[hf,serve]"). Nobody but this machine is answered; from elsewhere:
ssh -L 8000:127.0.0.1:8000 HOST.
"""

from __future__ import annotations

import importlib.util
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline import cli, log
from pipeline.errors import ConfigError
from pipeline.inference import front
from pipeline.inference.generation import GenerateConfig, check_model
from pipeline.inference.served import prepare

NEEDED = ("transformers", "fastapi", "uvicorn", "openai", "multipart")


@dataclass
class ServeConfig:
    """Serve a model."""

    checkpoint: str = "???"
    """A run folder (its newest checkpoint), one checkpoint, or a Hugging Face folder."""
    port: int = 8000
    """Of 127.0.0.1; 0: any that is free."""
    temperature: float = 0.8
    """Divides the logits where a request names none; 0 takes the likeliest token every time."""


def main(cfg: ServeConfig) -> int:
    """Serve until Ctrl-C."""
    log.setup()
    if not 0 <= cfg.temperature <= 2 or not 0 <= cfg.port <= 65535:
        raise ConfigError(
            f"temperature ({cfg.temperature}) must be in [0, 2], port ({cfg.port}) in [0, 65535]."
        )
    check_model(GenerateConfig(checkpoint=cfg.checkpoint))
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f'{missing[0]} is not installed: pip install -e ".[hf,serve]".')
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    with front.listening(cfg.port) as server, tempfile.TemporaryDirectory() as scratch:
        model = prepare(Path(cfg.checkpoint), Path(scratch), temperature=cfg.temperature)
        log.logger.info("loading %s into transformers serve", model.name)
        with front.transformers_serve(model, Path(scratch)) as upstream:
            server.answer_with(model, upstream)
            port = server.server_address[1]
            print(f"page      http://127.0.0.1:{port}/")
            print(f"programs  http://127.0.0.1:{port}/v1  model={model.name}")
            print("Ctrl-C ends it.", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                log.say("\nended")
    return 0


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main, ServeConfig, config="serve", positional=("checkpoint",))
