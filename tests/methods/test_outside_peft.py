"""Files of the outside methods, read by PEFT, and PEFT's own, read by them: equal outputs for the methods PEFT has.

They carry another ``peft_type`` here, so that they are never taken for the package's own; that one word is changed.
"""

import json
import warnings

import peft
import pytest
import torch
from outside import adalora, ia3, loha, vera
from test_contract import METHODS, ROWS, TARGETS, adapt, outputs, plain_model, shake

from lora_edu import load_adapter, save_adapter
from lora_edu.lab.training import train

pytestmark = pytest.mark.parity
THEIRS = {
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS["biases"], feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(target_modules=TARGETS["biases"], r=6),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS["biases"], r=3, alpha=5, init_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=TARGETS["biases"], total_step=8, init_r=4),
}
OURS = {"ia3": ia3.IA3LikeConfig, "vera": vera.VeraLikeConfig, "loha": loha.LoHaLikeConfig}
OURS["adalora"] = adalora.AdaLoraLikeConfig


def call_it(directory, peft_type):
    path = directory / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["peft_type"] = peft_type
    path.write_text(json.dumps(fields))


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([row["input_ids"] for row in ROWS[:3]])).logits


@pytest.mark.parametrize("name", [*THEIRS, "pissa"])
def test_peft_reads_our_files(name, tmp_path):
    model = plain_model(dtype=torch.float32)
    adapt(model, name)
    shake(model)
    if name == "adalora":  # with rows lost on the way
        train(model, ROWS, steps=4, batch_size=6, learning_rate=2e-2)
    save_adapter(model, tmp_path)
    call_it(tmp_path, "LORA" if name == "pissa" else name.upper())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        theirs = peft.PeftModel.from_pretrained(plain_model(dtype=torch.float32), tmp_path).eval()
    assert torch.allclose(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_pefts_files(name, tmp_path):
    torch.manual_seed(3)
    theirs = peft.get_peft_model(plain_model(dtype=torch.float32), THEIRS[name]()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    call_it(tmp_path, OURS[name].peft_type)
    model = plain_model(dtype=torch.float32)
    load_adapter(model, tmp_path)
    assert torch.allclose(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs(model), outputs(plain_model(dtype=torch.float32)), atol=1e-4)
    assert METHODS[name].layers
