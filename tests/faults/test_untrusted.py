"""Checkpoints, configs and names from strangers: no code runs, nothing is written elsewhere."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from runs import pretrain_config, train

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import UserError

ROOT = Path(__file__).parents[2]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_with_code_is_refused(form: str, tmp_path: Path) -> None:
    checkpoint, marker = tmp_path / "run.ckpt", tmp_path / "executed"
    content = {"state_dict": {}, "trap": Trap(marker)}
    if form == "pickle":
        checkpoint.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, checkpoint, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=f"^{checkpoint}: "):
        load_raw(checkpoint)
    assert not marker.exists()
    # it would have run
    if form == "pickle":
        pickle.loads(checkpoint.read_bytes())
    else:
        torch.load(checkpoint, weights_only=False)
    assert marker.is_dir()


def test_torch_reads_weights_only() -> None:
    """What else could run code of others, ruff refuses (pyproject.toml)."""
    text = "".join(path.read_text() for path in (ROOT / "metamask_solo").rglob("*.py"))
    calls = re.findall(r"torch\.load\(.*?\)", text, re.DOTALL)
    assert calls and all("weights_only=True" in call for call in calls)
    assert not re.search(r"load_from_checkpoint|load_state_dict_from_url|allow_pickle", text)


def test_a_damaged_checkpoint_is_refused_however_it_is_damaged(tmp_path: Path) -> None:
    """Bytes changed, cut out and added anywhere, in both of torch's formats."""
    generator = torch.Generator().manual_seed(0)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    path = tmp_path / "run.ckpt"
    content = {"state_dict": {"backbone.w": torch.arange(50.0)}, "epoch": 3, "name": "x" * 20}
    refused = 0
    for seed in range(40):
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
            # a byte that nobody reads, such as padding or a date, may have changed
            assert isinstance(load_raw(path), dict)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 20


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../../../escaped", "/escaped"])
def test_the_name_of_a_run_is_no_way_out_of_its_folder(
    name: str, images: Path, tmp_path: Path
) -> None:
    _, result = train(pretrain_config(images, tmp_path / "a" / "runs", name=name), small=True)
    written = files_below(tmp_path)
    assert result.checkpoint in written and not Path("/escaped").exists()
    assert all(path.is_relative_to(result.folder) for path in written)


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
    before = files_below(tmp_path)
    assert main(["fold", str(checkpoint), str(tmp_path / "x" / "out")]) == 0
    new = sorted(files_below(tmp_path) - before)
    assert new == [tmp_path / "x" / "out" / name for name in ("args.json", "folded.ckpt")]
