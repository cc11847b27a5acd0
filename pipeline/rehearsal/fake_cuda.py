"""A CUDA device that computes nothing: fake tensors, streams, kernels and groups without a GPU.

    load_guard(); import torch; stand_in(...); with fake_tensors(): ...

torch's FakeTensor keeps shapes, dtypes and devices. On a build without CUDA its backward pass ends
in "not linked with support for cuda devices": the autograd engine asks for the device's guard. The
one that torch's own tests use (c10/core/impl/FakeGuardImpl.h) is registered here, before torch is
imported. What is changed is changed for the life of the process, which does nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline.errors import MachineError

if TYPE_CHECKING:
    from torch import Tensor

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace {
const c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
struct CUDAHooks : public at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
}
namespace at { using ::CUDAHooks; REGISTER_CUDA_HOOKS(CUDAHooks); }
"""
H100 = "NVIDIA H100 80GB HBM3"


def compiler() -> str | None:
    """The C++ compiler that builds the guard; None: there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def check_machine() -> None:
    """Whether this machine can stand in for a device. Imports no torch.

    Raises:
        MachineError: no C++ compiler, or a build of torch that has a guard of its own.
    """
    # Written when torch was built, e.g. `cuda: Optional[str] = '13.0'`.
    text = (_torch_folder() / "version.py").read_text()
    if found := re.search(r"^(cuda|hip|xpu)\b.*= '(.*)'", text, re.MULTILINE):
        raise MachineError(
            f"the rehearsal needs torch's CPU build: this one is for {found[1]} {found[2]}, "
            "and asks the driver. Install torch from https://download.pytorch.org/whl/cpu in an "
            "environment of its own."
        )
    if compiler() is None:
        raise MachineError("the rehearsal needs a C++ compiler: install g++, or set CXX.")


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def load_guard() -> None:
    """Compile the guard, once a version of torch, and load it; before torch is imported.

    Raises:
        MachineError: this machine cannot (check_machine), or the compiler fails.
    """
    assert "torch" not in sys.modules, "the guard must be there before torch is"
    check_machine()
    home = _torch_folder()
    # The user's own cache: in a folder that others can write, another library might lie there.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain"
    library = cache / f"fake_cuda-{importlib.metadata.version('torch')}.so"
    if not library.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                _compile(Path(folder), home).rename(library)  # whole, whoever else compiles it
        except OSError as error:
            raise MachineError(
                f"the rehearsal's guard cannot be kept in {cache} ({error.strerror}). Set "
                "XDG_CACHE_HOME to a folder that you can write."
            ) from None
    for path in (home / "lib/libc10.so", home / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def _compile(folder: Path, home: Path) -> Path:
    """The guard as a library in `folder`; home: of the torch package."""
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    command = [str(compiler()), "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include"]
    command += [str(source), f"-L{home}/lib", "-lc10", "-ltorch_cpu", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"the rehearsal's guard does not compile:\n{done.stderr[-2000:]}")
    return library


host_waits: Counter[str] = Counter()
"""File and line that made the host wait for the device -> how often."""


def place_of_caller() -> str:
    """File and line of the innermost caller outside torch and this package."""
    frames = traceback.extract_stack()
    ours = ("/torch/", "/pipeline/rehearsal/")
    frame = next(f for f in reversed(frames) if not any(part in f.filename for part in ours))
    return f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno}"


def _wait(*_: Any, **__: Any) -> None:
    host_waits[place_of_caller()] += 1


class _Stream:
    """Every stream is the one stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        import torch

        self.device = torch.device("cuda", 0)
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: _Event() if name == "record_event" else None

    def synchronize(self) -> None:
        _wait()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class _Event(_Stream):
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def _answer(value: Any) -> Callable[..., Any]:
    """A function of its own for each name: torch's compiler takes no two names for one."""
    return lambda *_, **__: value


def set_all(owner: Any, **names: Any) -> None:
    """Let `owner` have other values under names that it has; an unknown one is a bug of ours."""
    for name, value in names.items():
        assert hasattr(owner, name), f"{owner.__name__} has no {name}"
        setattr(owner, name, value)


