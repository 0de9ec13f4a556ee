"""minBERT: BERT or RoBERTa under Hugging Face's parameter names, computed on real tokens only.

Every GEMM, LayerNorm, GELU and dropout runs on tokens (see layout.py), and only attention sees the
padded square. At line ends: B batch, S sequence, T real tokens, H hidden, h heads, d head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora.bert.attention import attention
from fastlora.bert.config import BertConfig
from fastlora.bert.layout import Layout

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), partial(nn.GELU, "tanh"))


class Dropout(nn.Dropout):
    """`nn.Dropout` that adds a residual."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Drop elements of `input`, then add `residual` of the same shape."""
        dropped = super().forward(input)
        return dropped if residual is None else dropped + residual


@dataclass(frozen=True)
class Parts:
    """The module classes that an encoder is built of; callers may pass faster equivalents."""

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
    """Multi-head attention; LoRA replaces `projection`, which computes query, key and value."""

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (parts.linear(width, width) for _ in range(3))
        self.dropout = parts.dropout(config.attention_probs_dropout_prob)
        self.projection: Callable[[SelfAttention, Tensor], Tensor] = project

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, H] -> [T, H]."""
        p = self.dropout.p if self.training else 0.0
        return attention(self.projection(self, x), layout, self.heads, self.dropout, p)


def project(attention: SelfAttention, x: Tensor) -> Tensor:
    """Query, key and value of [T, H], one by one: [T, 3H]."""
    return torch.cat([layer(x) for layer in (attention.query, attention.key, attention.value)], 1)


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
        attention, output = SelfAttention(config, parts), ResidualOutput(width, config, parts)
        self.attention = nn.ModuleDict({"self": attention, "output": output})
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

    With `recompute`, only each layer's input is kept, and backward computes the layer again (Chen
    et al. 2016). Nothing that it reads may change in between.
    """

    recompute = False

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, parts) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, layout: Layout) -> list[Tensor]:
        """[T, H] -> the input and every layer's output, each [T, H]."""
        states = [x]
        for layer in self.layer:
            call = partial(checkpoint, layer, use_reentrant=False) if self.recompute else layer
            states.append(call(states[-1], layout))
        return states


class BertModel(nn.Module):
    """The encoder, with the parameter names and outputs of transformers' classes."""

    def __init__(self, config: BertConfig, parts: Parts = Parts()) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, parts)
        self.encoder = Encoder(config, parts)
        # tanh(dense) of the first token.
        self.pooler = dense(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())

    def encode(
        self,
        input_ids: Tensor,  # int64 [B, S]
        layout: Layout,  # if it was made on the host, nothing waits for the device
        token_type_ids: Tensor | None = None,  # int64 [B, S]; None means zeros
    ) -> list[Tensor]:
        """The real tokens' states after the embeddings and each layer: layers + 1 of [T, H].

        Raises ValueError when S is 0 or exceeds the position embeddings.
        """
        length, limit = input_ids.shape[1], self.config.longest
        if not 1 <= length <= limit:
            raise ValueError(f"input_ids has length {length} (expected 1 to {limit})")
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        counted = input_ids.ne(padding := self.config.first_position - 1)  # BERT's: all but -1
        positions = counted.cumsum(1).mul_(counted).add_(padding)
        real = slice(None) if layout.index is None else layout.index
        flat = [t.flatten()[real] for t in (input_ids, types, positions)]
        return self.encoder(self.embeddings(*flat), layout)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,  # [B, S], 1 at real tokens; None means all
        token_type_ids: Tensor | None = None,
    ) -> BertOutput:
        """As `encode`, padded: hidden states are [B, S, H], zeros at padding.

        The pooler reads each row's first token, or zeros if that is padding.
        """
        layout = Layout.of(attention_mask, input_ids.shape)
        states = tuple(layout.pad(t) for t in self.encode(input_ids, layout, token_type_ids))
        return BertOutput(states[-1], self.pooler(states[-1][:, 0]), states)
