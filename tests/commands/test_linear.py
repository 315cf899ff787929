"""``metamask-solo linear`` and ``finetune`` with a shipped file, and who reads what they write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from runs import pretrain_config, train, write_images

from metamask_solo.__main__ import main
from metamask_solo.checkpoints import exporting
from metamask_solo.checkpoints.reading import load_backbone, load_raw, read_checkpoint
from metamask_solo.errors import UserError
from metamask_solo.hosts import pl

pytestmark = pytest.mark.usefixtures("small_backbone")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def pretrained(
    tmp_path_factory: pytest.TempPathFactory, images: Path, small_backbone: None
) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "metamask", images)


def small(checkpoint: Path, images: Path, out: Path) -> list[str]:
    """Overrides of a shipped file for one step on noise images."""
    return [
        f"pretrained_feature_extractor={checkpoint}",
        "backbone.name=resnet18",
        "data.dataset=custom",
        f"data.train_path={images / 'train'}",
        f"data.val_path={images / 'val'}",
        "data.num_workers=0",
        "data.augmentations.crop_size=32",
        f"checkpoint.dir={out}",
        "max_epochs=1",
        "optimizer.batch_size=20",
        "devices=1",
        "strategy=auto",
        "sync_batchnorm=False",
        "accelerator=cpu",
        "precision=32",
        "enable_progress_bar=False",
        "enable_model_summary=False",
    ]


def command(name: str, folder: str, *overrides: str) -> list[str]:
    path = str(SCRIPTS / "linear" / folder)
    return [name, "--config-path", path, "--config-name", "metamask.yaml", *overrides]


def run(name: str, folder: str, *overrides: str) -> int:
    return main(command(name, folder, *overrides))


@pytest.fixture(scope="module", params=["linear", "finetune"])
def written(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    pretrained: Path,
    images: Path,
) -> Path:
    """What the command wrote of a MetaMask checkpoint."""
    out = tmp_path_factory.mktemp(request.param)
    assert run(request.param, "digits", *small(pretrained, images, out), "optimizer.lr=1") == 0
    (checkpoint,) = out.glob("linear/*/*.ckpt")
    return Path(checkpoint)


def test_its_features_are_those_of_the_trained_model(written: Path, pretrained: Path) -> None:
    backbone, checkpoint = load_backbone(written)
    plain, _ = load_backbone(written, masked=False)
    x = torch.randn(2, 3, 32, 32)

    state = load_raw(written)["state_dict"]
    mask = state["backbone.mask.logits"]
    weights = {k.removeprefix("backbone.backbone."): v for k, v in state.items()}
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    assert checkpoint.method == "metamask"
    torch.testing.assert_close(backbone(x), plain(x) * mask)
    # the mask is that of the pretraining; fine-tuning changes all weights, a probe none
    before = read_checkpoint(pretrained)
    torch.testing.assert_close(mask, before.mask, rtol=0, atol=0)
    for name, weight in before.backbone.items():
        if name.endswith(("weight", "running_mean")):
            assert torch.equal(weights[name], weight) != checkpoint.config.finetune, name


def test_every_command_reads_it(
    written: Path, images: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    quick = ["--num-workers", "0"]
    assert main(["knn", str(written), *quick, "--k=3", f"--json={tmp_path / 'knn.json'}"]) == 0
    assert json.loads((tmp_path / "knn.json").read_text())["masked"] is True
    out = [f"--data={images}", "--draws=2", f"--out={tmp_path / 'analysis'}"]
    assert main(["analyze", str(written), *quick, *out]) == 0
    overrides = small(written.parent, images, tmp_path / "probes")
    assert run("linear", "digits", *overrides, "--cfg-check") == 0
    assert "has no projector" in refused(["knn", str(written), "--features", "projector"])


def test_two_classes_are_enough_and_a_wrong_setting_is_one_line(
    pretrained: Path,
    tmp_path: Path,
    refused: Callable[[list[str]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """solo-learn asks for the five best classes."""
    two = write_images(tmp_path / "two", classes=2, train=10, val=3)
    overrides = small(pretrained, two, tmp_path / "out")
    for name in ("linear", "finetune"):
        assert run(name, "custom", *overrides, "--cfg-check") == 0
        assert "ok: metamask-custom-linear" in capsys.readouterr().out
        assert "max_epochs=0" in refused(command(name, "custom", *overrides, "max_epochs=0"))
        assert run(name, "custom", *overrides, "label_smoothing=0.1") == 2
        assert "label_smoothing=0.1: with solo-learn" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    assert run("linear", "custom", *overrides) == 0
    assert "val_acc1=" in capsys.readouterr().out


def test_features_of_any_scale_train_alike_and_a_diverged_probe_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for scale in (0.01, 100.0):
        checkpoint = write_run(tmp_path / f"{scale}", images, method_kwargs__mask__kind="linear")
        raw = torch.load(checkpoint)
        raw["state_dict"]["mask.logits"].fill_(scale)
        torch.save(raw, checkpoint)
        overrides = [*small(checkpoint, images, tmp_path / "out"), "max_epochs=4"]
        assert run("linear", "custom", *overrides) == 0
        newest = max(
            (tmp_path / "out" / "linear").iterdir(), key=lambda folder: folder.stat().st_mtime
        )
        losses.append(json.loads((newest / "finished.json").read_text())["metrics"]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert run("linear", "custom", *overrides, "scale_features=False", "optimizer.lr=10") == 1
    assert "the probe diverged" in capsys.readouterr().err


def test_a_probe_knows_the_method_and_the_folded_mask_of_its_run(
    pretrained: Path,
    images: Path,
    tmp_path: Path,
    refused: Callable[[list[str]], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def probe(checkpoint: Path, out: str) -> Path:
        assert run("linear", "digits", *small(checkpoint, images, tmp_path / out)) == 0
        return next((tmp_path / out).glob("linear/*/*.ckpt"))

    # whatever pretrain_method says in the file
    simclr = write_run(tmp_path / "run", images, "simclr")
    assert read_checkpoint(probe(simclr, "one")).method == "simclr"
    monkeypatch.setattr(exporting, "fold_mask", lambda *_: 0)  # the small network takes none
    folded = exporting.fold_checkpoint(pretrained, tmp_path / "folded").path
    assert run("linear", "digits", *small(folded, images, tmp_path), "masked=False") == 2
    assert "folded into the backbone" in capsys.readouterr().err
    assert "folded into the backbone" in refused(["knn", str(probe(folded, "two")), "--plain"])
    with pytest.raises(UserError, match="folded into the backbone"):
        load_backbone(folded, masked=False)


class StopInEpoch1(pl.Callback):  # type: ignore[name-defined]
    """Ends a run behind its first checkpoint, as a crash does."""

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise InterruptedError


def test_images_that_a_checkpoint_was_trained_on_are_said(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a run that was stopped, of the same folded, and of a probe, whose own count too."""
    with pytest.raises(InterruptedError):
        train(pretrain_config(images, tmp_path, max_epochs=2), StopInEpoch1())
    (stopped,) = tmp_path.glob("metamask/*/*.ckpt")
    mixed = tmp_path / "mixed"
    shutil.copytree(images / "train", mixed / "train")
    for split in ("train", "val"):
        for image in (images / split).rglob("*.png"):
            copy = mixed / "val" / image.parent.name / f"{split}-{image.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, copy)
    monkeypatch.setattr(exporting, "fold_mask", lambda *_: 0)  # the small network takes none
    folded = exporting.fold_checkpoint(stopped, tmp_path / "folded").path
    swapped = [f"data.train_path={images / 'val'}", f"data.val_path={images / 'train'}"]
    swapped.append("optimizer.batch_size=10")
    assert run("linear", "digits", *small(stopped.parent, images, tmp_path), *swapped) == 0
    (probe,) = tmp_path.glob("linear/*/*.ckpt")
    for checkpoint, count in ((stopped, 20), (folded, 20), (probe, 30)):
        said = f"note: {mixed}/val: {count} of 30 images to evaluate on were training images of"
        capsys.readouterr()
        assert main(["knn", str(checkpoint), "--data", str(mixed), "--num-workers", "0"]) == 0
        assert said in capsys.readouterr().err
        overrides = [*small(checkpoint.parent, mixed, tmp_path / "probes"), "--cfg-check"]
        assert run("linear", "digits", *overrides) == 0
        assert said in capsys.readouterr().err
