"""Several processes (gloo on the CPU) against one, and every way to start them."""

import copy
import io
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from definitions import plain_barlow, plain_nt_xent
from omegaconf import OmegaConf
from runs import pretrain_config, train, write_images
from small_resnet import write_module
from torch import nn

from metamask_solo import DimensionalMask, mask_hypergradient, mean_over_processes, nt_xent
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import UserError
from metamask_solo.hosts import BACKBONE_PREFIX, pl
from metamask_solo.method.hypergradient import METHODS
from metamask_solo.training.pretrain import prepare_pretraining, pretrain_run
from metamask_solo.training.resume import FitResult

pytestmark = pytest.mark.ddp
LOSSES = {"alpha": 3.0, "lamb": 0.02, "scale_loss": 0.1, "temperature": 0.3}
PROCESSES = 3


class Trained(NamedTuple):
    """A run of three processes."""

    steps: list[list[dict[str, Any]]]  # of each step, what each process recorded
    result: FitResult
    said: str


class Record(pl.Callback):  # type: ignore[name-defined]
    """Keeps, for each step, what goes into it and what DDP and the mask's update made of it."""

    def __init__(self, out: Path):
        self.out = out
        self.steps: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Any, model: Any) -> None:
        gradient_of = model.mask_gradient

        def recorded(views: Any) -> torch.Tensor:
            gradient = gradient_of(views)
            self.steps[-1]["mask_gradient"] = gradient.clone()
            return gradient

        model.mask_gradient = recorded

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, i: int) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        self.steps.append({"state": state, "batch": batch})

    def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        self.steps[-1]["gradients"] = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        self.steps[-1]["mask"] = model.mask.logits.detach().clone()
        logged = trainer.callback_metrics
        self.steps[-1]["logged"] = {
            name: float(logged[f"train_{name}_loss_step"]) for name in ("barlow", "nce")
        }

    def on_train_end(self, trainer: Any, model: Any) -> None:
        torch.save(self.steps, self.out / f"rank{trainer.global_rank}.pt")


def config(data: Path, out: Path) -> Any:
    """Two epochs of one step of each process, in double precision."""
    cfg = pretrain_config(data, out, strategy="ddp_fork", devices=PROCESSES, precision="64-true")
    cfg.max_epochs, cfg.optimizer.batch_size = 2, 5
    cfg.method_kwargs.update(LOSSES, mask={"lr": 1.0})
    return cfg


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"), train=PROCESSES)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("ranks")
    with redirect_stderr(io.StringIO()) as said:
        result = pretrain_run(config(data, out / "runs"), callbacks=(Record(out),))
    ranks = [torch.load(out / f"rank{rank}.pt") for rank in range(PROCESSES)]
    assert [len(rank) for rank in ranks] == [2] * PROCESSES
    steps = [list(step) for step in zip(*ranks, strict=True)]
    return Trained(steps, result, said.getvalue())


def whole_batch(model: Any, step: list[dict[str, Any]]) -> dict[str, float]:
    """The losses' definitions on the images of all processes, on one.

    BatchNorm has statistics of its own in each process, so each share passes the network alone.
    """
    model.load_state_dict(step[0]["state"])
    model.zero_grad()
    model.train()
    projected: list[list[torch.Tensor]] = [[], [], [], []]
    classifier = torch.zeros((), dtype=torch.float64)
    for rank in step:
        # running statistics are each process's own until the next step
        same = [n for n in rank["state"] if "running" not in n and "num_batches" not in n]
        assert all(torch.equal(rank["state"][n], step[0]["state"][n]) for n in same)
        _, views, labels = rank["batch"]
        for view in range(2):
            h = model.backbone(views[view])
            u = h * torch.sigmoid(model.mask.logits)
            projected[view].append(model.redundancy_projector(u))
            projected[2 + view].append(model.projector(u))
            loss = nn.functional.cross_entropy(model.classifier(u.detach()), labels)
            classifier = classifier + loss / (2 * len(step))
    r1, r2, z1, z2 = map(torch.cat, projected)
    barlow = LOSSES["scale_loss"] * plain_barlow(r1, r2, LOSSES["lamb"])
    contrastive = plain_nt_xent(z1, z2, LOSSES["temperature"])
    (barlow + LOSSES["alpha"] * contrastive + classifier).backward()
    return {"barlow": float(barlow.detach()), "nce": float(contrastive.detach())}


def test_losses_and_gradients_are_those_of_the_whole_batch(
    trained: Trained, data: Path, tmp_path: Path
) -> None:
    reference = prepare_pretraining(config(data, tmp_path))[0].double()
    for step in trained.steps:
        losses = whole_batch(reference, step)
        for rank in step:
            assert rank["logged"] == pytest.approx(losses, rel=1e-6)
        # one head sees the one loss, the other head the other, the backbone both
        for part in ("redundancy_projector.", "projector.", BACKBONE_PREFIX):
            expected = {n: p.grad for n, p in reference.named_parameters() if n.startswith(part)}
            # some are zero but for rounding: a bias before BatchNorm, a scale before standardising
            largest = max(float(gradient.abs().max()) for gradient in expected.values())
            assert largest > 1e-4
            for rank in step:
                for name, gradient in expected.items():
                    difference = (rank["gradients"][name] - gradient).abs().max()
                    assert float(difference) <= 1e-12 * largest, name


def test_the_mask_moves_alike_along_the_mean_of_the_gradients(trained: Trained) -> None:
    """The steps of SGD with momentum 0.9 and weight decay 5e-4 at rate 1."""
    mask = buffer = torch.zeros(64).double()
    for step in trained.steps:
        gradients = [rank["mask_gradient"] for rank in step]
        assert not torch.equal(gradients[0], gradients[1])
        buffer = 0.9 * buffer + torch.stack(gradients).mean(0) + 5e-4 * mask
        mask = mask - buffer
        assert all(torch.equal(rank["mask"], step[0]["mask"]) for rank in step)
        torch.testing.assert_close(step[0]["mask"].double(), mask, rtol=1e-5, atol=1e-9)


