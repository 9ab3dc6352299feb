"""The callbacks for Lightning, transformers and accelerate, each in a real training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gradwatch.layers import clean_paths
from gradwatch.wire.frame import Frame, Manifest, Record, RunEnd

os.environ["HF_HUB_OFFLINE"] = "1"
Norms = dict[str, float]
Kept = Callable[[], list[Record]]
ALWAYS: dict[str, Any] = {"overhead_budget": 0.0, "norm_every": 1}


@pytest.fixture
def by_hand() -> Iterator[Callable[[nn.Module], list[Norms]]]:
    """Norms of the gradients that each optimizer step applies, in float64, taken by a hook."""
    hooks: list[Any] = []

    def take(model: nn.Module) -> list[Norms]:
        found: list[Norms] = []

        def note(optimizer: Any, args: Any, kwargs: Any) -> None:
            norms: Norms = {}
            seen: set[int] = set()  # a tied weight is one layer
            for path, module in clean_paths(model):
                for name, each in module.named_parameters(recurse=False):
                    if each.grad is not None and id(each) not in seen:
                        seen.add(id(each))
                        norms[f"{path}{name}"] = float(each.grad.double().norm())
            found.append(norms)

        # After the step, for Lightning computes gradients inside of it; steps leave them be.
        hooks.append(register_optimizer_step_post_hook(note))
        return found

    yield take
    for hook in hooks:
        hook.remove()


def assert_recorded(records: list[Record], expected: list[Norms], status: str = "finished") -> None:
    """Every step has a frame, with the norms that were taken by hand."""
    manifest = next(record for record in records if isinstance(record, Manifest))
    names = [layer.name for layer in manifest.layers]
    frames = sorted(
        (record for record in records if isinstance(record, Frame)), key=lambda frame: frame.step
    )
    assert [frame.step for frame in frames] == list(range(1, len(expected) + 1))
    assert expected
    for frame, norms in zip(frames, expected, strict=True):
        row = frame.row("norm")
        assert row is not None
        named = zip(names, row.tolist(), strict=True)
        found = {name: norm for name, norm in named if not np.isnan(norm)}
        assert found == pytest.approx(norms, rel=1e-5)
    ends = [record for record in records if isinstance(record, RunEnd)]
    assert [end.status for end in ends] == [status]


def scalars(records: list[Record]) -> dict[str, list[float]]:
    """Every scalar of the frames, in their order."""
    found: dict[str, list[float]] = {}
    for record in records:
        if isinstance(record, Frame):
            for name, value in record.scalars.items():
                found.setdefault(name, []).append(value)
    return found


def config_of(spool: Path) -> Mapping[str, Any]:
    from gradwatch.spool import Spool

    (folder,) = spool.iterdir()
    opened = Spool.open(folder)
    assert opened is not None
    try:
        assert opened.run is not None
        return {"name": opened.run.name, **opened.run.config}
    finally:
        opened.close()


class Sentences(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(50, (12,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def gpt() -> Any:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_a_transformers_trainer_is_recorded_with_its_arguments_and_metrics(
    tmp_path: Path, spool: Path, kept: Kept, by_hand: Callable[[nn.Module], list[Norms]]
) -> None:
    import transformers

    from gradwatch.integrations.transformers import GradwatchCallback

    model = gpt()
    expected = by_hand(model)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), run_name="small-gpt", max_steps=5, logging_steps=1,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.5,
            learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=Sentences(),
        callbacks=[GradwatchCallback(**ALWAYS)],
    )  # fmt: skip
    trainer.train()

    assert_recorded(kept(), expected)
    told = scalars(kept())
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert told["loss"] == pytest.approx(logged)
    assert len(told["grad_norm"]) == 5
    config = config_of(spool)
    assert config["name"] == "small-gpt"
    assert config["gradient_accumulation_steps"] == 2
    assert config["model"]["n_embd"] == 16


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_lightning_trainer_is_recorded_with_hyperparameters_and_metrics(
    package: str,
    tmp_path: Path,
    spool: Path,
    kept: Kept,
    by_hand: Callable[[nn.Module], list[Norms]],
) -> None:
    from gradwatch.integrations.lightning import GradwatchCallback

    pl = import_module(package)
    module = lightning_module(pl)
    expected = by_hand(module)
    trainer = lightning_trainer(pl, tmp_path, GradwatchCallback(name="lit", **ALWAYS))
    trainer.fit(module, batches(), batches())

    assert len(expected) == 6
    assert_recorded(kept(), expected)
    told = scalars(kept())
    assert told["loss"] == pytest.approx(module.seen)
    assert told["val_loss"][-1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert config_of(spool) == {"name": "lit", "width": 8}


def test_a_lightning_training_that_fails_is_recorded_as_failed(
    tmp_path: Path, kept: Kept, by_hand: Callable[[nn.Module], list[Norms]]
) -> None:
    import lightning.pytorch as pl

    from gradwatch.integrations.lightning import GradwatchCallback

    module = lightning_module(pl, fails_at=4)
    expected = by_hand(module)
    with pytest.raises(ValueError, match="a bad batch"):
        lightning_trainer(pl, tmp_path, GradwatchCallback(**ALWAYS)).fit(module, batches())
    assert len(expected) == 3
    assert_recorded(kept(), expected, "failed")


def batches() -> DataLoader[Any]:
    data = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(data, data.sum(1, keepdim=True)), batch_size=8)


def lightning_trainer(pl: Any, folder: Path, callback: Any) -> Any:
    return pl.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, gradient_clip_val=0.5, log_every_n_steps=1,
    )  # fmt: skip


def lightning_module(pl: Any, fails_at: int = 0) -> Any:
    class Module(pl.LightningModule):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))
            self.seen: list[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            if len(self.seen) + 1 == fails_at:
                raise ValueError("a bad batch")
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.seen.append(float(loss.detach()))
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    return Module()


def test_an_accelerate_script_is_recorded_with_its_configuration_and_metrics(
    spool: Path, kept: Kept, by_hand: Callable[[nn.Module], list[Norms]]
) -> None:
    import accelerate

    from gradwatch.integrations.accelerate import GradwatchTracker

    accelerator = accelerate.Accelerator(
        cpu=True,
        log_with=GradwatchTracker(name="speedy", **ALWAYS),
        gradient_accumulation_steps=3,
    )
    accelerator.init_trackers("project", config={"rate": 0.1})
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    expected = by_hand(model)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batches()
    )
    losses: list[float] = []
    for _ in range(4):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if accelerator.sync_gradients:
                    losses.append(float(loss))
                    accelerator.log({"loss": losses[-1], "note": "no number"})
                optimizer.zero_grad()
    accelerator.end_training()

    assert len(expected) == 4
    assert_recorded(kept(), expected)
    assert scalars(kept())["loss"] == pytest.approx(losses)
    assert config_of(spool) == {"name": "speedy", "rate": 0.1}


TRAINER_SCRIPT = """
import torch, sys
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

class Sentences(Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, index):
        tokens = torch.arange(index, index + 12) % 50
        return {"input_ids": tokens, "labels": tokens}

config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                    bos_token_id=0, eos_token_id=0)
arguments = TrainingArguments(output_dir=sys.argv[1], max_steps=20, report_to=[], use_cpu=True,
                              save_strategy="no", learning_rate=1e-3)
Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=Sentences()).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "doctor"])
def test_a_trainers_script_is_recorded_and_checked_as_it_is(
    command: str, tmp_path: Path, spool: Path, kept: Kept
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINER_SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", command, str(script), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GRADWATCH_OVERHEAD_BUDGET": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if command == "doctor":
        assert " wrong" not in done.stdout
        assert "passed   Learns one batch" in done.stdout
        return
    records = kept()
    (manifest, *_) = (record for record in records if isinstance(record, Manifest))
    names = [layer.name for layer in manifest.layers]
    assert "transformer.wte.weight" in names
    assert "transformer.h.1.mlp.c_fc.weight" in names
    assert len([record for record in records if isinstance(record, Frame)]) == 20
