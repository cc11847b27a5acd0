"""megatron-core without what it imports and we do not use; import this before anything of it.

It asks for W&B and TensorBoard, for its inference and its timers, and does without where they are
not installed. And it hands forty functions to torch.compile, for which all of Inductor is imported;
each belongs to a fusion that model/megatron_config.py switches off, or to a layer that is none of
ours. With them megatron-core and our layers take 3.2 to 4.3 s of CPU beside torch, without 1.5 to
2.2, in every process.

Not by patching.replace, which changes what has been imported: this must come before. Without it
all goes on as with it, only later.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

_FOR_OTHERS = ("wandb", "torch.utils.tensorboard")


def _as_it_is(function: Any) -> Any:
    return function


if "megatron.core" not in sys.modules:
    jit = ModuleType("megatron.core.jit", "Nothing is compiled.")
    vars(jit)["jit_fuser"] = _as_it_is  # a module of our own, not one of theirs
    sys.modules[jit.__name__] = jit
    absent = [name for name in _FOR_OTHERS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: not installed
    try:
        import megatron.core  # noqa: F401
    finally:
        for name in absent:
            del sys.modules[name]
