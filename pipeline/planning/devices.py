"""What a plan must know of a device, its node and its network: conf/devices/, one yaml each.

    device=h100, or a path --load_device--> Device;  torch's name and memory --device_of--> Device

A device of your own is a file more in that folder, or a path to one anywhere.
"""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import CONF_DIR
from pipeline.errors import ConfigError
from pipeline.files import parse_yaml, read_file
from pipeline.planning.flops import known_name, peak_tflops

FOLDER = CONF_DIR / "devices"
MOST_BYTES = 1 << 16
# Share by which the memory of alike devices may differ: the driver takes some of it. The next
# larger or smaller model, or a slice of one, is further away.
SAME_MEMORY = 0.05
# Share of a link's bandwidth that a large collective or copy reaches.
LINK_SHARE = 0.75
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Device:
    """One accelerator, and its share of the links around it. GB and TFLOP are powers of ten."""

    name: str
    """Of the file."""
    torch_name: str
    """As torch.cuda.get_device_name gives it; the peak is looked up by it (flops.py)."""
    memory_gib: float
    """Memory that torch sees."""
    memory_gb_s: float
    """Bandwidth of the memory."""
    per_node: int
    """Devices of a node."""
    node_gb_s: float
    """Link to the other devices of the node, one direction."""
    network_gb_s: float
    """Share of the node's network, one direction."""
    watts: float
    """Of the device under load; PLANT_FACTOR (plan.py) adds the rest of the machine room."""
    usd_per_hour: float
    """Rent of one device."""
    matrix_share: float
    """Share of the peak that large bf16 matrix products reach, clocks under load included."""
    attention_share: float
    """The same of flash attention."""
    peak_tflops: float | None = None
    """Dense bf16 TFLOP/s; null: that of the torch name in flops.py's table."""

    @property
    def peak(self) -> float:
        """Dense bf16 operations per second."""
        tflops = self.peak_tflops or peak_tflops(self.torch_name)
        assert tflops is not None, "load_device checks it"
        return tflops * 1e12

    def link_bytes_s(self, *, spans_nodes: bool) -> float:
        """Bytes per second, one direction, between devices of a node or of several."""
        return 1e9 * (self.network_gb_s if spans_nodes else self.node_gb_s)


def known_devices() -> list[str]:
    """Names that `device=` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_device(name: str) -> Device:
    """The device of conf/devices/<name>.yaml, or of a yaml file at that path.

    Raises:
        ConfigError: there is no such file, a field is missing, unknown or not a number above 0, or
            the peak is known neither to the file nor to flops.py.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        found = parse_yaml(read_file(path, most=MOST_BYTES))
    except OSError as error:
        why = "there is no" if isinstance(error, FileNotFoundError) else f"{error.strerror}:"
        raise ConfigError(
            f"device={name}: {why} {path}. Known: {', '.join(known_devices())}. For another, "
            f"copy {FOLDER / 'h100.yaml'}, change its numbers and give device=PATH.yaml."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not yaml: {error}") from None
    fields = {f.name: f for f in dataclasses.fields(Device) if f.name != "name"}
    values = found if isinstance(found, dict) else {}
    required = {key for key, f in fields.items() if f.default is dataclasses.MISSING}
    wrong = [f"{key} is missing" for key in sorted(required - set(values))]
    wrong += [f"{key} is not known" for key in sorted(set(map(_shown, values)) - set(fields))]
    wrong += [
        f"{key} ({_shown(value)}) must be a number above 0"
        for key, value in values.items()
        if key in fields and key != "torch_name" and not _is_positive(value)
    ]
    if not isinstance(values.get("torch_name", ""), str):
        wrong.append("torch_name must be a text")
    if not wrong and not (values.get("peak_tflops") or peak_tflops(str(values["torch_name"]))):
        wrong = [f"'{values['torch_name']}' is not in flops.py's table: set peak_tflops"]
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}. {FOLDER / 'h100.yaml'} has every field.")
    return Device(name=path.stem, **values)


def device_of(torch_name: str, memory_bytes: int | None = None) -> Device | None:
    """The device of this name, or one like it; None where conf/devices/ has neither.

    Alike are devices of one name in flops.py's table and as much memory: an H800 has an H100's
    peak and other links.

    Args:
        torch_name: as torch.cuda.get_device_name gives it.
        memory_bytes: that torch sees; None: not known, only the name itself is looked for.

    Raises:
        ConfigError: a file of conf/devices/ is broken.
    """
    devices = [load_device(name) for name in known_devices()]
    found = [device for device in devices if device.torch_name == torch_name]
    if memory_bytes is not None and (name := known_name(torch_name)) is not None:
        found += [
            device
            for device in devices
            if known_name(device.torch_name) == name
            and abs(memory_bytes / 2**30 / device.memory_gib - 1) <= SAME_MEMORY
        ]
    return next(iter(found), None)


def device_here() -> Device | None:
    """The device under this process; None where there is none or it is not known; as device_of."""
    import torch  # a plan needs none

    if not torch.cuda.is_available():
        return None
    return device_of(torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory)


def _shown(value: object) -> str:
    """A key or value for people; its whole text may be terabytes, of a few lines of yaml."""
    return value[:80] if isinstance(value, str) else reprlib.repr(value)


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < float("inf")
