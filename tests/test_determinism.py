"""The same seed gives the same weights: twice in one process, and with `full_determinism` on a processor."""

from __future__ import annotations

import pytest
import torch
from test_trainer import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")


def weights(folder, **settings):
    trainer = make_trainer(folder, max_steps=4, seed=3, learning_rate=1e-2, **settings)
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


# What full_determinism sets in the environment.
_SET = ["CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
        "FLASH_ATTENTION_DETERMINISTIC"]  # fmt: skip


@pytest.fixture
def settings_kept(monkeypatch):
    """Environment and algorithms of the process, as they were."""
    for name in _SET:
        # So that it is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.parametrize("loss", ["dpo", "beta_dpo"])
def test_the_same_seed_gives_the_same_weights(tmp_path, loss, settings_kept):
    first = weights(tmp_path / "1", loss=loss)
    second = weights(tmp_path / "2", loss=loss)
    assert all(map(torch.equal, first, second))
    strict = weights(tmp_path / "3", loss=loss, full_determinism=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert all(map(torch.equal, first, strict))
    other = weights(tmp_path / "4", loss=loss, data_seed=4)
    assert not all(map(torch.equal, first, other))
