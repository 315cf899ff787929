"""What the first step of a method of solo-learn asserts of sizes, checked before any work."""

from typing import Any

from metamask_solo.errors import UserError

# backbones that are built for one size of images
SIZED_BACKBONES = ("vit", "swin")


def check_sizes(model: Any, batch_size: int, processes: int, steps: int) -> None:
    """Raises UserError where a queue, a whitening or clusters do not go with the batches.

    Args:
        model: a method of solo-learn.
        batch_size: images of a step of one process.
        processes: number of processes.
        steps: batches of an epoch.
    """
    queue = getattr(model, "queue_size", 0)
    batch = batch_size * processes
    if "queue" in dict(model.named_buffers()):
        if queue % batch:
            fits = max(batch, queue // batch * batch)
            raise UserError(
                f"method_kwargs.queue_size={queue}: must be a multiple of the images of a step, "
                f"{batch}; {fits} is one"
            )
    elif queue and queue // processes < batch_size:  # SwAV's, made when training starts
        raise UserError(
            f"method_kwargs.queue_size={queue}: must be 0, or at least {batch} (a step)"
        )
    if hasattr(model, "kmeans_iters"):
        most, shown = max(model.num_prototypes), steps * batch_size
        if most > shown:
            raise UserError(
                f"method_kwargs.num_prototypes={list(model.num_prototypes)}: at most {shown}, the "
                "images of an epoch of one process"
            )