def test_processes_share_the_images_and_draw_other_crops(trained: Trained) -> None:
    epochs = [[int(i) for rank in step for i in rank["batch"][0]] for step in trained.steps]
    assert [sorted(epoch) for epoch in epochs] == [[*range(5 * PROCESSES)]] * 2
    assert epochs[0] != epochs[1]
    views = torch.stack([rank["batch"][1][0] for step in trained.steps for rank in step])
    assert len(views.flatten(2).std(2).unique()) > 9 * PROCESSES  # no crop twice


def test_the_first_process_tells_the_time_and_what_is_counted_twice(trained: Trained) -> None:
    """It does not train itself: the processes are copies of it."""
    result = trained.result
    assert result.checkpoint is not None and (result.folder / "finished.json").is_file()
    timer = load_raw(result.checkpoint)["callbacks"]["Timer"]
    assert result.seconds_per_epoch == timer["time_elapsed"]["train"] / 2 > 0
    note = "validation: 10 images on 3 processes: some are counted twice"
    assert trained.said.count(note) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def the_checkpoint(out: Path) -> Path:
    (checkpoint,) = out.glob("metamask/*/*.ckpt")
    return checkpoint


def test_every_launcher_makes_the_same_run(images: Path, tmp_path: Path) -> None:
    """torchrun on two "machines" of one process each, as README has it, and Lightning's ways."""

    def two(out: Path, strategy: str, **overrides: Any) -> Any:
        overrides["method_kwargs__mask"] = {"lr": 1.0}
        return pretrain_config(images, out, strategy=strategy, devices=2, **overrides)

    OmegaConf.save(two(tmp_path, "ddp", num_nodes=1, imports=["small"]), tmp_path / "run.yaml")
    command = ["-m", "metamask_solo", "pretrain", "--config-path", str(tmp_path)]
    command += ["--config-name", "run.yaml", "hydra.run.dir=.", "hydra.output_subdir=null"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    machine = [*command, "checkpoint.dir=machines", "num_nodes=2", "devices=1"]
    launched = [[*torchrun, "--node-rank", rank, *machine] for rank in "01"]
    launched.append([*command, "checkpoint.dir=ddp"])
    # a run in this process leaves its port in the environment
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")}
    environment["PYTHONPATH"] = write_module(tmp_path)
    environment["OMP_NUM_THREADS"] = "1"
    logs = [tmp_path / f"{number}.txt" for number in range(len(launched))]
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for log, arguments in zip(logs, launched, strict=True)
    ]
    try:
        for strategy in ("ddp_fork", "ddp_spawn"):
            train(two(tmp_path / strategy, strategy))
        for log, process in zip(logs, processes, strict=True):
            assert process.wait(400) == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    expected = load_raw(the_checkpoint(tmp_path / "ddp_fork"))["state_dict"]
    for name in ("ddp_spawn", "ddp", "machines"):
        state = load_raw(the_checkpoint(tmp_path / name))["state_dict"]
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items()), name
    checkpoint = the_checkpoint(tmp_path / "machines").relative_to(tmp_path)
    assert sum(f"checkpoint: {checkpoint}" in log.read_text() for log in logs[:2]) == 1
    args = json.loads((tmp_path / checkpoint.parent / "args.json").read_text())
    # two processes with ten images each, as solo-learn scales it
    assert args["optimizer"]["lr"] == pytest.approx(0.5 * 20 / 256)


def test_sync_batchnorm_uses_this_processs_batch() -> None:
    """In the meta-update SyncBatchNorm is an ordinary BatchNorm, running statistics untouched."""
    torch.manual_seed(0)
    norm, mask = nn.BatchNorm1d(4).double(), DimensionalMask(4).double()
    nn.init.normal_(norm.weight)
    synced: Any = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(norm)))[0]
    assert isinstance(synced, nn.SyncBatchNorm)
    x = torch.randn(6, 4, dtype=torch.float64)
    forward, before = nn.SyncBatchNorm.forward, copy.deepcopy(synced.state_dict())
    gradient, expected = (
        mask_hypergradient(
            lambda module=module: (mask(module(x)) ** 3).sum(),  # type: ignore[misc]
            module,
            mask,
            lambda p, g: {n: p[n] - 0.1 * d for n, d in g.items()},
            "exact" if module is synced else "double_backward",
        )
        for module in (synced, norm)
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in synced.state_dict().items())
    assert nn.SyncBatchNorm.forward is forward


def in_two_processes(rank: int, port: int) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    network, mask, x = nn.Linear(6, 4), DimensionalMask(4), torch.randn(2, 8, 6)

    def gradient(method: str, gather: bool) -> torch.Tensor:
        def loss() -> torch.Tensor:
            return nt_xent(*(mask(network(view)) for view in x), 0.5, gather=gather)

        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        return mask_hypergradient(loss, network, mask, optimizer, method)

    for method in METHODS:
        with pytest.raises(UserError, match="gather=False"):
            gradient(method, gather=True)
        own = gradient(method, gather=False)
        both = [torch.empty_like(own), torch.empty_like(own)]
        torch.distributed.all_gather(both, own)
        assert not torch.equal(*both)
        torch.testing.assert_close(mean_over_processes(own), (both[0] + both[1]) / 2)


def test_a_loss_that_exchanges_tensors_is_refused_in_every_way() -> None:
    torch.multiprocessing.start_processes(
        in_two_processes, (free_port(),), nprocs=2, start_method="fork"
    )
