"""What travels between pipeline stages: every schema packs and unpacks by field, and names the field that is wrong."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig, VisionConfig
from pipeline.config.training import ParallelConfig
from pipeline.model.stage_io import StageInput, StageSchema

BATCH, SIZE, WIDTH = 2, 8, 4
MODEL = ModelConfig(name="m", num_layers=2, hidden_size=4, num_attention_heads=2)
SCHEMAS = [
    StageSchema(documents, positions, ranks, pictures=pictures)
    for documents in (False, True)
    for positions in (False, True)
    for ranks in (1, 2)
    for pictures in (False, True)
]


def of_batch(schema: StageSchema) -> StageInput:
    """Distinct values in every field the first stage is given."""
    ids = torch.arange(BATCH * SIZE).view(BATCH, SIZE)
    return StageInput(
        tokens=ids,
        document_ids=ids + 100 if schema.documents else None,
        positions=ids + 200 if schema.positions else None,
        images=torch.zeros(BATCH, 3, 3, 2, 2, dtype=torch.uint8) if schema.pictures else None,
        patch_ids=ids - 300 if schema.pictures else None,
    )


def of_hidden(schema: StageSchema) -> StageInput:
    """Distinct values in every field that goes from layer to layer."""
    shape = (BATCH, SIZE, WIDTH)
    if schema.sequence_ranks > 1:
        shape = (SIZE // schema.sequence_ranks, BATCH, WIDTH)
    return StageInput(hidden=torch.randn(shape), document_ids=of_batch(schema).document_ids)


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_every_combination_of_fields_comes_back_as_it_was(schema: StageSchema) -> None:
    """Without gaps, as DeepSpeed sends tensors only; a lone tensor travels without a tuple."""
    for packing, given in ((schema.first, of_batch(schema)), (schema.between, of_hidden(schema))):
        packed = packing.pack(given)
        count = sum(getattr(given, field.name) is not None for field in fields(given))
        assert isinstance(packed, torch.Tensor) if count == 1 else len(packed) == count
        back = packing.unpack(packed)
        for field in fields(given):
            assert getattr(back, field.name) is getattr(given, field.name), field.name


def test_the_schema_follows_from_the_config() -> None:
    data = DataConfig(mask_documents=True, reset_positions=True)
    parallel = ParallelConfig(tensor_parallel_size=4, sequence_parallel=True)
    assert StageSchema.of(data, parallel, MODEL) == StageSchema(True, True, 4)
    assert (
        StageSchema.of(DataConfig(), replace(parallel, sequence_parallel=False), MODEL)
        == StageSchema()
    )
    assert StageSchema.of(data, parallel, MODEL).first.names == (
        "tokens",
        "document_ids",
        "positions",
    )
    assert StageSchema.of(data, parallel, MODEL).between.names == ("hidden", "document_ids")
    sees = StageSchema.of(data, parallel, replace(MODEL, vision=VisionConfig(num_layers=1)))
    assert sees.first.names == ("tokens", "document_ids", "positions", "images", "patch_ids")
    assert sees.between.names == ("hidden", "document_ids")


def test_pictures_of_other_rows_are_refused() -> None:
    """Pictures travel beside the tokens that stand for them."""
    schema = StageSchema(pictures=True)
    given = of_batch(schema)
    assert given.images is not None
    with pytest.raises(ValueError, match="images has shape .*tokens has 2 sequences"):
        schema.first.pack(replace(given, images=given.images[:1]))
    with pytest.raises(ValueError, match=r"images has shape .* not \(B, pictures, 3, size, size\)"):
        schema.first.pack(replace(given, images=given.images[0]))
    with pytest.raises(ValueError, match="model.vision brings images"):
        StageSchema().first.pack(given)


FULL = StageSchema(documents=True, positions=True)


@pytest.mark.parametrize("name", ["tokens", "document_ids", "positions"])
def test_a_missing_field_is_named(name: str) -> None:
    """A document mask that silently stays away trains another model."""
    with pytest.raises(ValueError, match=f"^{name} is missing: by the config"):
        FULL.first.pack(replace(of_batch(FULL), **{name: None}))


@pytest.mark.parametrize("name", ["document_ids", "positions"])
def test_a_field_that_the_config_does_not_carry_is_not_dropped(name: str) -> None:
    given = replace(of_batch(StageSchema()), **{name: of_batch(FULL).tokens})
    with pytest.raises(ValueError, match=f"^{name} would be dropped"):
        StageSchema().first.pack(given)


@pytest.mark.parametrize("name", ["document_ids", "positions"])
@pytest.mark.parametrize("shape", [(BATCH, SIZE + 1), (BATCH + 1, SIZE), (SIZE,)])
def test_a_field_of_another_shape_is_named(name: str, shape: tuple[int, ...]) -> None:
    given = replace(of_batch(FULL), **{name: torch.zeros(shape, dtype=torch.int64)})
    with pytest.raises(ValueError, match=rf"^{name} has shape \({shape[0]},"):
        FULL.first.pack(given)


def test_what_comes_from_the_stage_before_is_checked_too() -> None:
    """Under sequence parallelism hidden's first dimension is this rank's part of the sequence."""
    for ranks in (1, 2):
        schema = StageSchema(documents=True, sequence_ranks=ranks)
        hidden, ids = schema.between.pack(of_hidden(schema))
        with pytest.raises(ValueError, match="^document_ids has shape .*2 sequences of 8 tokens"):
            schema.between.unpack((hidden, ids[:, 1:]))
        with pytest.raises(ValueError, match="^hidden has shape"):
            schema.between.unpack((ids, hidden))
        with pytest.raises(ValueError, match="given hidden, document_ids, not 1 tensors"):
            schema.between.unpack(hidden)
