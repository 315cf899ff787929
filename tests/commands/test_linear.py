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
from metamask_solo.hosts import pl
from metamask_solo.training.endings import scripts_folder

pytestmark = pytest.mark.usefixtures("small_backbone")


def command(name: str, file: str, checkpoint: Path, images: Path, out: Path) -> list[str]:
    """A command with a shipped file, for one step on noise images."""
    return [
        *(name, "--config-path", str(scripts_folder() / "linear" / file)),
        *("--config-name=metamask", f"pretrained_feature_extractor={checkpoint}"),
        *("data.dataset=custom", "data.num_workers=0", "data.augmentations.crop_size=32"),
        *(f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}"),
        *("backbone.name=resnet18", f"checkpoint.dir={out}"),
        *("max_epochs=1", "optimizer.batch_size=20", "sync_batchnorm=False"),
        *("accelerator=cpu", "devices=1", "strategy=auto", "precision=32"),
        *("enable_progress_bar=False", "enable_model_summary=False"),
    ]


def run(arguments: list[str], *overrides: str) -> Path:
    """Runs a command; the checkpoint of the newest run in its folder."""
    assert main([*arguments, *overrides]) == 0
    (out,) = [a.partition("=")[2] for a in arguments if a.startswith("checkpoint.dir=")]
    return max(Path(out).glob("linear/*/*.ckpt"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def pretrained(
    tmp_path_factory: pytest.TempPathFactory, images: Path, small_backbone: None
) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "metamask", images)


@pytest.mark.parametrize("name", ["linear", "finetune"])
def test_the_trained_model_is_written_and_every_command_reads_it(
    name: str,
    pretrained: Path,
    images: Path,
    tmp_path: Path,
    refused: Callable[[list[str]], str],
) -> None:
    out = tmp_path / "probes"
    written = run(command(name, "digits", pretrained, images, out), "optimizer.lr=1")
    backbone, checkpoint = load_backbone(written)
    plain, _ = load_backbone(written, masked=False)
    state = load_raw(written)["state_dict"]
    weights = {k.removeprefix("backbone.backbone."): v for k, v in state.items()}
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    x, mask = torch.randn(2, 3, 32, 32), state["backbone.mask.logits"]
    torch.testing.assert_close(backbone(x), plain(x) * mask)
    # the mask is that of the pretraining; fine-tuning changes all weights, a probe none
    before = read_checkpoint(pretrained)
    torch.testing.assert_close(mask, before.mask, rtol=0, atol=0)
    for key, weight in before.backbone.items():
        if key.endswith(("weight", "running_mean")):
            assert torch.equal(weights[key], weight) == (name == "linear"), key
    assert checkpoint.method == "metamask"

    quick = [str(written), "--num-workers=0"]
    assert main(["knn", *quick, "--k=3", f"--json={tmp_path / 'knn.json'}"]) == 0
    assert json.loads((tmp_path / "knn.json").read_text())["masked"] is True
    analysis = [f"--data={images}", "--draws=2", f"--out={tmp_path / 'analysis'}"]
    assert main(["analyze", *quick, *analysis]) == 0
    assert main([*command("linear", "digits", written.parent, images, out), "--cfg-check"]) == 0
    assert "has no projector" in refused(["knn", *quick, "--features=projector"])


def test_two_classes_are_enough_and_a_wrong_setting_is_one_line(
    images: Path,
    tmp_path: Path,
    refused: Callable[[list[str]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """solo-learn asks for the five best classes."""
    simclr = write_run(tmp_path / "run", images, "simclr")
    two, out = write_images(tmp_path / "two", classes=2, train=10, val=3), tmp_path / "out"
    for name in ("linear", "finetune"):
        probe = command(name, "custom", simclr, two, out)
        assert main([*probe, "--cfg-check"]) == 0
        assert "ok: metamask-custom-linear" in capsys.readouterr().out
        assert "max_epochs=0" in refused([*probe, "max_epochs=0"])
        assert main([*probe, "label_smoothing=0.1"]) == 2
        assert "label_smoothing=0.1: with solo-learn" in capsys.readouterr().err
    assert not out.exists()
    written = run(command("linear", "custom", simclr, two, out))
    assert "val_acc1=" in capsys.readouterr().out
    assert read_checkpoint(written).method == "simclr"  # whatever pretrain_method the file says


def test_features_of_any_scale_train_alike_and_a_diverged_probe_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for scale in (0.01, 100.0):
        checkpoint = write_run(tmp_path / f"{scale}", images, method_kwargs__mask__kind="linear")
        raw = torch.load(checkpoint)
        raw["state_dict"]["mask.logits"].fill_(scale)
        torch.save(raw, checkpoint)
        probe = command("linear", "custom", checkpoint, images, tmp_path / "out")
        finished = run(probe, "max_epochs=4").with_name("finished.json")
        losses.append(json.loads(finished.read_text())["metrics"]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert main([*probe, "max_epochs=4", "scale_features=False", "optimizer.lr=10"]) == 1
    assert "the probe diverged" in capsys.readouterr().err


class StopInEpoch1(pl.Callback):  # type: ignore[name-defined]
    """Ends a run behind its first checkpoint, as a crash does."""

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise InterruptedError


def test_a_probe_knows_the_folded_mask_and_the_images_of_its_checkpoint(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images that were trained on are said: of a stopped run, the same folded, and a probe."""
    with pytest.raises(InterruptedError):
        train(pretrain_config(images, tmp_path, max_epochs=2), StopInEpoch1())
    (stopped,) = tmp_path.glob("metamask/*/*.ckpt")
    monkeypatch.setattr(exporting, "fold_mask", lambda *_: 0)  # the small network takes none
    folded = exporting.fold_checkpoint(stopped, tmp_path / "folded").path
    swapped = [f"data.train_path={images / 'val'}", f"data.val_path={images / 'train'}"]
    swapped.append("optimizer.batch_size=10")
    probe = run(command("linear", "digits", folded, images, tmp_path), *swapped)
    again = command("linear", "digits", folded, images, tmp_path)
    for plain in ([*again, "masked=False"], ["knn", str(probe), "--plain"]):
        assert main(plain) == 2
        assert "folded into the backbone" in capsys.readouterr().err

    mixed = tmp_path / "mixed"
    shutil.copytree(images / "train", mixed / "train")
    for image in images.rglob("*.png"):
        copy = mixed / "val" / image.parent.name / f"{image.parents[1].name}-{image.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, copy)
    for checkpoint, count in ((stopped, 20), (folded, 20), (probe, 30)):
        check = command("linear", "digits", checkpoint.parent, mixed, tmp_path / "probes")
        for reader in (
            ["knn", str(checkpoint), f"--data={mixed}", "--num-workers=0"],
            [*check, "--cfg-check"],
        ):
            assert main(reader) == 0
            said = f"{mixed}/val: {count} of 30 images to evaluate on were training images of"
            assert said in capsys.readouterr().err
