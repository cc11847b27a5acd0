"""Pictures in the sequence: a ViT of the GPT's own blocks, and where its patches go.

    images (B, pictures, 3, size, size) uint8 -> patches -> Block x n, all seeing all -> two linears
    -> features (B, pictures * patches, H) --put_into--> hidden, in the places of placeholder tokens

It is a part of the embedding, so of the first stage. Its blocks are split over the tensor-parallel
ranks like all others, never along the sequence; ranks that share sequences compute it alike, and
each takes what its own tokens need. There is no norm behind the last block: SigLIP's tower in LLaVA
has none (`vision_feature_layer` -1 is what enters `post_layernorm`).

Every micro-batch brings as many pictures, blank ones where a row has fewer, so the encoder always
runs and ranks never wait for one that had none; features that no token takes get zero gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.model_shape import resolve
from pipeline.model.architecture import Architecture
from pipeline.model.block import Block


class Vision(nn.Module):
    """Pictures to hidden states of the GPT (Liu et al. 2023, arXiv:2304.08485: LLaVA)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        model, vision = architecture.model, architecture.model.vision
        sizes = resolve(model).vision
        assert sizes is not None
        self.patch_size, self.side = vision.patch_size, vision.image_size // vision.patch_size
        self.patch = nn.Linear(sizes.patch_numbers, vision.hidden_size)
        self.position = nn.Embedding(sizes.num_patches, vision.hidden_size)
        encoder = architecture.encoder
        self.layers = nn.ModuleList(Block(encoder, layer=i) for i in range(vision.num_layers))
        self.linear_1 = nn.Linear(vision.hidden_size, model.hidden_size)
        self.linear_2 = nn.Linear(model.hidden_size, model.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, pictures * patches, H) of images (B, pictures, 3, size, size) uint8, in order."""
        side, edge = self.side, self.patch_size
        # -1 to 1, as SigLIP's processor has it; by fp32, for 16 bits would round the quotient.
        pixels = images.flatten(0, 1).float() / 127.5 - 1
        patches = pixels.view(-1, 3, side, edge, side, edge).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, side * side, 3 * edge * edge)
        places = torch.arange(side * side, device=images.device)
        hidden = self.patch(patches.to(self.patch.weight.dtype)) + self.position(places)
        for layer in self.layers:
            hidden = layer(hidden)
        features = self.linear_2(F.gelu(self.linear_1(hidden)))
        return features.view(len(images), -1, features.shape[-1])


def put_into(hidden: Tensor, features: Tensor, patch_ids: Tensor) -> Tensor:
    """Hidden (B, S, H) with features in the places of placeholder tokens.

    Args:
        features: (B, pictures * patches, H).
        patch_ids: (B, S) int64: which of the row's features a token stands for; -1: it is text.
    """
    places = patch_ids.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    return torch.where(patch_ids[..., None] >= 0, features.gather(1, places), hidden)