def stand_in(*, memory_bytes: int = 80 * 2**30, device_name: str = H100) -> None:
    """Let torch.cuda say that this process sees one device, as under --gpus-per-task=1."""
    import torch

    one, state = _Stream(), torch.zeros(16, dtype=torch.uint8)
    properties = SimpleNamespace(
        name=device_name, total_memory=memory_bytes, major=9, minor=0, multi_processor_count=132
    )
    zeros = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    idle = (
        "init", "_lazy_init", "_lazy_call", "set_device", "empty_cache",
        "manual_seed", "manual_seed_all", "reset_peak_memory_stats", "set_rng_state",
    )  # fmt: skip
    set_all(
        torch.cuda,
        **{name: _answer(0) for name in zeros},
        **{name: _answer(None) for name in idle},
        synchronize=_wait,
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        current_stream=lambda *_: one,
        default_stream=lambda *_: one,
        Stream=_Stream,
        Event=_Event,
        stream=lambda *_: contextlib.nullcontext(),
        get_rng_state=lambda *_, **__: state,
        get_device_name=lambda *_: device_name,
        get_device_capability=lambda *_: (properties.major, properties.minor),
        get_device_properties=lambda *_: properties,
        is_bf16_supported=lambda *_: True,
        mem_get_info=lambda *_: (memory_bytes, memory_bytes),
    )
    for name in ("get_rng_state", "set_rng_state"):
        set_all(torch.cuda.random, **{name: getattr(torch.cuda, name)})
    set_all(torch.cuda.nvtx, range_push=_answer(None), range_pop=_answer(None))
    set_all(torch.version, cuda="13.0")
    _stand_in_for_copies(torch)


def _stand_in_for_copies(torch: Any) -> None:
    """What torch does in C++ for a device that it was built for."""
    make, pin = torch.tensor, lambda self, *_, **__: self

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make(data, **options)
        return made if device is None else made.to(device)

    def move(self: Any, function: Callable, recurse: bool = True) -> Any:
        # torch's own swaps tensors that are fake, which weak references to them forbid.
        for module in self.modules():
            for parameter in filter(None.__ne__, module._parameters.values()):
                with torch.no_grad():
                    new = function(parameter.data)
                if new is not parameter.data:
                    parameter.data = new
                    parameter.fake_device = new.device
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else function(buffer)
        return self

    set_all(torch, tensor=tensor)
    set_all(torch.Tensor, pin_memory=pin)
    set_all(torch.nn.Module, _apply=move)


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Every tensor made inside is fake."""
    from torch._subclasses import fake_tensor

    set_all(fake_tensor, init_gpu_context=lambda *_: None)
    # A constant's number would be kept on the real device. The class only annotates the name.
    vars_of_fakes: Any = fake_tensor.FakeTensor
    vars_of_fakes.constant = property(lambda _: None, lambda *_: None)
    set_all(fake_tensor.FakeTensorConverter, add_constant_storage_mapping=lambda *_: None)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        yield


def stand_in_for_attention(used: Callable[[str], None]) -> None:
    """Let attention take the kernel that CUDA would, by our order of kernels.

    Causal: flash in half precision; efficient in any, with as many key heads as query heads; plain
    for the rest. Inside documents: varlen, torch's flash kernel for sequences of many lengths, and
    blocks (model/documents.py), which choose by themselves.

    Args:
        used: is told each kernel's name.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import varlen

    from pipeline.model import block_attention

    aten = torch.ops.aten

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.dtype in (torch.bfloat16, torch.float16):
            used("flash")
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if not enable_gqa:
            used("efficient")
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, None, query.requires_grad, dropout_p, is_causal, scale=scale
            )[0]
        used("plain")
        shares = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shares, 1) for x in (key, value))
        return aten._scaled_dot_product_attention_math(
            query, key, value, None, dropout_p, is_causal, scale=scale
        )[0]

    def named(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def run(*args: Any, **options: Any) -> Any:
            used(name)
            return kernel(*args, **options)

        return run

    set_all(F, scaled_dot_product_attention=attend)
    set_all(varlen, varlen_attn=named("varlen", varlen.varlen_attn))
    set_all(block_attention, causal_attention=named("blocks", block_attention.causal_attention))
