"""The groups DeepSpeed's plain engine asks for, by the names it uses."""

from __future__ import annotations

from typing import Any


class Mpu:
    """megatron-core's groups as DeepSpeed's plain engine names them (model parallel = tensor)."""

    def __getattr__(self, name: str) -> Any:
        """parallel_state's attribute of that name."""
        from megatron.core import parallel_state

        return getattr(
            parallel_state, name.replace("get_model_parallel", "get_tensor_model_parallel")
        )
