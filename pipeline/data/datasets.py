"""Datasets, opened and checked, before any process group forms. Needs no torch."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.vision import RowPictures
from pipeline.data.dataset_files import read_bytes
from pipeline.data.dataset_folder import Folder, RemoteFile, open_folder
from pipeline.data.manifest import Manifest
from pipeline.data.mixture import Ints
from pipeline.data.shard_format import Chat, Pictures
from pipeline.errors import ConfigError, DataError
from pipeline.files import sha256_of


@dataclass(frozen=True)
class Dataset:
    """One dataset of a mixture; its shards are fetched when they are asked for."""

    name: str
    """Name in metrics, blend_schedule and messages."""
    path: str
    manifest: Manifest
    folder: Folder
    weight: float | None
    max_epochs: float | None

    @property
    def identity(self) -> str:
        """sha256 of the manifest, which holds the sha256 of every shard."""
        return self.manifest.identity

    @property
    def shard_tokens(self) -> Ints:
        """(num_shards,) tokens of each shard."""
        return self.manifest.shard_tokens

    @property
    def is_packed(self) -> bool:
        """Whether its sequences are rows that were packed when it was prepared."""
        return self.manifest.row_tokens is not None

    @property
    def tokenizer_path(self) -> Path:
        """Local copy of the dataset's tokenizer.json."""
        return self.folder.local / "tokenizer.json"

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded."""
        return self.folder.is_remote

    def shard_path(self, shard: int) -> Path:
        """Local path of a shard; waits for its download."""
        return self.folder.fetch(self._file(shard))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to download shards, the first ones first."""
        self.folder.prefetch([self._file(shard) for shard in shards])

    def _file(self, shard: int) -> RemoteFile:
        m = self.manifest
        return RemoteFile(m.paths[shard], int(m.shard_bytes[shard]), m.sha256[shard])


@dataclass(frozen=True)
class DataSummary:
    """What the model and the run's records need to know of the data."""

    vocab_size: int
    """Ids of the tokenizer that all datasets share."""
    eod: int
    """Id of the token that ends a document."""
    tokenizer_sha256: str
    tokenizer_json: bytes = field(repr=False)
    """The file itself."""
    train: tuple[Dataset, ...]
    """The training datasets: their manifests; files of remote ones may be gone."""
    tokens: int
    """Training tokens of all datasets, one epoch each."""
    row_tokens: int | None
    """Tokens of the packed rows that all training datasets consist of; None: they are text."""
    chat: Chat | None
    """How their dialogues became text."""
    identities: dict[str, str]
    """Path to identity of every training and validation dataset."""
    pictures: Pictures | None = None
    """How pictures stand in the rows of those that have them; None: none has."""

    @property
    def row_pictures(self) -> RowPictures:
        """What the rules between data and model need to know of them."""
        if self.pictures is None:
            return RowPictures()
        most = max(dataset.manifest.images_per_row_max for dataset in self.train)
        return RowPictures(self.pictures.image_size, self.pictures.patch_size, max(1, most))


