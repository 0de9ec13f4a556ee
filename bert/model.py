"""minBERT: a BERT encoder under Hugging Face's parameter names, computed on real tokens only.

A batch is its T real tokens [T, H], end to end (Zeng et al. 2022, "Boosting distributed training
performance of the unpadded BERT model"): every GEMM, LayerNorm, GELU and dropout runs on them, and
only attention sees padded squares (layout.py). Shapes at line ends: B batch, S sequence, T real
tokens, H hidden, h heads, d head width; b rows and s length of one square.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora.bert.attention import LONG, cpu_attention
from fastlora.bert.config import BertConfig
from fastlora.bert.layout import Layout

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, "tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, "tanh"),
    "relu": nn.ReLU,
}


class Dropout(nn.Dropout):
    """`nn.Dropout` that adds a residual."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Drop elements of `input`, then add `residual` of the same shape."""
        dropped = super().forward(input)
        return dropped if residual is None else dropped + residual


@dataclass(frozen=True)
class Parts:
    """The kinds of modules that an encoder is built of; others may be faster."""

    linear: type[nn.Linear] = nn.Linear
    dropout: type[nn.Dropout] = Dropout


@dataclass(frozen=True)
class BertOutput:
    """What `BertModel.forward` returns; hidden_states[0] is the embeddings' output."""

    last_hidden_state: Tensor  # [B, S, H]
    pooler_output: Tensor  # [B, H]
    hidden_states: tuple[Tensor, ...]  # layers + 1 of [B, S, H]


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = parts.dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, types: Tensor, positions: Tensor) -> Tensor:
        """Three int64 [T] -> [T, H]."""
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))


class SelfAttention(nn.Module):
    """Multi-head attention whose query, key and value share one packed [3H, H] storage.

    `projection` computes [T, H] -> [T, 3H]; whoever adapts the projections replaces it.
    """

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = parts.linear(width, width)
        self.key = parts.linear(width, width)
        self.value = parts.linear(width, width)
        self.dropout = parts.dropout(config.attention_probs_dropout_prob)
        self.projection: Callable[[SelfAttention, Tensor], Tensor] = packed_projection
        self._versions: list[int] = []

    def packed(self) -> tuple[Tensor, Tensor]:
        """Weight [3H, H] and bias [3H] over the storage of query, key and value, no gradient."""
        layers = (self.query, self.key, self.value)
        weights = [layer.weight for layer in layers]
        packed = _packed(weights), _packed([layer.bias for layer in layers])
        if not weights[0].is_inference():
            # The packed tensor has query's version: a change of key or value must show there, too.
            versions = [weight._version for weight in weights[1:]]
            if versions != self._versions:
                torch.autograd.graph.increment_version(weights[0])
                self._versions = versions
        return packed

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, H] -> [T, H]."""
        qkv = self.projection(self, x)  # [T, 3H]
        p = self.dropout.p if self.training else 0.0
        if qkv.device.type == "cpu" and (p or max(s.length for s in layout.squares) < LONG):
            keeps: list[Tensor | None] = []
            for square in layout.squares:
                # The dropout of ones is its own scaled mask.
                ones = qkv.new_ones(square.rows, self.heads * square.length**2) if p else None
                shape = (square.rows, self.heads, square.length, square.length)
                keeps.append(None if ones is None else self.dropout(ones).view(shape))
            return cpu_attention(qkv, keeps, layout, self.heads)
        cells, contexts = layout.pad(qkv), []
        for square in layout.squares:
            own = cells[square.cells].view(square.rows, square.length, 3, self.heads, -1)
            q, k, v = own.permute(2, 0, 3, 1, 4)  # [b, h, s, d]
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=square.mask, dropout_p=p)
            contexts.append(found.transpose(1, 2).reshape(-1, qkv.shape[1] // 3))
        return layout.unpad(torch.cat(contexts))


def packed_projection(attention: SelfAttention, x: Tensor) -> Tensor:
    """Query, key and value of [T, H] in one GEMM: [T, 3H]."""
    layers = (attention.query, attention.key, attention.value)
    if any(layer.weight.requires_grad for layer in layers):
        weight = torch.cat([layer.weight for layer in layers])
        return F.linear(x, weight, torch.cat([layer.bias for layer in layers]))
    return F.linear(x, *attention.packed())


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """One tensor over the parts' shared storage; moves them there when they are apart.

    Moving a module, copying it or giving it new parameters takes the parts apart, so this looks
    each time instead of trusting a flag.
    """
    first, rows = parts[0].detach(), parts[0].shape[0]
    step = first.numel()
    base = first.storage_offset()
    together = all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == base + i * step
        for i, part in enumerate(parts)
    )
    if not together:
        # Parameters made in inference mode could never be trained again.
        with torch.inference_mode(False):
            first = torch.cat([part.detach() for part in parts])
            for part, block in zip(parts, first.split(rows), strict=True):
                part.data = block
        base = 0
    return first.as_strided((len(parts) * rows, *first.shape[1:]), first.stride(), base)


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, width: int, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        self.dense = parts.linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = parts.dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, width], [T, H] -> [T, H]."""
        return self.LayerNorm(self.dropout(self.dense(x), residual))


