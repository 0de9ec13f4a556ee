"""What `import fastlora` gives: public names, their texts and types, and how little it loads."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastlora

LIBRARY = [
    name for name in fastlora.__all__ if fastlora._MODULE_OF.get(name, "").startswith("lora")
]


def test_public_names_are_listed_and_there():
    assert set(fastlora.__all__) <= set(dir(fastlora))
    assert {"LoRALinear", "LoraConfig", "inject", "use_adapter", "save_adapter"} <= {*LIBRARY}
    assert {"UserError", "kernels"} <= {*fastlora.__all__}
    for name in fastlora.__all__:
        assert getattr(fastlora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'slip'"):
        fastlora.slip  # noqa: B018
    assert len(set(fastlora.__all__)) == len(fastlora.__all__)


def test_the_package_is_marked_as_typed():
    assert (Path(fastlora.__file__).parent / "py.typed").exists()


def public_things():
    for name in LIBRARY:
        thing = getattr(fastlora, name)
        yield name, thing
        if inspect.isclass(thing):
            for key, value in vars(thing).items():
                own = inspect.isfunction(value) or isinstance(value, (property, classmethod))
                if own and not key.startswith("_") and key not in ("forward", "reset_parameters"):
                    yield f"{name}.{key}", getattr(value, "__func__", value)


@pytest.mark.parametrize(("name", "thing"), list(public_things()))
def test_public_things_have_a_text_and_types(name, thing):
    assert inspect.getdoc(thing), f"{name} has no text"
    if inspect.isfunction(thing):
        parameters = inspect.signature(thing).parameters.values()
        untyped = [p.name for p in parameters if p.annotation is p.empty]
        assert [p for p in untyped if p not in ("self", "cls")] == []
        assert inspect.signature(thing).return_annotation is not inspect.Signature.empty


def loaded_after(code):
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_library_loads_no_command_line_and_no_bert():
    code = (
        "import fastlora, sys; assert callable(fastlora.kernels.lora_grouped)\n"
        "assert not any(name.startswith('fastlora.lora') for name in sys.modules)\n"
        "import torch; from fastlora import LoRALinear, LoraConfig, inject, save_adapter\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "inject(model, LoraConfig(targets='0')); model(torch.ones(2, 4)).sum().backward()"
    )
    found = loaded_after(code)
    ours = {name for name in found if name.split(".")[0] == "fastlora"}
    assert "fastlora.lora.layer" in ours
    foreign = {"cyclopts", "tomlkit", "rich", "tokenizers", "tensorboard", "transformers", "peft"}
    assert not foreign & found
    assert not {name for name in ours if name.startswith(("fastlora.bert", "fastlora.cli"))}
    rooms = {name.split(".")[1] for name in ours if "." in name}
    assert rooms <= {"errors", "files", "kernels", "lora", "tensors"}


def test_importing_fastlora_alone_loads_no_torch():
    assert "torch" not in loaded_after("import fastlora; dir(fastlora)")


def test_two_losses_on_one_optimizer_work_after_the_import():
    """A hook on all optimisers once made parameters count as changed that a step never touched."""
    import torch
    from torch import nn

    a, b = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))
    optimizer = torch.optim.AdamW([*a.parameters(), *b.parameters()])
    first, second = (part(torch.randn(3, 4)).square().sum() for part in (a, b))
    first.backward()
    optimizer.step()  # b has no gradients, and its weights stay as they are
    second.backward()
    kept = sys.modules["torch.optim.optimizer"]
    assert not kept._global_optimizer_post_hooks and not kept._global_optimizer_pre_hooks
