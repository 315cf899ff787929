"""The command ``metamask-solo finetune``."""

from pathlib import Path

import pytest
import torch
from checkpoints_of_runs import write_run
from omegaconf import OmegaConf

from metamask_solo.checkpoints.reading import load_raw, read_checkpoint
from metamask_solo.commands import finetune
from metamask_solo.errors import UserError


@pytest.fixture
def config(tmp_path: Path, images: Path) -> Path:
    """A linear config for one epoch, that says nothing of fine-tuning."""
    cfg = {
        "name": "finetune-test",
        "backbone": {"name": "resnet18"},
        "pretrained_feature_extractor": str(write_run(tmp_path / "metamask", images)),
        "pretrain_method": "metamask",
        "data": {
            "dataset": "custom",
            "train_path": str(images / "train"),
            "val_path": str(images / "val"),
            "num_workers": 0,
            "augmentations": {"crop_size": 32},
        },
        "optimizer": {"name": "sgd", "batch_size": 10, "lr": 0.5, "weight_decay": 1e-2},
        "scheduler": {"name": "none"},
        "checkpoint": {"enabled": True, "dir": str(tmp_path / "trained")},
        "wandb": {"enabled": False},
        "max_epochs": 1,
        "devices": "1",
        "accelerator": "cpu",
        "strategy": "auto",
        "precision": 32,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "hydra": {"output_subdir": None, "run": {"dir": "."}},
    }
    file = tmp_path / "configs" / "finetune.yaml"
    file.parent.mkdir()
    defaults = "defaults: [_self_, override hydra/job_logging: disabled]\n"
    file.write_text(defaults + OmegaConf.to_yaml(OmegaConf.create(cfg)))
    return file


def test_the_backbone_is_trained_and_the_mask_stays(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main(["--config-path", str(config.parent), "--config-name", "finetune"])

    (file,) = (tmp_path / "trained" / "linear").glob("*/*.ckpt")
    trained = load_raw(file)["state_dict"]
    before = read_checkpoint(tmp_path / "metamask")
    for name, weight in before.backbone_state().items():
        if name.endswith(("weight", "running_mean")):
            assert not torch.equal(trained[f"backbone.backbone.{name}"], weight), name
    assert before.mask is not None
    torch.testing.assert_close(trained["backbone.mask.logits"], before.mask, rtol=0, atol=0)
    assert "val_acc1=" in capsys.readouterr().out


def test_a_wrong_setting_is_one_line(config: Path) -> None:
    with pytest.raises(UserError, match="max_epochs=0"):
        finetune.main(
            ["--config-path", str(config.parent), "--config-name", "finetune", "max_epochs=0"]
        )
