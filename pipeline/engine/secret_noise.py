"""Normal noise that nobody tells from true one without its key: AES in counter mode, made normal.

    key, what the noise is for, canonical name, block --blake2b--> AES key --counter--> 32-bit words
    two words --Box & Muller--> two normal numbers

torch's generator will not do: it takes 32 bits of a seed. A block of noise of which somebody knows
a few numbers (the rows of tokens that are in no sequence have no gradient beside it) would give its
seed away in 4e9 tries, and the noise could be taken off its other rows.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from pipeline.model.initial_values import block_shape, runs_of_blocks
from pipeline.model.partition import Partition


def secret_normal(name: str, part: Partition, *, key: str, purpose: str) -> Tensor:
    """Standard normal numbers of this rank's share of a parameter, fp32 on the CPU; padding 0.

    The same for the same element of the whole parameter, whatever the layout.

    Args:
        name: canonical, of the parameter.
        part: which share of it.
        key: secret, at most 64 characters.
        purpose: another one gives other noise.
    """
    found = torch.zeros(part.local_shape)
    for target, block, source in runs_of_blocks(part):
        what = f"{purpose}/{name}/{block}"
        found[target] = _draw(block_shape(part.global_shape, block), what, key)[source]
    return found


def _draw(shape: tuple[int, ...], what: str, key: str) -> Tensor:
    """Standard normal numbers of a block: 4 bytes of the cipher's stream for each."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    count = math.prod(shape)
    half = -(-count // 2)
    own_key = hashlib.blake2b(what.encode(), key=key.encode(), digest_size=32).digest()
    stream = Cipher(algorithms.AES(own_key), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(stream.update(bytes(8 * half)), "<u4").astype(np.float32)
    # In (0, 1], never 0: the largest number is 6.76 standard deviations away, at a chance of 1e-11.
    uniform = torch.from_numpy((words + np.float32(0.5)) * np.float32(2.0**-32))
    radius = (-2.0 * uniform[:half].log()).sqrt_()
    angle = 2.0 * math.pi * uniform[half:]
    both = torch.cat([radius * angle.cos(), radius * angle.sin()])
    return both[:count].view(shape)
