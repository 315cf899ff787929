"""The command ``metamask-solo run``: scripts behave as if they were run directly."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from metamask_solo.commands import run
from metamask_solo.errors import UserError

ROOT = Path(__file__).parents[2]

DESCRIBE = """
    '''A docstring.'''
    import json, os, sys, inspect

    class Here:
        pass

    state = {
        "name": __name__, "doc": __doc__, "file": __file__, "package": __package__,
        "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(),
        "main": sys.modules["__main__"].Here is Here,
        "source": inspect.getsourcelines(Here)[1],
    }
    print(json.dumps(state))
"""

HYDRA = """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    @hydra.main(version_base="1.2")
    def main(cfg):
        name = HydraConfig.get().job.name
        print(name, OmegaConf.to_container(cfg))

    if __name__ == "__main__":
        main()
"""

CONFIG = """
    hydra: {output_subdir: null, run: {dir: .}, sweep: {dir: jobs}}
    defaults: [_self_, parts: small, override hydra/job_logging: disabled, \
override hydra/hydra_logging: disabled]
    lr: 1.0
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))
    return path


def directly(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on ``command`` in a process of its own, with this project to import."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scripts, in which the commands are given."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "describe.py", DESCRIBE)
    write(tmp_path / "deeper/describe.py", DESCRIBE)
    write(tmp_path / "train.py", HYDRA)
    write(tmp_path / "configs/own/base.yaml", CONFIG)
    write(tmp_path / "configs/own/parts/small.yaml", "size: 1")
    write(tmp_path / "configs/more/parts/large.yaml", "size: 9")
    (tmp_path / "link.py").symlink_to(tmp_path / "deeper/describe.py")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["describe.py"],
        ["describe.py", "--help", "-m", "a=1,2", "--", "--k", "x y"],
        ["deeper/describe.py", "-h"],
        ["./deeper/../describe.py"],
        ["link.py"],
    ],
)
def test_a_script_finds_what_it_would_find_without_us(
    clone: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    before = sys.argv[:], sys.path[:], sys.modules["__main__"], dict(os.environ)

    assert run.main(command) == 0

    expected = directly(*command)
    assert json.loads(capsys.readouterr().out) == json.loads(expected.stdout)
    assert (sys.argv, sys.path, sys.modules["__main__"], dict(os.environ)) == before


@pytest.mark.parametrize(
    "arguments",
    [
        "--config-path configs/own --config-name base lr=2",
        "--config-path configs/own --config-name base -m lr=1,2,3",
        "--config-path configs/own --config-name base --config-dir configs/more parts=large",
        "--config-path configs/own --config-name base --cfg job",
    ],
)
def test_hydra_finds_its_configs_and_sweeps_as_without_us(
    clone: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    # relative config paths count from the script, config dirs from the working folder
    command = ["train.py", *arguments.split()]

    assert run.main(command) == 0

    printed = capsys.readouterr().out
    assert printed == directly(*command).stdout
    assert printed.count("size") == (3 if "-m" in command else 1)


def test_hydra_finds_the_yaml_files_of_the_package(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = "pkg://metamask_solo.scripts.pretrain.tiny-imagenet"
    command = f"train.py --config-path {package} --config-name metamask.yaml"
    command += " variant=fast max_epochs=7"

    assert run.main(command.split()) == 0

    printed = capsys.readouterr().out
    assert "'max_epochs': 7" in printed and "'crop_size': 64" in printed


def test_without_a_gpu_what_is_sent_there_stays(clone: Path) -> None:
    write(
        clone / "on_gpu.py",
        """
        import torch
        images, network = torch.ones(2).cuda(non_blocking=True), torch.nn.Linear(1, 1).cuda()
        print(images.device, network.weight.device)
        moved = network.to(device="cuda:0", dtype=torch.float64)
        print(images.to("cuda").device, moved.weight.device, moved.weight.dtype)
        """,
    )

    result = directly("-m", "metamask_solo", "run", "--cpu", "on_gpu.py")

    assert result.stdout == "cpu cpu\ncpu cpu torch.float64\n"


def test_the_method_is_registered(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = """
        from solo.methods import METHODS

        print(METHODS["metamask"].__name__)
    """
    assert run.main([str(write(clone / "evaluate.py", script))]) == 0

    assert capsys.readouterr().out == "MetaMask\n"


@pytest.mark.parametrize("code", ["3", "'no such data set'", "None"])
def test_the_exit_code_is_passed_on(clone: Path, code: str) -> None:
    script = write(clone / "stop.py", f"import sys; sys.exit({code})")

    with pytest.raises(SystemExit) as caught:
        run.main([str(script)])

    assert repr(caught.value.code) == code


@pytest.mark.parametrize(
    "failure", ["1 / 0", "import no_such_module", "raise ValueError('a\\nb')", "def f(:"]
)
def test_an_exception_shows_the_traceback_of_the_script_alone(
    clone: Path, capsys: pytest.CaptureFixture[str], failure: str
) -> None:
    script = str(write(clone / "fail.py", f"print('begun')\n{failure}\n"))

    assert run.main([script]) == 1

    expected = directly(script)
    assert expected.returncode == 1
    assert capsys.readouterr().err == expected.stderr


@pytest.mark.parametrize("script", ["main_pretrain.py", "configs"])
def test_a_script_that_is_not_there_is_one_line(clone: Path, script: str) -> None:
    with pytest.raises(UserError, match=f"^{script}: no such script$"):
        run.main([script, "--config-name", "x"])


def test_help_explains_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])

    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("SCRIPT", "ARGS", "main_pretrain.py"))


@pytest.mark.slow
def test_the_solo_beside_the_script_comes_first(clone: Path) -> None:
    """From the root of a clone, the clone is used, not the installed solo-learn."""
    installed = importlib.util.find_spec("solo")
    assert installed is not None and installed.submodule_search_locations
    shutil.copytree(
        installed.submodule_search_locations[0],
        clone / "solo",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    script = """
        import sys
        import solo
        from solo.methods import METHODS

        print(solo.__file__, METHODS["metamask"].__name__, sys.argv, sys.path[0], __name__)
        sys.exit(7)
    """
    write(clone / "main_which.py", script)
    command = "from metamask_solo.__main__ import main; main(['run', 'main_which.py', '-m', 'a b'])"

    done = directly("-c", f"import metamask_solo, sys; sys.path[0] = '/'; {command}")

    assert done.returncode == 7, done.stderr[-3000:]
    argv = ["main_which.py", "-m", "a b"]
    expected = f"{clone}/solo/__init__.py MetaMask {argv} {clone} __main__"
    assert done.stdout.splitlines()[-1] == expected


@pytest.mark.slow
def test_processes_of_multiprocessing_have_the_method_too(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They import the script, as on macOS for each worker of a loader, and its functions."""
    script = """
        import multiprocessing
        from solo.methods import METHODS

        def names(result):
            result.put([__name__, "metamask" in METHODS])

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            result = context.SimpleQueue()
            process = context.Process(target=names, args=(result,))
            process.start()
            print(result.get())
            process.join()
            print(process.exitcode)
    """
    assert run.main([str(write(clone / "spawn.py", script))]) == 0

    assert capsys.readouterr().out == "['__mp_main__', True]\n0\n"


@pytest.mark.ddp
@pytest.mark.slow
def test_lightnings_processes_have_the_method_too(clone: Path) -> None:
    """Lightning's DDP starts a process for each further device by itself, also under Hydra."""
    script = """
        import json, sys
        import hydra
        import lightning.pytorch as pl
        import torch
        from solo.methods import METHODS

        class Small(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 1)
            def training_step(self, batch, batch_idx):
                return self.layer(batch).sum()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        @hydra.main(version_base="1.2")
        def main(cfg):
            strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
            trainer = pl.Trainer(
                accelerator="cpu", devices=2, strategy=strategy, max_steps=1, logger=False,
                enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(Small(), torch.utils.data.DataLoader(torch.ones(4, 2)))
            state = [__name__, "metamask" in METHODS, sys.argv[0], cfg.lr]
            with open(f"rank{trainer.global_rank}.json", "w") as file:
                json.dump(state, file)

        if __name__ == "__main__":
            main()
    """
    write(clone / "fit.py", script)
    command = ["fit.py", "--config-path", "configs/own", "--config-name", "base", "lr=5"]

    done = directly("-m", "metamask_solo", "run", *command, OMP_NUM_THREADS="1")

    assert done.returncode == 0, done.stderr[-3000:]
    for rank, script in enumerate(["fit.py", str(clone / "fit.py")]):
        state: list[Any] = json.loads((clone / f"rank{rank}.json").read_text())
        assert state == ["__main__", True, script, 5]
