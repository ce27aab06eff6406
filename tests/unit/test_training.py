"""The training loop: what trains, repeatability, early stopping, evaluation by token and by row, generation."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    get_linear_schedule_with_warmup,
)

from lora_edu.files import data_path
from lora_edu.lab.datasets import collate, encode, load_dataset, shuffled_batches
from lora_edu.lab.schedules import rate_factor
from lora_edu.lab.training import accuracy, evaluate, generate, set_seed, train


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data_path("tiny"))


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode(load_dataset("devils_dictionary")[:40], tokenizer, max_length=24)


@pytest.fixture
def model():
    """A Llama-shaped model small enough that a step takes milliseconds."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_loss_falls_and_only_what_requires_a_gradient_moves(model, rows):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    before = state(model)
    history = train(model, rows, steps=12, learning_rate=1e-2, batch_size=4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "mlp" in name}
    assert history.steps == list(range(1, 13))
    assert history.train_loss[-1] < history.train_loss[0]


def test_the_model_goes_where_it_trains_and_comes_back(model, rows):
    """There is one device here, so count the moves: to Accelerate's, and home."""
    moves, move = [], model.to
    model.to = lambda device: moves.append(torch.device(device)) or move(device)
    train(model, rows, steps=1, batch_size=4)
    assert moves == [torch.device("cpu")] * 2


def test_same_seed_same_losses_other_seed_other_batches(model, rows):
    model.model.layers[0].self_attn.attention_dropout = 0.5  # something random inside the model
    start, runs = state(model), []
    for seed in (3, 3, 4):
        model.load_state_dict(start)
        runs.append(train(model, rows, steps=4, batch_size=4, seed=seed).train_loss)
    assert runs[0] == runs[1] != runs[2]


def test_the_order_of_the_batches_depends_on_the_seed_only():
    def first(seed: int) -> list[list[int]]:
        torch.rand(seed + 5)  # whatever the caller drew before
        batches = shuffled_batches(10, 4, seed)
        return [next(batches) for _ in range(5)]

    assert first(0) == first(0) != first(1)
    assert sorted(row for batch in first(0) for row in batch) == sorted(2 * list(range(10)))  # every row twice


def test_the_callers_random_state_is_left_alone(model, rows, tokenizer):
    set_seed(1)
    expected = torch.rand(3)
    set_seed(1)
    train(model, rows, steps=2, batch_size=2)
    generate(model, tokenizer, ["word:"], max_new_tokens=2, do_sample=True)
    assert torch.equal(torch.rand(3), expected)


def test_held_out_losses_by_name_start_at_step_zero(model, rows):
    before = evaluate(model, rows[:5])
    history = train(model, rows, steps=5, batch_size=2, eval_every=2, eval_data={"a": rows[:5], "b": rows[5:9]})
    assert history.eval_steps == [0, 2, 4, 5]
    assert history.eval_loss["a"][0] == before
    assert history.eval_loss["a"][-1] == evaluate(model, rows[:5])
    assert len(history.eval_loss["b"]) == 4
    assert list(train(model, rows, steps=1, eval_data=rows[:3]).eval_loss) == ["held-out"]


def test_early_stopping_puts_the_best_weights_back(model, rows):
    far = [{**row, "labels": [-100, *reversed(row["input_ids"][1:])]} for row in rows[:6]]  # gets worse as we train
    train(model, far, steps=10, learning_rate=1e-2)
    history = train(model, rows, steps=50, learning_rate=1e-2, eval_data=far, eval_every=1, patience=3)
    losses = history.eval_loss["held-out"]
    assert history.stopped_early
    assert len(losses) == history.best_step + 3 + 1
    assert losses[history.eval_steps.index(history.best_step)] == min(losses)
    assert evaluate(model, far) == pytest.approx(min(losses), abs=1e-6)
    assert min(losses) < losses[-1]


def test_without_patience_the_last_weights_stay(model, rows):
    history = train(model, rows, steps=6, learning_rate=3e-2, eval_data=rows[:6], eval_every=3)
    assert not history.stopped_early
    assert evaluate(model, rows[:6]) == pytest.approx(history.eval_loss["held-out"][-1], abs=1e-6)