def describe(cfg: DataConfig, *, cache_dir: Path | None = None) -> DataSummary:
    """Check all datasets of a config against each other.

    Raises:
        ConfigError: no dataset, or two with one name.
        DataError: a dataset is missing or not in our format, or two were made with different
            tokenizers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(cfg.cache_dir) if cfg.cache_dir else cache_dir or Path(scratch)
        train = open_datasets(cfg.train, cfg=cfg, cache_dir=folder)
        held_out = (
            open_datasets(cfg.validation, cfg=cfg, cache_dir=folder) if cfg.validation else []
        )
        for dataset in [*train, *held_out]:
            _check_tokenizer_file(dataset)
        for dataset in held_out:
            check_has_labels(dataset)
        _check_packing(train, held_out)
        tokenizer_json = read_bytes(str(train[0].tokenizer_path))
    _check_one_tokenizer([*train, *held_out])
    tokenizer = train[0].manifest.tokenizer
    return DataSummary(
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_json=tokenizer_json,
        train=tuple(train),
        tokens=sum(int(d.manifest.tokens) for d in train),
        row_tokens=train[0].manifest.row_tokens,
        chat=train[0].manifest.chat,
        identities={d.path: d.identity for d in [*train, *held_out]},
        pictures=next((d.manifest.pictures for d in train if d.manifest.pictures), None),
    )


def follow_data(cfg: DataConfig, data: DataSummary) -> DataConfig:
    """The settings, with those that follow from the data: packed rows are documents apart."""
    if data.row_tokens is None:
        return cfg
    return replace(cfg, mask_documents=True, reset_positions=True)


def open_datasets(
    configs: Sequence[DatasetConfig], *, cfg: DataConfig, cache_dir: Path
) -> list[Dataset]:
    """The datasets of cfg.train or cfg.validation; remote ones through cfg's cache.

    Raises:
        ConfigError, DataError: as describe().
    """
    if not configs:
        raise ConfigError(
            "no training data: set data.path=OUT (what data_prep/tokenize.py wrote), or list "
            "data.train."
        )
    if not 0 <= cfg.cache_size_gib < math.inf:
        raise ConfigError(f"data.cache_size_gib ({cfg.cache_size_gib}) must be at least 0.")
    names = _names(configs)
    datasets = []
    for name, config in zip(names, configs):
        folder = open_folder(
            config.path, cache_dir=cache_dir, size_bytes=int(cfg.cache_size_gib * 2**30)
        )
        manifest = Manifest.load(folder.local)
        datasets.append(
            Dataset(name, config.path, manifest, folder, config.weight, config.max_epochs)
        )
    by_identity: dict[str, Dataset] = {}
    for dataset in datasets:
        if (other := by_identity.setdefault(dataset.identity, dataset)) is not dataset:
            raise ConfigError(
                f"datasets {other.name} ({other.path}) and {dataset.name} ({dataset.path}) are the "
                "same data. List it once; to see it more often, raise its weight."
            )
    _check_one_tokenizer(datasets)
    return datasets


def _names(configs: Sequence[DatasetConfig]) -> list[str]:
    """A name for each: the given one, or as many of the last folder names as keep them apart."""
    names = [config.name or "" for config in configs]
    parts = [config.path.rstrip("/").split("/") for config in configs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [config.name or "/".join(part[-depth:]) for config, part in zip(configs, parts)]
        if len(set(names)) == len(names):
            return names
    double = sorted({name for name in names if names.count(name) > 1})
    raise ConfigError(
        f"two datasets are called {', '.join(double)}: "
        "give each a name of its own (data.train[].name)."
    )


def check_has_labels(dataset: Dataset) -> None:
    """Raise DataError unless a held-out dataset has a token that follows another in its shard."""
    if not (dataset.shard_tokens > 1).any():
        raise DataError(
            f"dataset {dataset.name} ({dataset.path}) has nothing to predict: "
            f"{len(dataset.shard_tokens)} shards, {int(dataset.manifest.tokens)} tokens, and a "
            "label needs two in one shard. "
            "Prepare the data again with a larger validation_fraction, or train without: "
            "data.validation=[]."
        )


def _check_tokenizer_file(dataset: Dataset) -> None:
    """Refuse a tokenizer.json that is not the one that the manifest names."""
    try:
        found = sha256_of(dataset.tokenizer_path)
    except OSError as error:
        found = error.strerror or str(error)
    if found != dataset.manifest.tokenizer.sha256:
        raise DataError(
            f"{dataset.path}/tokenizer.json is not the file the dataset was made with: its sha256 "
            f"is {found[:12]}, the manifest says {dataset.manifest.tokenizer.sha256[:12]}. Copy "
            "the right one back, or prepare the data again."
        )


def _check_packing(train: Sequence[Dataset], held_out: Sequence[Dataset]) -> None:
    """Refuse to mix packed rows with text, with rows of another length or another template.

    Rows come with a mask of what is learned, and attention stays inside documents: that is one
    setting for a whole batch. Held-out text is scored beside training on rows: it needs no mask.
    """
    first = train[0]
    for other in [*train[1:], *(d for d in held_out if d.is_packed)]:
        ours, theirs = first.manifest.row_tokens, other.manifest.row_tokens
        if ours != theirs:
            one, two = (f"rows of {n} tokens" if n else "text" for n in (ours, theirs))
            raise DataError(
                f"datasets {first.name} ({first.path}) and {other.name} ({other.path}) do not mix: "
                f"one is {one}, the other {two}. Prepare both with "
                "data_prep.conversations and one row_tokens, or train on one after the other "
                "(checkpoint.init_from)."
            )
        if first.manifest.chat != other.manifest.chat:
            raise DataError(
                f"dialogues of {first.name} ({first.path}) and {other.name} ({other.path}) were "
                "rendered by different chat templates; a model learns one. Prepare one of them "
                "again with the other's (data_prep.conversations template=...)."
            )
    _check_pictures([*train, *held_out])


def _check_pictures(datasets: Sequence[Dataset]) -> None:
    """Refuse pictures of two sizes, or under two ids: one encoder sees them all."""
    first, *others = [d for d in datasets if d.manifest.pictures] or [datasets[0]]
    for other in others:
        ours, theirs = first.manifest.pictures, other.manifest.pictures
        if ours != theirs:
            raise DataError(
                f"pictures of {first.name} ({first.path}) and {other.name} ({other.path}) differ: "
                f"{ours} and {theirs}. Prepare one of them again with the other's image_size, "
                "patch_size and image_token."
            )


def _check_one_tokenizer(datasets: Sequence[Dataset]) -> None:
    """Refuse a mixture of datasets in which one id means different text."""
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            ours, theirs = (
                first.manifest.tokenizer.sha256[:12],
                other.manifest.tokenizer.sha256[:12],
            )
            raise DataError(
                f"datasets {first.name} ({first.path}) and {other.name} ({other.path}) were made "
                f"with different tokenizers (sha256 {ours} and {theirs}): the same id means "
                "different text. Prepare one of them again with the other's tokenizer.json "
                "(data_prep/tokenize.py tokenizer=...)."
            )
        ends = first.manifest.tokenizer.eod, other.manifest.tokenizer.eod
        if ends[0] != ends[1]:
            raise DataError(
                f"documents of {first.name} ({first.path}) end with id {ends[0]}, those of "
                f"{other.name} ({other.path}) with id {ends[1]}. Prepare one of them again with "
                "the other's eod (data_prep/tokenize.py eod=...)."
            )
