"""Noise of a private run is the cipher's stream, normal, and the same number at every layout."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine.secret_noise import secret_normal
from pipeline.model.partition import Partition

pytest.importorskip("cryptography")
NAME, SHAPE = "layers.0.mlp.linear_fc1.weight", (300, 50)


def noise(key: str = "k", purpose: str = "1", name: str = NAME) -> Tensor:
    return secret_normal(name, Partition.of(SHAPE), key=key, purpose=purpose)


def test_it_is_made_of_the_whole_key_by_aes_and_box_muller() -> None:
    """A generator of 32 bits is found by trying them, from the rows of tokens that no sequence holds."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = hashlib.blake2b(f"1/{NAME}/1".encode(), key=b"k", digest_size=32).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(stream.update(bytes(4 * 44 * 50)), "<u4").tolist()
    u = [(word + 0.5) / 2**32 for word in words]
    pairs = list(zip(u[: 22 * 50], u[22 * 50 :]))
    expected = [
        math.sqrt(-2 * math.log(a)) * wave(2 * math.pi * b) for wave in (math.cos, math.sin) for a, b in pairs
    ]  # fmt: skip
    np.testing.assert_allclose(noise()[256:].flatten(), expected, rtol=1e-4, atol=1e-5)


def test_it_is_normal_and_of_its_key_purpose_and_name() -> None:
    found = noise().flatten()
    ranks = (torch.arange(len(found)) + 0.5) / len(found)
    chance = 0.5 * (1 + torch.erf(found.sort().values / math.sqrt(2)))
    assert (ranks - chance).abs().max() < 1.63 / math.sqrt(len(found))  # Kolmogorov & Smirnov, 1 %
    for other in (noise(key="l"), noise(purpose="2"), noise(name=NAME.replace("0", "1"))):
        correlation = torch.corrcoef(torch.stack([found, other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.03
    halves = torch.corrcoef(torch.stack([found[: 256 * 50 : 2], found[1 : 256 * 50 : 2]]))
    assert abs(float(halves[0, 1])) < 0.04


def test_a_rank_has_its_part_of_the_same_numbers() -> None:
    whole = noise()
    rows = Partition.of((150, 50), dim=0, stride=2, tensor_rank=1, tensor_size=2)
    columns = Partition.of((300, 25), dim=1, tensor_rank=1, tensor_size=2)
    for part, expected in (
        (rows, torch.cat([whole[75:150], whole[225:]])),
        (columns, whole[:, 25:]),
    ):
        assert torch.equal(secret_normal(NAME, part, key="k", purpose="1"), expected)