def test_it_is_the_plain_loop_of_lesson_07(model, rows):
    start, order = state(model), shuffled_batches(len(rows), 2, 0)
    ours = train(model, rows, steps=5, batch_size=2, learning_rate=1e-2, warmup_steps=3).train_loss
    trained = state(model)
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    by_hand = []
    for step in range(1, 6):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, step / 3)
        loss = model(**collate([rows[i] for i in next(order)], 0)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        by_hand.append(loss.item())
    assert by_hand == pytest.approx(ours, abs=1e-5)
    assert all(torch.allclose(value, trained[name], atol=1e-5) for name, value in model.state_dict().items())


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of each of AdamW's steps."""
    noted, step = [], torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        noted.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return noted


def test_warm_up_rises_linearly(model, rows, rates):
    train(model, rows, steps=6, learning_rate=0.4, warmup_steps=4)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_a_linear_schedule_falls_to_nearly_zero(model, rows, rates):
    train(model, rows, steps=6, learning_rate=0.4, warmup_steps=2, schedule="linear")
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])
    del rates[:]
    train(model, rows, steps=4, learning_rate=0.4, schedule="linear")
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_a_linear_schedule_falls_as_transformers_does():
    """After warm-up; theirs begins it with a step of rate zero, which trains nothing."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=10).lr_lambdas[0]
    ours = rate_factor("linear", 10, 3)
    assert [ours(done) for done in range(3, 10)] == pytest.approx([theirs(done) for done in range(3, 10)])
    assert theirs(0) == 0 < ours(0)


@pytest.mark.errors
def test_a_schedule_that_cannot_be_followed(model, rows):
    with pytest.raises(ValueError, match="schedule='cosine': expected one of 'constant', 'linear'"):
        train(model, rows, steps=2, schedule="cosine")
    with pytest.raises(ValueError, match="warmup_steps=2 of 2 steps leave none in which the rate could fall"):
        train(model, rows, steps=2, warmup_steps=2, schedule="linear")


def test_modules_may_add_to_the_loss_and_see_the_gradients(model, rows):
    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))
            self.seen: list[tuple[int, float]] = []

        def extra_loss(self):
            return 3 * self.weight

        def after_backward(self, step):
            self.seen.append((step, self.weight.grad.item()))

    model.watching = Watching()
    plain = evaluate(model, rows[:4])
    history = train(model, rows[:4], steps=2, batch_size=4, learning_rate=1e-3)
    assert model.watching.seen == [(1, 3.0), (2, 3.0)]
    assert model.watching.weight.item() < 2.0
    assert history.train_loss[0] == pytest.approx(plain, abs=1e-4)  # the history holds the model's own loss


def test_evaluate_weighs_tokens_not_batches(model, rows):
    mixed = sorted(rows[:9], key=lambda row: len(row["input_ids"]))
    losses = [evaluate(model, [row]) for row in mixed]
    tokens = [sum(label != -100 for label in row["labels"][1:]) for row in mixed]
    expected = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    assert evaluate(model, mixed, batch_size=4) == pytest.approx(expected, abs=1e-4)
    model.train()
    evaluate(model, mixed)
    assert model.training


def test_the_first_token_is_never_predicted(model):
    """Rows without a prompt carry a label on their first token, which no position predicts: it must not weigh."""
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (2, 9, 4)]
    with torch.no_grad():
        logits = [model(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    tokens = [nn.functional.cross_entropy(z[:-1], torch.tensor(row["input_ids"][1:]), reduction="none")
              for z, row in zip(logits, rows, strict=True)]  # fmt: skip
    assert evaluate(model, rows, batch_size=1) == pytest.approx(torch.cat(tokens).mean().item(), rel=1e-5)


class Given(nn.Module):
    """A classifier whose logits are known: row i, whose tokens are all i, gets the i-th line."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, labels):
        logits = self.logits[input_ids[:, 0]]
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def classified(labels: list[int]) -> list[dict]:
    return [{"input_ids": [i] * (1 + i % 3), "labels": label} for i, label in enumerate(labels)]


def test_accuracy_counts_the_largest_logits():
    logits = torch.tensor([[3.0, 1, 2], [0, 0.1, 0], [-1, -3, -2], [0, 0, 9], [5, 4, 3]])
    assert accuracy(Given(logits), classified([0, 1, 0, 2, 0])) == 1
    assert accuracy(Given(logits), classified([0, 1, 2, 1, 0])) == 0.6
    assert accuracy(Given(logits), classified([1, 0, 2, 1, 2])) == 0
    assert accuracy(Given(logits), classified([0, 1, 2, 1, 0]), batch_size=2) == 0.6


