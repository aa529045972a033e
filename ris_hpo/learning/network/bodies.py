"""The two bodies of the network: from features to a hidden state per place, and one pooled state per scene.

Names of modules and parameters are names in checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_hpo.learning.features import Features
from ris_hpo.learning.network.spec import NetworkSpec


class SpectralBody(nn.Module):
    """Convolutional network over log spectra, with a path at full and one at half resolution (a two-level U-Net).

        fine   = gelu(conv3x3(maps) + linear(context))                    [B, F, V, W],     F = spec.fine_width
        coarse = conv3x3(fine), stride 2                                  [B, C, V/2, W/2], C = spec.width
        coarse = blocks, self-attention before the middle one             likewise
        hidden = gelu(conv3x3([fine, upsampled conv1x1(coarse)]))         [B, F, V, W]
        pooled = mean of coarse over its cells                            [B, C]

    V and W are the grid's cells in v and w; its range cells are the planes (input channels) of ``maps``. The form is
    that of U-Net (Ronneberger, Fischer and Brox, "U-Net: convolutional networks for biomedical image segmentation",
    MICCAI 2015), with attention at the coarse level alone, where there are few cells.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        fine, width = spec.fine_width, spec.width
        self.stem = nn.Conv2d(spec.num_planes, fine, 3, padding=1)
        self.context = nn.Linear(spec.num_context, fine)
        self.down = nn.Conv2d(fine, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Block(width, spec.dropout) for _ in range(spec.depth))
        self.attention = _Attention(width, spec.heads, spec.dropout)
        rows, columns = ((size + 3) // 4 for size in (spec.cells.num_v, spec.cells.num_w))
        self.place = nn.Parameter(0.02 * torch.randn(1, rows * columns, width))  # position embedding
        self.up = nn.Conv2d(width, fine, 1)
        self.merge = nn.Conv2d(2 * fine, fine, 3, padding=1)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """Hidden map [B, F, V, W] and pooled state [B, C]."""
        fine = F.gelu(self.stem(features.maps) + self.context(features.context)[:, :, None, None])
        coarse = self.down(fine)
        middle = len(self.blocks) // 2
        for position, block in enumerate(self.blocks):
            if position == middle:
                coarse = coarse + self._attended(coarse)
            coarse = block(coarse)
        pooled = coarse.mean((2, 3))
        raised = F.interpolate(self.up(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return F.gelu(self.merge(torch.cat([fine, raised], 1))), pooled

    @property
    def last_shared_weight(self) -> nn.Parameter:
        """The last weight that every head depends on: the heads of the count and of the noise read ``pooled`` alone."""
        weight: nn.Parameter = self.blocks[-1].second.weight  # type: ignore[union-attr, assignment]
        return weight

    def _attended(self, coarse: Tensor) -> Tensor:
        """Self-attention between 2 x 2 means of the coarse cells, so that sources far apart can compete for energy."""
        rough = F.avg_pool2d(coarse, 2, ceil_mode=True, count_include_pad=False)
        tokens = rough.flatten(2).mT + self.place
        change = self.attention(tokens) - tokens
        return F.interpolate(change.mT.unflatten(-1, rough.shape[-2:]), size=coarse.shape[-2:])


class TokenBody(nn.Module):
    """Transformer over snapshots, with one learned query per slot and one for the scene.

        tokens = [queries, linear(snapshots) + linear(context)]           [B, 1 + K_max + L, C], C = spec.width
        tokens = layer norm(pre-norm transformer layers(tokens))          likewise
        hidden = states of the slots' queries                             [B, K_max, C]
        pooled = state of the scene's query + mean over snapshots         [B, C]

    It memorises quickly and generalises slowly, and is kept as the form that large networks of earlier reports had.
    Queries in the manner of DETR (Carion et al., "End-to-end object detection with transformers", ECCV 2020); pre-norm:
    Xiong et al., "On layer normalization in the transformer architecture", ICML 2020.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * spec.geometry.num_elements, spec.width)
        self.context = nn.Linear(spec.num_context, spec.width)
        self.queries = nn.Parameter(0.5 * torch.randn(1, spec.max_sources + 1, spec.width))
        self.layers = nn.ModuleList(_Attention(spec.width, spec.heads, spec.dropout) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """Hidden states of the slots [B, K_max, C] and pooled state [B, C]."""
        snapshots = self.embed(features.tokens) + self.context(features.context).unsqueeze(1)
        x = torch.cat([self.queries.expand(snapshots.shape[0], -1, -1), snapshots], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        count = self.queries.shape[1]
        return x[:, 1:count], x[:, 0] + x[:, count:].mean(1)

    @property
    def last_shared_weight(self) -> nn.Parameter:
        """The last weight matrix that every head depends on."""
        weight: nn.Parameter = self.layers[-1].contract.weight  # type: ignore[union-attr, assignment]
        return weight


class _Block(nn.Module):
    """Pre-norm residual block of two 3 x 3 convolutions; between them a linear function of the map's mean is added."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(max(1, width // 16), width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.globally = nn.Linear(width, width)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(self.norm(x)))
        h = h + self.globally(h.mean((2, 3)))[:, :, None, None]
        out: Tensor = x + self.second(self.dropout(F.gelu(h)))
        return out


class _Attention(nn.Module):
    """Pre-norm transformer layer: self-attention, then a two-layer perceptron of four times the width; [B, T, C]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weight = torch.softmax(q @ k.mT / k.shape[-1] ** 0.5, -1)  # few tokens: plain products beat the fused kernel
        mixed = (weight @ v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        out: Tensor = x + self.dropout(self.contract(F.gelu(self.expand(self.second_norm(x)))))
        return out
