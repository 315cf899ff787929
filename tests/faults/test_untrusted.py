"""Checkpoints, configs and names from strangers: no code runs, nothing is written elsewhere."""

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from runs import pretrain_config, train

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import UserError
from metamask_solo.training.resume import TRAINING_STATE

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "metamask_solo").rglob("*.py"), *(ROOT / "tools").glob("*.py")])


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.folder),)


def set_trap(checkpoint: Path, form: str = "zip") -> Path:
    """Puts code into a checkpoint; returns the folder that it makes when it runs."""
    marker = checkpoint.parent / "executed"
    content = torch.load(checkpoint, weights_only=True)
    content |= {key: {} for key in TRAINING_STATE if key not in content}
    content["trap"] = Trap(marker)
    if form == "pickle":
        checkpoint.write_bytes(pickle.dumps(content["trap"]))
    else:
        torch.save(content, checkpoint, _use_new_zipfile_serialization=form == "zip")
    return marker


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_with_code_is_refused(form: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.ckpt"
    torch.save({"state_dict": {}}, checkpoint)
    marker = set_trap(checkpoint, form)
    with pytest.raises(UserError, match=f"^{checkpoint}: ") as error:
        load_raw(checkpoint)
    if form == "zip":
        assert "refused, it holds objects other than tensors and plain data" in str(error.value)
    assert not marker.exists()
    # it would have run
    if form == "pickle":
        pickle.loads(checkpoint.read_bytes())
    else:
        torch.load(checkpoint, weights_only=False)
    assert marker.is_dir()


def test_auto_resume_passes_over_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = train(pretrain_config(images, tmp_path), small=True)
    (first.folder / "finished.json").unlink()
    marker = set_trap(first.checkpoint)
    _, second = train(pretrain_config(images, tmp_path, auto_resume__enabled=True), small=True)
    assert f"auto_resume: skipped: {first.checkpoint}: refused" in capsys.readouterr().out
    assert second.folder != first.folder and not marker.exists()


def test_weights_alone_are_no_state_to_go_on_from(images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path / "runs")
    cfg.resume_from_checkpoint = str(write_run(tmp_path / "run", images))
    with pytest.raises(UserError, match="run.ckpt: training cannot go on from it, it has no loops"):
        train(cfg)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_checkpoint_is_refused_however_it_is_damaged(seed: int, tmp_path: Path) -> None:
    """Bytes changed, cut out and added anywhere, in both of torch's formats."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    path = tmp_path / "run.ckpt"
    content = {"state_dict": {"backbone.w": torch.arange(50.0)}, "epoch": 3, "name": "x" * 20}
    torch.save(content, path, _use_new_zipfile_serialization=bool(seed % 2))
    data = bytearray(path.read_bytes())
    for _ in range(1 + draw(5)):
        at, how = draw(len(data)), draw(3)
        if how == 0:
            data[at] ^= 1 << draw(8)
        elif how == 1:
            del data[at : at + 1 + draw(40)]
        else:
            data[at:at] = bytes(draw(256) for _ in range(draw(40)))
    path.write_bytes(data)
    try:
        raw = load_raw(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:  # a byte that nobody reads, such as padding or a date
        assert isinstance(raw, dict)


def test_nothing_in_the_sources_runs_code_of_others() -> None:
    """But for `run`, where the user names a script."""
    runs_code = {"pickle.load", "pickle.loads", "joblib.load", "os.system", "os.popen", "eval"}
    runs_code |= {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "np.load"}
    methods = ("getoutput", "load_from_checkpoint", "load_state_dict_from_url")
    loads = 0
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name, at = ast.unparse(call.func), f"{path}:{call.lineno}"
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name not in runs_code and not name.endswith(methods), at
            assert name != "exec" or path.name == "run.py", at
            assert "shell" not in keywords, at
            if name == "torch.load":
                loads += 1
                assert keywords.get("weights_only") == "True", at
    assert loads


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../../../escaped", "/escaped"])
def test_the_name_of_a_run_is_no_way_out_of_its_folder(
    name: str, images: Path, tmp_path: Path
) -> None:
    _, result = train(pretrain_config(images, tmp_path / "a" / "runs", name=name), small=True)
    written = files_below(tmp_path)
    assert result.checkpoint in written
    assert all(path.is_relative_to(result.folder) for path in written)
    assert not Path("/escaped").exists()


def test_fold_writes_into_its_folder_alone_whatever_a_checkpoint_says(
    images: Path, tmp_path: Path
) -> None:
    checkpoint = write_run(tmp_path / "run", images)
    args = json.loads((checkpoint.parent / "args.json").read_text())
    args |= {"name": "../../escaped", "checkpoint": {"dir": "../../escaped"}}
    (checkpoint.parent / "args.json").write_text(json.dumps(args))
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["../../escaped"] = torch.ones(1)
    torch.save(content, checkpoint)
    before = {path: path.read_bytes() for path in files_below(tmp_path)}
    assert main(["fold", str(checkpoint), str(tmp_path / "x" / "out")]) == 0
    new = sorted(files_below(tmp_path) - before.keys())
    assert new == [tmp_path / "x" / "out" / name for name in ("args.json", "folded.ckpt")]
    assert all(path.read_bytes() == content for path, content in before.items())
