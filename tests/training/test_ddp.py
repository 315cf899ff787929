"""Several processes of Lightning's DDP (gloo on the CPU) against one."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import plain_barlow, plain_nt_xent
from gathering import gathering_and_not
from omegaconf import OmegaConf
from runs import pretrain_config, use_small_backbone
from torch import nn

from metamask_solo import DimensionalMask, mask_hypergradient
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.hosts import BACKBONE_PREFIX, pl

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


STEPS = 2
LOSSES = {"alpha": 3.0, "lamb": 0.02, "scale_loss": 0.1, "temperature": 0.3}


class Record(pl.Callback):  # type: ignore[name-defined]
    """Keeps, for each step, what goes into it and the gradients that DDP made of it."""

    def __init__(self, out: Path):
        self.out = out
        self.steps: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Any, model: Any) -> None:
        own, update = model.mask_gradient, model._update_mask

        def recorded(views: Any) -> torch.Tensor:
            gradient = own(views)
            self.steps[-1]["mask_gradient"] = gradient.clone()
            return gradient

        def recorded_update(views: Any) -> None:
            update(views)
            self.steps[-1]["mask"] = model.mask.logits.detach().clone()

        model.mask_gradient = recorded
        model._update_mask = recorded_update

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, i: int) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        self.steps.append({"state": state, "images": batch[0].tolist()})

    def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        self.steps[-1]["gradients"] = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        logged = trainer.callback_metrics
        self.steps[-1]["logged"] = {
            name: float(logged[f"train_{name}_loss_step"]) for name in ("barlow", "nce")
        }

    def on_train_end(self, trainer: Any, model: Any) -> None:
        torch.save(self.steps, self.out / f"rank{trainer.global_rank}.pt")


def small_model(data: Path, out: Path) -> Any:
    """MetaMask in double precision on a backbone of a few milliseconds."""
    from metamask_solo.training.pretrain import prepare_pretraining

    cfg = pretrain_config(data, out, max_epochs=1)
    cfg.optimizer.batch_size = 5
    cfg.method_kwargs.update(LOSSES, mask={"lr": 1.0})
    model, *_ = prepare_pretraining(cfg)
    use_small_backbone(model)
    return model.double()


def run_rank(data: str, out: str, processes: int) -> None:
    """The body of each process: the real training step, on its share of the images."""
    import metamask_solo  # noqa: F401

    torch.set_num_threads(1)
    model = small_model(Path(data), Path(out))
    loader = torch.utils.data.DataLoader(FixedBatches(5 * processes * STEPS), batch_size=5)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=pl.strategies.DDPStrategy(
            find_unused_parameters=False, process_group_backend="gloo"
        ),
        max_epochs=1,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record(Path(out))],
    )
    trainer.fit(model, loader)


def launch(data: Path, out: Path, processes: int) -> list[list[dict[str, Any]]]:
    """What each process recorded of each step."""
    code = f"import test_ddp; test_ddp.run_rank({str(data)!r}, {str(out)!r}, {processes})"
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
    ranks = [torch.load(out / f"rank{r}.pt") for r in range(processes)]
    assert all(len(steps) == STEPS for steps in ranks)
    return ranks


@pytest.fixture(scope="module", params=[2, 3])
def ranks(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, Any]]]:
    return launch(images, tmp_path_factory.mktemp("ddp"), request.param)


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_model(images, tmp_path_factory.mktemp("reference"))


def whole_batch(model: Any, step: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The losses' definitions on the images of all processes, on one.

    BatchNorm has statistics of its own in each process, so each share passes the network alone.
    """
    model.load_state_dict(step[0]["state"])
    model.zero_grad()
    model.train()
    data = FixedBatches(5 * len(step) * STEPS)
    projected: list[list[torch.Tensor]] = [[], [], [], []]
    classifier = torch.zeros((), dtype=torch.float64)
    for rank in step:
        assert all(torch.equal(v, step[0]["state"][n]) for n, v in _shared(rank["state"]))
        labels = torch.tensor([data[i][2] for i in rank["images"]])
        for view in range(2):
            h = model.backbone(torch.stack([data[i][1][view] for i in rank["images"]]).double())
            u = h * torch.sigmoid(model.mask.logits)
            projected[view].append(model.redundancy_projector(u))
            projected[2 + view].append(model.projector(u))
            loss = nn.functional.cross_entropy(model.classifier(u.detach()), labels)
            classifier = classifier + loss / (2 * len(step))
    r1, r2, z1, z2 = map(torch.cat, projected)
    barlow = LOSSES["scale_loss"] * plain_barlow(r1, r2, LOSSES["lamb"])
    contrastive = plain_nt_xent(z1, z2, LOSSES["temperature"])
    (barlow + LOSSES["alpha"] * contrastive + classifier).backward()
    return {"barlow": barlow.detach(), "nce": contrastive.detach()}


