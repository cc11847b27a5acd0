"""Which documents repeat earlier ones: the decision over the keys (hashing.py) of all of them.

    all keys of one band, in the order of the documents
    -> links (later document, first document with this key)
    all links -> per document: the first document of its cluster

A document's number is its place in the corpus (work unit << 32 | row), so "first" means the same
for any number of workers, and so do the survivors.
"""

from __future__ import annotations

import numpy as np


def links(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """(n, 2) uint64 (later, first): documents whose key equals that of an earlier document.

    Args:
        keys: (d, k) uint64.
        documents: (d,) uint64 numbers, in any order.
    """
    columns = keys.T
    order = np.lexsort((documents, *columns))
    documents, columns = documents[order], columns[:, order]
    begins = np.ones(len(documents), bool)
    begins[1:] = (columns[:, 1:] != columns[:, :-1]).any(axis=0)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(documents)), 0))
    later = np.flatnonzero(~begins)
    return np.stack([documents[later], documents[first[later]]], axis=1)


def clusters(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents that are not the first of their cluster, sorted; the first one of each's cluster).

    Args:
        edges: (n, 2) uint64 links; documents joined by a chain of links are one cluster.
    """
    documents, flat = np.unique(edges, return_inverse=True)
    later, earlier = flat.reshape(-1, 2).T
    root = np.arange(len(documents))
    while (
        True
    ):  # hook each root onto the smallest one it meets, then shorten the chains: O(log n) rounds
        before = root.copy()
        low, high = np.minimum(root[later], root[earlier]), np.maximum(root[later], root[earlier])
        np.minimum.at(root, high, low)
        np.minimum.at(root, root[later], low)
        while True:
            shorter = root[root]
            if np.array_equal(shorter, root):
                break
            root = shorter
        if np.array_equal(before, root):
            break
    moved = np.flatnonzero(root != np.arange(len(documents)))
    return documents[moved], documents[root[moved]]
