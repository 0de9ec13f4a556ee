"""The whole encoder, MiniLM's shape, LoRA r = 32 on query and value, against PEFT on BertModel.

One batch of 32 sentences of 18 to 24 tokens, so that padding decides little.
"""

import pytest
import torch
from implementations import PLACES

from fastlora import LoraConfig, inject, pack
from fastlora.bert.config import BertConfig
from fastlora.bert.layout import Layout
from fastlora.bert.model import BertModel
from fastlora.multitask.model import fuse
from fastlora.training.setup import PARTS

SHAPE = dict(
    vocab_size=1000,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
)
BATCH, SHORTEST, LONGEST, RANK = 32, 18, 24, 32


class Encoders:
    """The same encoder as PEFT runs it and as fastlora does; `states` are the real tokens'."""

    def __init__(self, device, dtype, dropout):
        transformers = pytest.importorskip("transformers")
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        self.device, self.models, weights = device, {}, None
        for attention in ("eager", "sdpa"):
            config = transformers.BertConfig(**SHAPE, **rates, attn_implementation=attention)
            base = transformers.BertModel(config)
            weights = weights or {name: t.clone() for name, t in base.state_dict().items()}
            base.load_state_dict(weights)
            setting = peft.LoraConfig(
                r=RANK, lora_alpha=16, lora_dropout=dropout, target_modules=["query", "value"]
            )
            self.models[f"peft {attention}"] = peft.get_peft_model(base, setting)
        ours = BertModel(BertConfig(**SHAPE, **rates), PARTS)
        ours.load_state_dict({n: t for n, t in weights.items() if "position_ids" not in n})
        fuse(ours)
        inject(ours, LoraConfig(r=RANK, alpha=16, dropout=dropout))
        self.models["fastlora"] = ours
        for model in self.models.values():
            torch.manual_seed(1)
            for name, parameter in sorted(model.named_parameters(), key=lambda n: n[0][-90:]):
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
                else:
                    parameter.data = parameter.data.to(dtype)
            model.to(device).train()
        pack(ours)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (BATCH,)).clamp_(max=LONGEST)
        lengths[0] = LONGEST
        self.mask = (torch.arange(LONGEST) < lengths[:, None]).to(device)
        self.ids = torch.randint(0, SHAPE["vocab_size"], self.mask.shape).to(device)

    def states(self, name):
        """[T, H] of the last layer."""
        if name == "fastlora":
            layout = Layout.of(self.mask, self.ids.shape)
            return self.models[name].encode(self.ids, layout)[-1]
        model = self.models[name]
        found = model(input_ids=self.ids, attention_mask=self.mask.long()).last_hidden_state
        return found[self.mask]

    def step(self, name):
        """A forward and backward pass; the gradients of the adapters, by layer."""
        parameters = {
            n.replace("base_model.model.", "").replace("weight", ""): p
            for n, p in self.models[name].named_parameters()
            if p.requires_grad
        }
        states = self.states(name)
        grads = torch.autograd.grad(states.float().square().mean(), list(parameters.values()))
        return dict(sorted(zip(parameters, grads, strict=True)))


def agrees(device, dtype, name):
    """Whether states and gradients are PEFT's, without dropout."""
    encoders = Encoders(device, dtype, 0.0)
    tolerance = dict(rtol=1e-3, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.1, atol=0.1)
    if not torch.allclose(encoders.states(name), encoders.states("peft eager"), **tolerance):
        return False
    pairs = zip(encoders.step(name).values(), encoders.step("peft eager").values(), strict=True)
    return all(torch.allclose(a, b, **tolerance) for a, b in pairs)


@pytest.mark.parametrize("name", ["peft sdpa", "fastlora"])
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("place", PLACES, ids=lambda p: p[0])
def test_encoder(compare, place, mode, name):
    encoders = Encoders(*place, 0.1)

    def run(which):
        return encoders.states(which) if mode == "forward" else encoders.step(which)

    facts = dict(name=name, agrees=agrees(*place, name))
    group = f"encoder {mode} {place[0]}: 6 x 384, batch {BATCH}, against peft eager"
    compare(group, lambda: run("peft eager"), lambda: run(name), place[0], **facts)
