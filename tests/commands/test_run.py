"""The command ``metamask-solo run``: scripts behave as if they were run directly."""

import importlib.util
import os
import shutil
import subprocess
import sys
from copy import copy
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from checkpoints_of_runs import write_run
from runs import pretrain_config, train

from metamask_solo.checkpoints.exporting import fold_checkpoint
from metamask_solo.commands import run
from metamask_solo.hosts import pl

ROOT = Path(__file__).parents[2]

DESCRIBE = """
    '''A docstring.'''
    import inspect, os, sys

    class Here:
        pass

    print(__name__, __doc__, __file__, __package__, sys.argv, sys.path[0], os.getcwd())
    print(sys.modules["__main__"].Here is Here, inspect.getsourcelines(Here)[1])
"""
HYDRA = """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    @hydra.main(version_base="1.2")
    def main(cfg):
        if "pretrained_feature_extractor" in cfg:
            import torch
            print(sorted(torch.load(cfg.pretrained_feature_extractor)))
        print(HydraConfig.get().job.name, OmegaConf.to_container(cfg))

    if __name__ == "__main__":
        main()
"""
CONFIG = """
    hydra: {output_subdir: null, run: {dir: .}, sweep: {dir: jobs}}
    defaults: [_self_, parts: small, override hydra/job_logging: disabled, \
override hydra/hydra_logging: disabled]
    lr: 1.0
"""
BASE = "train.py --config-path configs/own --config-name base"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))
    return path


def directly(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on ``command`` in a process of its own, with this project to import."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scripts, in which the commands are given; what they change is put back."""
    monkeypatch.chdir(tmp_path)
    for place, name in ((sys, "argv"), (sys, "path"), (torch, "load")):
        monkeypatch.setattr(place, name, copy(getattr(place, name)))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setenv(run.SCRIPT, "")
    write(tmp_path / "deeper/describe.py", DESCRIBE)
    (tmp_path / "link.py").symlink_to(tmp_path / "deeper/describe.py")
    write(tmp_path / "train.py", HYDRA)
    write(tmp_path / "configs/own/base.yaml", CONFIG)
    write(tmp_path / "configs/own/parts/small.yaml", "size: 1")
    write(tmp_path / "configs/more/parts/large.yaml", "size: 9")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "./deeper/../link.py --help -m a=1,2 -- --k",
        # relative config paths count from the script, config dirs from the working folder
        f"{BASE} --config-dir configs/more -m parts=large lr=1,2",
        "train.py --config-path pkg://metamask_solo.scripts.pretrain.digits "
        "--config-name metamask.yaml max_epochs=7",
    ],
)
def test_a_script_finds_what_it_would_find_without_us(
    command: str, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(command.split()) == 0
    assert capsys.readouterr().out == directly(*command.split()).stdout != ""


def test_a_script_that_ends_or_fails_does_so_as_without_us(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main([str(write(clone / "stop.py", "import sys; sys.exit('no such data set')"))])
    assert caught.value.code == "no such data set"
    for failure in ("raise ValueError('a\\nb')", "def f(:"):
        script = str(write(clone / "fail.py", f"print('begun')\n{failure}\n"))
        assert run.main([script]) == 1
        assert capsys.readouterr().err == directly(script).stderr != ""


def test_a_probe_of_an_unfolded_checkpoint_is_refused(
    clone: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra would make a traceback of an exception."""
    checkpoint = write_run(clone / "run", images)
    folded = fold_checkpoint(checkpoint, checkpoint.parent / "folded").path
    probe = checkpoint.with_name("probe.ckpt")  # a probe holds the mask in its backbone
    torch.save({"state_dict": {"backbone.mask.logits": torch.ones(2)}}, probe)
    for masked in (checkpoint, probe):
        with pytest.raises(SystemExit) as caught:
            run.main([*BASE.split(), f"+pretrained_feature_extractor={masked}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2
        assert line.endswith(f"fold first: metamask-solo fold {masked} {folded.parent}")
    assert run.main([*BASE.split(), f"+pretrained_feature_extractor={folded}"]) == 0


class SoloLearnsCheckpointer(pl.Callback):  # type: ignore[name-defined]
    path, last_ckpt = "trained_models/metamask/abc", "abc.ckpt"


def test_a_run_of_metamask_ends_with_the_command_that_folds_it(
    clone: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = write(clone / "nothing.py", "from solo.methods import METHODS; METHODS['metamask']")
    assert run.main([str(script)]) == 0
    train(pretrain_config(images, clone / "runs"), SoloLearnsCheckpointer(), small=True)
    folder = "trained_models/metamask/abc"
    expected = f"folder: {folder}\nnext: metamask-solo fold {folder} {folder}/folded\n"
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_the_solo_beside_the_script_comes_first(clone: Path) -> None:
    """From the root of a clone, the clone is used, not the installed solo-learn."""
    installed = importlib.util.find_spec("solo")
    assert installed is not None and installed.submodule_search_locations
    folder = installed.submodule_search_locations[0]
    shutil.copytree(folder, clone / "solo", ignore=shutil.ignore_patterns("__pycache__"))
    script = """
        import solo
        from solo.methods import METHODS

        print(solo.__file__, METHODS["metamask"].__name__)
    """
    write(clone / "main_which.py", script)
    command = "from metamask_solo.__main__ import main; main(['run', 'main_which.py'])"
    done = directly("-c", f"import metamask_solo, sys; sys.path[0] = '/'; {command}")
    assert done.stdout.splitlines()[-1] == f"{clone}/solo/__init__.py MetaMask", done.stderr


def test_processes_of_multiprocessing_import_the_package_too(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the script with its functions, as on macOS for each worker of a loader."""
    script = """
        import multiprocessing, sys

        def names(result):
            result.put([__name__, "metamask_solo" in sys.modules])

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            result = context.SimpleQueue()
            process = context.Process(target=names, args=(result,))
            process.start()
            print(result.get())
            process.join()
    """
    assert run.main([str(write(clone / "spawn.py", script))]) == 0
    assert capsys.readouterr().out == "['__mp_main__', True]\n"


@pytest.mark.ddp
@pytest.mark.slow
def test_lightnings_processes_import_the_package_too(clone: Path) -> None:
    """Lightning's DDP starts a process for each further device by itself, also under Hydra."""
    script = f"""
        import sys
        import hydra
        import torch
        from {pl.__name__} import Trainer
        from {pl.__name__}.demos.boring_classes import BoringModel
        from {pl.__name__}.strategies import DDPStrategy

        @hydra.main(version_base="1.2")
        def main(cfg):
            trainer = Trainer(
                accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"),
                max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )
            trainer.fit(BoringModel())
            with open(f"rank{{trainer.global_rank}}", "w") as file:
                print(__name__, "metamask_solo" in sys.modules, sys.argv[0], cfg.lr, file=file)

        if __name__ == "__main__":
            main()
    """
    write(clone / "train.py", script)
    command = ["-m", "metamask_solo", "run", *BASE.split(), "lr=5"]
    done = directly(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (clone / "rank0").read_text() == "__main__ True train.py 5\n"
    assert (clone / "rank1").read_text() == f"__main__ True {clone / 'train.py'} 5\n"
