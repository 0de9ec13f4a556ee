"""Small models of each family with PEFT's adapters, and PEFT itself as the judge."""

import peft
import torch
import transformers as hf

SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
    pad_token_id=1,
)
DISTIL = dict(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48, pad_token_id=1)
# By family: the names of query and value, and of the classes in transformers.
FAMILIES = {
    "bert": ("query", "value", "Bert"),
    "roberta": ("query", "value", "Roberta"),
    "xlm_roberta": ("query", "value", "XLMRoberta"),
    "electra": ("query", "value", "Electra"),
    "camembert": ("query", "value", "Camembert"),
    "distilbert": ("q_lin", "v_lin", "DistilBert"),
    "mpnet": ("q", "v", "MPNet"),
}


def config_of(family, dropout=0.0):
    prefix = FAMILIES[family][2]
    if family == "distilbert":
        rates = dict(dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout)
        return hf.DistilBertConfig(**DISTIL, **rates)
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return getattr(hf, f"{prefix}Config")(**SIZES, **rates)


def plain_model(family="bert", head="ForSequenceClassification", dropout=0.0, implementation=None):
    torch.manual_seed(0)
    config = config_of(family, dropout)
    model = getattr(hf, f"{FAMILIES[family][2]}{head}")(config)
    if implementation:
        model.set_attn_implementation(implementation)
    # Weights of some size, so that mistakes show.
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embedding" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def linear_targets(model):
    """The names of all linear layers of the encoder."""
    encoder = model.base_model
    found = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)]
    return sorted({name.split(".", 3)[-1] for name in found if ".layer." in name})


def filled(model):
    """B is zero at first: give it values, so that adapters do something. Returns the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def with_lora(model, targets=None, dropout=0.0, task="SEQ_CLS", **settings):
    """PEFT's model around it, with an adapter that does something."""
    if targets is None:
        targets = list(FAMILIES[model.config.model_type.replace("-", "_")][:2])
    config = peft.LoraConfig(
        r=8, lora_dropout=dropout, target_modules=targets, task_type=task, **settings
    )
    return filled(peft.get_peft_model(model, config))


def batch(side="right", lengths=(9, 3, 1, 7), labels=True):
    """Token ids and a ragged mask."""
    generator = torch.Generator().manual_seed(2)
    length = max(lengths)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.randint(4, 50, mask.shape, generator=generator)
    found = {"input_ids": ids.where(mask.bool(), torch.tensor(1)), "attention_mask": mask}
    return found | ({"labels": torch.arange(len(lengths)) % 2} if labels else {})


def logits_and_gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_alike(ours, theirs, inputs, **tolerance):
    """The same logits and every gradient."""
    found, expected = (logits_and_gradients(model, inputs) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **tolerance, msg=lambda m, n=name: f"{n} {m}"
        )
