"""Two processes of Lightning's DDP (gloo on the CPU) against one."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import pretrain_config
from torch import nn

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.hosts import pl
from metamask_solo.method.losses import nt_xent
from metamask_solo.method.meta_update import own_batch_statistics

pytestmark = pytest.mark.ddp


class FixedBatches(torch.utils.data.Dataset[Any]):
    """The same images in every process."""

    def __init__(self, length: int):
        rng = torch.Generator().manual_seed(0)
        self.images = torch.randn(length, 2, 3, 32, 32, generator=rng)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return i, [self.images[i, 0], self.images[i, 1]], i % 5


class Record(pl.Callback):  # type: ignore[name-defined]
    def __init__(self, out: Path):
        self.out = out
        self.masks: list[list[float]] = []
        self.gradients: list[list[float]] = []

    def on_train_start(self, trainer: Any, model: Any) -> None:
        own = model.mask_gradient

        def recorded(views: Any) -> torch.Tensor:
            gradient = own(views)
            self.gradients.append(gradient.tolist())
            return gradient

        update = model._update_mask

        def recorded_update(views: Any) -> None:
            update(views)
            self.masks.append(model.mask.logits.tolist())

        model.mask_gradient = recorded
        model._update_mask = recorded_update

    def on_train_end(self, trainer: Any, model: Any) -> None:
        result = {"masks": self.masks, "gradients": self.gradients}
        (self.out / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


def step_on_own_shard(model: Any, batch: Any, batch_idx: int) -> torch.Tensor:
    """A regular step of which two processes with one shard make the same as one process.

    solo-learn's losses do not: they gather negatives (NT-Xent, GitHub main), and halve the
    gradient of the correlation that they average (Barlow Twins).
    """
    z1, z2 = (model(x)["z"] for x in batch[1])
    every_parameter = sum(p.sum() for p in model.parameters() if p.requires_grad)
    return nt_xent(z1, z2, 0.2) + 0.0 * every_parameter


def run_rank(data: str, out: str, processes: int, identical: bool) -> None:
    """The body of each process: three steps, not shuffled."""
    import metamask_solo  # noqa: F401
    from metamask_solo.training.pretraining import prepare_pretraining

    torch.set_num_threads(1)
    cfg = pretrain_config(Path(data), Path(out), max_epochs=1)
    cfg.optimizer.batch_size = 5
    cfg.method_kwargs.update(mask={"lr": 1.0})
    model, cfg, *_ = prepare_pretraining(cfg)
    if identical:
        model.training_step = functools.partial(step_on_own_shard, model)
    dataset = FixedBatches(15)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5)
    strategy = (
        pl.strategies.DDPStrategy(find_unused_parameters=False, process_group_backend="gloo")
        if processes > 1
        else "auto"
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record(Path(out))],
        # off: every process sees all images in their order; on: each its own half
        use_distributed_sampler=not identical,
    )
    trainer.fit(model, loader)


def launch(data: Path, out: Path, processes: int, identical: bool = True) -> list[dict[str, Any]]:
    out.mkdir()
    code = (
        f"import test_ddp; test_ddp.run_rank({str(data)!r}, {str(out)!r}, {processes}, {identical})"
    )
    script = out / "rank.py"
    script.write_text(code)
    here = Path(__file__)
    paths = [str(here.parents[i]) for i in range(3)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{r}.json").read_text()) for r in range(processes)]


@pytest.fixture(scope="module")
def outcomes(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("ddp")
    return {
        "one": launch(images, root / "one", 1),
        "identical": launch(images, root / "identical", 2),
        "different": launch(images, root / "different", 2, identical=False),
    }


def test_identical_shards_give_the_mask_of_one_process(outcomes: dict[str, Any]) -> None:
    (one,) = outcomes["one"]
    for rank in outcomes["identical"]:
        assert len(rank["masks"]) == len(one["masks"]) == 3
        torch.testing.assert_close(
            torch.tensor(rank["masks"]), torch.tensor(one["masks"]), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", ["identical", "different"])
def test_the_mask_is_bit_identical_on_all_ranks(outcomes: dict[str, Any], name: str) -> None:
    first, second = outcomes[name]
    assert first["masks"] == second["masks"]


def test_the_gradient_is_the_mean_over_ranks(outcomes: dict[str, Any]) -> None:
    """From the first step of SGD, m₁ = m₀ − lr · (mean gradient + decay · m₀)."""
    first, second = outcomes["different"]
    own = [torch.tensor(rank["gradients"][0]) for rank in (first, second)]
    assert not torch.equal(*own)
    expected = -(own[0] + own[1]) / 2
    torch.testing.assert_close(torch.tensor(first["masks"][0]), expected, rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def machines(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The command started by torchrun on two "machines" of one process each, as README has it."""
    out = tmp_path_factory.mktemp("machines")
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    nodes = [[*torchrun, "--node-rank", str(rank)] for rank in range(2)]
    return out, pretrain_by(nodes, images, out, "num_nodes=2", "devices=1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pretrain_by(launchers: list[list[str]], data: Path, out: Path, *overrides: str) -> list[str]:
    """Runs ``pretrain`` by each of the launchers at once; what each printed."""
    cfg = pretrain_config(data, out, num_nodes=1, strategy="ddp", method_kwargs__mask={"lr": 1.0})
    OmegaConf.save(cfg, out / "run.yaml")
    command = ["-m", "metamask_solo", "pretrain", "--config-path", str(out)]
    command += ["--config-name", "run.yaml", "hydra.run.dir=.", "hydra.output_subdir=null"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, *launcher, *command, *overrides],
            cwd=out,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for launcher in launchers
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, text[-3000:]
    return printed


def the_checkpoint(out: Path) -> Path:
    (run,) = (out / "metamask").iterdir()
    (checkpoint,) = run.glob("*.ckpt")
    return checkpoint


def test_two_machines_make_one_run(machines: tuple[Path, list[str]]) -> None:
    out, printed = machines
    checkpoint = the_checkpoint(out)
    assert [f"checkpoint: {checkpoint}" in text for text in printed].count(True) == 1
    config = json.loads((checkpoint.parent / "args.json").read_text())
    assert config["num_nodes"] == 2
    # two processes with ten images each, as solo-learn scales it
    assert config["optimizer"]["lr"] == pytest.approx(0.5 * 20 / 256)


def test_two_machines_train_as_two_processes_of_one(
    machines: tuple[Path, list[str]], images: Path, tmp_path: Path
) -> None:
    pretrain_by([[]], images, tmp_path, "devices=2")
    one, two = (load_raw(the_checkpoint(out)) for out in (tmp_path, machines[0]))
    assert one["global_step"] == two["global_step"] > 0
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


def test_sync_batchnorm_uses_this_processs_batch() -> None:
    """Inside the block SyncBatchNorm is an ordinary BatchNorm, running statistics untouched."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).double()
    nn.init.normal_(norm.weight)
    synced: Any = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0]
    assert isinstance(synced, nn.SyncBatchNorm)
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt() * norm.weight
    before = synced.running_mean.clone()
    with own_batch_statistics(synced):
        assert synced.forward.func is nn.modules.batchnorm._BatchNorm.forward
        torch.testing.assert_close(synced(x), expected + norm.bias)
        # forward mode, which SyncBatchNorm does not have
        torch.func.jvp(synced, (x,), (torch.ones_like(x),))
    assert torch.equal(synced.running_mean, before)
    assert "forward" not in synced.__dict__ and synced.track_running_stats
