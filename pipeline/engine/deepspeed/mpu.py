"""The groups DeepSpeed's plain engine asks for, by the names it uses."""

from __future__ import annotations

from functools import partial
from typing import Any


class Mpu:
    """megatron-core's groups as DeepSpeed's plain engine names them.

    Its model parallelism is our tensor parallelism, its data parallelism all copies of the model:
    a context-parallel rank is to DeepSpeed one more rank with other tokens. It must find no
    get_sequence_parallel_*, with which it would divide gradients and norms in some paths only.
    """

    def __getattr__(self, name: str) -> Any:
        """parallel_state's attribute of that name."""
        from megatron.core import parallel_state

        found = getattr(
            parallel_state, name.replace("get_model_parallel", "get_tensor_model_parallel")
        )
        if name.startswith("get_data_parallel_"):
            return partial(found, with_context_parallel=True)
        return found