class Layer(nn.Module):
    """One Transformer layer (post-LayerNorm, as in BERT)."""

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        attention = {
            "self": SelfAttention(config, parts),
            "output": ResidualOutput(width, config, parts),
        }
        self.attention = nn.ModuleDict(attention)
        self.intermediate = dense(parts.linear(width, wide), ACTIVATIONS[config.hidden_act]())
        self.output = ResidualOutput(wide, config, parts)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, H] -> [T, H]."""
        x = self.attention["output"](self.attention["self"](x, layout), x)
        return self.output(self.intermediate(x), x)


def dense(linear: nn.Linear, activation: nn.Module) -> nn.Sequential:
    """A linear layer, under the name "dense", and its activation."""
    return nn.Sequential(OrderedDict(dense=linear, activation=activation))


class Encoder(nn.Module):
    """The stack of layers.

    With `recompute`, only each layer's input is kept for backward, which computes the layer again
    (Chen et al. 2016) with the same random numbers; what it reads must not change in between.
    """

    recompute = False

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, parts) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, layout: Layout) -> list[Tensor]:
        """[T, H] -> the input and every layer's output, each [T, H]."""
        states = [x]
        for layer in self.layer:
            if self.recompute:
                states.append(checkpoint(layer, states[-1], layout, use_reentrant=False))
            else:
                states.append(layer(states[-1], layout))
        return states


class BertModel(nn.Module):
    """The encoder, with the names and numbers of `transformers.BertModel`, built of `parts`."""

    def __init__(self, config: BertConfig, parts: Parts = Parts()) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, parts)
        self.encoder = Encoder(config, parts)
        # tanh(dense) of the first token.
        self.pooler = dense(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())

    def encode(self, ids: Tensor, types: Tensor, layout: Layout) -> list[Tensor]:
        """The real tokens' states after the embeddings and each layer: layers + 1 of [T, H].

        `ids` and `types` are int64 [T]. Raises ValueError when a row is longer than the position
        embeddings.
        """
        limit, longest = self.config.max_position_embeddings, max(s.length for s in layout.squares)
        if longest > limit:
            raise ValueError(f"input_ids has length {longest} (expected <= {limit})")
        return self.encoder(self.embeddings(ids, types, layout.positions), layout)

    def forward(
        self,
        input_ids: Tensor,  # int64 [B, S]
        attention_mask: Tensor | None = None,  # [B, S], 1 at real tokens; None means all
        token_type_ids: Tensor | None = None,  # int64 [B, S]; None means zeros
    ) -> BertOutput:
        """As `encode`, padded: hidden states are [B, S, H], zeros at padding."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = given.bool()
        layout = Layout.of(real)
        tokens = self.encode(input_ids[real], types[real], layout)
        states = tuple(layout.pad(t).view(*real.shape, -1) for t in tokens)
        return BertOutput(states[-1], self.pooler(states[-1][:, 0]), states)