def _shared(state: dict[str, torch.Tensor]) -> Any:
    """What DDP keeps equal; running statistics are each process's own until the next step."""
    return ((n, v) for n, v in state.items() if "running" not in n and "num_batches" not in n)


@pytest.mark.parametrize("part", ["redundancy_projector.", "projector.", BACKBONE_PREFIX])
def test_the_training_steps_gradient_is_that_of_the_whole_batch(
    ranks: list[list[dict[str, Any]]], reference: Any, part: str
) -> None:
    """One head sees the one loss, the other head the other, the backbone both."""
    for step in map(list, zip(*ranks, strict=True)):
        whole_batch(reference, step)
        expected = {n: p.grad for n, p in reference.named_parameters() if n.startswith(part)}
        # some are zero but for rounding: a bias before BatchNorm, a scale before standardising
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        assert largest > 1e-4
        for rank in step:
            for name, gradient in expected.items():
                difference = (rank["gradients"][name] - gradient).abs().max()
                assert float(difference) <= 1e-12 * largest, name


def test_the_logged_losses_are_those_of_the_whole_batch(
    ranks: list[list[dict[str, Any]]], reference: Any
) -> None:
    for step in map(list, zip(*ranks, strict=True)):
        expected = whole_batch(reference, step)
        for rank in step:
            for name, value in expected.items():
                assert rank["logged"][name] == pytest.approx(float(value), rel=1e-6)


def test_the_mask_is_bit_identical_on_all_ranks(ranks: list[list[dict[str, Any]]]) -> None:
    for step in zip(*ranks, strict=True):
        assert all(torch.equal(rank["mask"], step[0]["mask"]) for rank in step)


def test_the_mask_moves_along_the_mean_of_the_ranks_gradients(
    ranks: list[list[dict[str, Any]]],
) -> None:
    """The steps of SGD with momentum 0.9 and weight decay 5e-4 at rate 1."""
    mask, buffer = torch.zeros(512).double(), torch.zeros(512).double()
    for step in zip(*ranks, strict=True):
        own = [rank["mask_gradient"] for rank in step]
        assert not torch.equal(own[0], own[1])
        buffer = 0.9 * buffer + torch.stack(own).mean(0) + 5e-4 * mask
        mask = mask - buffer
        torch.testing.assert_close(step[0]["mask"].double(), mask, rtol=1e-5, atol=1e-9)


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
    """In the meta-update SyncBatchNorm is an ordinary BatchNorm, running statistics untouched."""
    torch.manual_seed(0)
    norm, mask = nn.BatchNorm1d(4).double(), DimensionalMask(4).double()
    nn.init.normal_(norm.weight)
    synced: Any = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(norm)))[0]
    assert isinstance(synced, nn.SyncBatchNorm)
    x = torch.randn(6, 4, dtype=torch.float64)
    forward, before = nn.SyncBatchNorm.forward, copy.deepcopy(synced.state_dict())
    found, expected = (
        mask_hypergradient(
            lambda module=module: (mask(module(x)) ** 3).sum(),  # type: ignore[misc]
            module,
            mask,
            lambda p, g: {n: p[n] - 0.1 * d for n, d in g.items()},
            "exact" if module is synced else "double_backward",
        )
        for module in (synced, norm)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in synced.state_dict().items())
    assert nn.SyncBatchNorm.forward is forward


def test_a_loss_that_exchanges_tensors_is_refused_in_every_way(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(gathering_and_not, (free_port(), tmp_path), nprocs=2)
    (refused, g0, mean0), (_, g1, mean1) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert all("gather=False" in line for (gather, _), line in refused.items() if gather)
    assert not any(line for (gather, _), line in refused.items() if not gather)
    assert torch.equal(mean0, mean1)
    torch.testing.assert_close(mean0, (g0 + g1) / 2)