def test_a_classifiers_loss_is_the_mean_over_rows():
    torch.manual_seed(1)
    logits, labels = torch.randn(7, 4), [3, 0, 1, 1, 2, 0, 3]
    expected = nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    for batch_size in (1, 3, 32):  # the last batch is smaller, and must not weigh more
        assert evaluate(Given(logits), classified(labels), batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(params=[0, 7, None])
def classifier(request):
    """A Llama that classifies; 7 is a pad token as SmolLM2's, which is not 0. None: it has none, so one row a batch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, pad_token_id=request.param, bos_token_id=1, num_labels=3, **sizes)
    return LlamaForSequenceClassification(config).eval()


def test_padding_does_not_matter_to_a_classifier(classifier):
    """It reads each row's last token, which it finds by its own pad token."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2, 9, 5, 3, 8, 6]
    rows = [{"input_ids": torch.randint(8, 64, (n,), generator=generator).tolist(), "labels": n % 3} for n in lengths]
    with torch.no_grad():
        alone = torch.cat([classifier(torch.tensor([row["input_ids"]])).logits for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    size = 1 if classifier.config.pad_token_id is None else 6
    expected = nn.functional.cross_entropy(alone, labels).item()
    assert evaluate(classifier, rows, size) == pytest.approx(expected, rel=1e-5)
    assert accuracy(classifier, rows, size) == (alone.argmax(-1) == labels).float().mean().item()


def test_a_classifier_trains_and_keeps_its_mode(classifier):
    rows = [{"input_ids": [1, 10 + i % 3, 20], "labels": i % 3} for i in range(12)]
    size = 1 if classifier.config.pad_token_id is None else 6
    history = train(classifier, rows, steps=60, learning_rate=1e-2, batch_size=size, eval_data=rows[:size])
    assert history.eval_loss["held-out"][-1] < 0.1 < history.eval_loss["held-out"][0]
    assert accuracy(classifier, rows, size) == 1
    classifier.train()
    accuracy(classifier, rows[:1])
    assert classifier.training


@pytest.mark.errors
def test_nothing_to_evaluate(model, rows):
    with pytest.raises(ValueError, match="no rows to evaluate on"):
        accuracy(model, [])
    with pytest.raises(ValueError, match=r"accuracy is for rows with one label each \(encode_topics\)"):
        accuracy(model, rows)
    with pytest.raises(ValueError, match="every label is -100"):
        evaluate(model, [{"input_ids": [1, 5, 6], "labels": [-100] * 3}])


def test_gradients_are_clipped_before_the_update(model, rows, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(model, rows, steps=2, batch_size=4, max_grad_norm=0.01)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_generate_returns_the_new_text_only_and_stops_at_eos(model, rows, tokenizer):
    entries = [{"word": "cat", "pos": "noun", "definition": "a mouse's reason"}]
    entries += [{"word": "parliament", "pos": "noun", "definition": "a house"}]
    train(model, encode(entries, tokenizer), steps=120, learning_rate=1e-2, batch_size=2)
    together = generate(model, tokenizer, ["cat (noun):", "parliament (noun):"], max_new_tokens=30)
    assert together == ["a mouse's reason", "a house"]  # different prompt lengths: padding must not matter
    assert generate(model, tokenizer, ["parliament (noun):"], max_new_tokens=30) == together[1:]
    assert generate(model, tokenizer, ["cat (noun):"], max_new_tokens=1) != together[:1]


def test_sampling_is_fixed_by_its_seed(model, tokenizer):
    def draw(seed: int) -> list[str]:
        return generate(
            model, tokenizer, ["cat:", "dog:"], max_new_tokens=8, do_sample=True, temperature=1.0, seed=seed
        )

    assert draw(1) == draw(1) != draw(2)


def test_peft_models_train_and_generate(model, rows, tokenizer):
    adapted = get_peft_model(model, PeftConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    history = train(adapted, rows, steps=2, batch_size=2, eval_data=rows[:3])
    assert len(history.train_loss) == 2
    assert len(generate(adapted, tokenizer, ["cat:"], max_new_tokens=3)) == 1


def test_no_progress_bar_when_it_is_switched_off(model, rows, monkeypatch, capfd):
    monkeypatch.setenv("LORA_EDU_PROGRESS", "0")
    train(model, rows, steps=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.errors
def test_bad_calls_say_what_is_wrong(model, rows, tokenizer):
    with pytest.raises(ValueError, match="patience=2 needs eval_data"):
        train(model, rows, patience=2)
    with pytest.raises(ValueError, match="no rows to train on"):
        train(model, [])
    with pytest.raises(ValueError, match="steps=0"):
        train(model, rows, steps=0)
    with pytest.raises(ValueError, match="no rows to evaluate on"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="give a list with at least one prompt"):
        generate(model, tokenizer, "cat:")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing requires a gradient"):
        train(model, rows)
