"""`fastlora export`: a task's model in the form of transformers' sequence classifiers.

Those read the first token's state, whereas our heads read the mean over all tokens, normalised by
LayerNorm. One more layer of BERT computes this: its attention has queries of zero, which gives the
mean; large factors make its residual connection vanish beside that; its LayerNorm normalises; and
its feed-forward network is zero. The classifier's tanh is used where it is linear. In fp32, the
logits differ from ours by about 1e-6 of the largest one.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.data.tasks import Task
from fastlora.devices import usual_modes
from fastlora.errors import UserError
from fastlora.files import atomic_folder, read_json, write_json
from fastlora.lora.files import CONFIG, load_adapter, save_adapter
from fastlora.multitask.heads import LinearHead
from fastlora.runs.trained import Trained, check_empty, merged_weights
from fastlora.tensors import write_tensors

# Powers of two, so that nothing is rounded, which also keep all values in fp16's range. The mean is
# scaled to SMALL * LARGE * LARGE = 2^12, and the first token's state to SMALL.
SMALL, LARGE = 2.0**-10, 2.0**11
LINEAR = 2.0**-12  # the scale of tanh's argument
PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


@usual_modes()
def export(trained: Trained, task: str | None, out: Path, merged: bool) -> None:
    """Write a folder for AutoModelForSequenceClassification: all weights, or an adapter of PEFT.

    The base of the adapter is the run's encoder, built with the folder's config.json. A regression
    gives values in the labels' unit. Raises UserError for a pair task that encodes its texts
    separately, for an adapter where the task has none or several, and if `out` is not empty.
    """
    check_empty(out)
    chosen, net = trained.task(task), trained.model
    head, adapters = net.heads[chosen.name], net.adapters(chosen.name)
    if not isinstance(head, LinearHead):
        what = f"task {chosen.name!r} encodes the two texts of a pair separately, which no sequence"
        raise UserError(f"{what} classifier does (expected a run with --pairs joint)")
    if not merged and len(adapters) != 1:
        raise UserError(f"task {chosen.name!r} has {len(adapters)} adapters: only --merged works")
    with merged_weights(trained, chosen.name) if merged else nullcontext():
        model, added = _sequence_classifier(trained, chosen, head)
    with atomic_folder(out) as building:
        if merged:
            write_tensors(building / "model.safetensors", model.state_dict())
        else:
            save_adapter(net.encoder, building, adapters[0], heads=False)
            load_adapter(model.base_model, building, adapters[0])
            model.requires_grad_(False)
            for module in added:  # `save_adapter` writes what is trainable
                module.requires_grad_(True)
            save_adapter(model, building, adapters[0], base_model=trained.source.name)
            write_json(building / CONFIG, read_json(building / CONFIG) | {"task_type": "SEQ_CLS"})
        model.config.save_pretrained(building)
        trained.source.copy_tokenizer(building)


@torch.no_grad()
@torch.random.fork_rng([])  # new layers draw random weights before they get ours
def _sequence_classifier(
    trained: Trained, task: Task, head: LinearHead
) -> tuple[Any, list[nn.Module]]:
    """The model of transformers, and those of its modules that differ from the encoder's."""
    # Imported here because it takes a second.
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(trained.source.folder)  # nosec B615
    config.num_hidden_layers += 1
    config.id2label = dict(enumerate(task.labels or [task.label]))
    config.label2id = {label: index for index, label in config.id2label.items()}
    config.problem_type = PROBLEMS[task.kind]
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    config.architectures = [type(model).__name__]
    encoder, classifier = model.base_model, model.classifier
    named = trained.model.encoder.named_parameters()
    weights = {name: value.cpu() for name, value in named if "lora_" not in name}
    encoder.load_state_dict(weights, strict=False)
    *_, last, extra = encoder.encoder.layer
    norm, eye = last.output.LayerNorm, torch.eye(config.hidden_size)
    for parameter in (norm.weight, norm.bias):
        parameter.mul_(SMALL)
    for parameter in extra.parameters():
        parameter.zero_()
    extra.attention.self.value.weight.copy_(LARGE * eye)
    extra.attention.output.dense.weight.copy_(LARGE * eye)
    for block in (extra.attention, extra):
        block.output.LayerNorm.weight.fill_(1)
    # RoBERTa has its dense layer in the classifier, BERT in the pooler.
    in_pooler = isinstance(classifier, nn.Linear)
    dense = encoder.pooler.dense if in_pooler else classifier.dense
    output = classifier if in_pooler else classifier.out_proj
    dense.weight.copy_(LINEAR * eye)
    dense.bias.zero_()
    width, low = (1.0, 0.0) if task.labels else (task.high - task.low, task.low)
    output.weight.copy_(width * head.factor / LINEAR * head.linear.weight)
    output.bias.copy_(low + width * (head.offset + head.factor * head.linear.bias))
    return model, [norm, extra, *[encoder.pooler] * in_pooler, classifier]
