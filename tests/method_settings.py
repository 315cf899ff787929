"""Settings of solo-learn's methods for small runs."""

from typing import Any

# the smallest settings with which each method runs two steps of ten images
KWARGS: dict[str, dict[str, Any]] = {
    "metamask": {},
    "simclr": {"temperature": 0.2},
    "supcon": {"temperature": 0.2},
    "barlow_twins": {},
    "byol": {"pred_hidden_dim": 16},
    "simsiam": {"pred_hidden_dim": 16},
    "vicreg": {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0},
    "vibcreg": {
        "sim_loss_weight": 25.0,
        "var_loss_weight": 25.0,
        "cov_loss_weight": 1.0,
        "iternorm": False,
    },
    "nnbyol": {"pred_hidden_dim": 16, "queue_size": 40},
    "nnsiam": {"pred_hidden_dim": 16, "queue_size": 40},
    "nnclr": {"pred_hidden_dim": 16, "queue_size": 40, "temperature": 0.2},
    "all4one": {
        "proj_output_dim": 16,
        "pred_hidden_dim": 16,
        "queue_size": 40,
        "temperature": 0.2,
    },
    "mocov2plus": {"queue_size": 40, "temperature": 0.2},
    "mocov3": {"pred_hidden_dim": 16, "temperature": 0.2},
    "ressl": {"queue_size": 40, "temperature_q": 0.1, "temperature_k": 0.04},
    "swav": {
        "queue_size": 40,
        "temperature": 0.1,
        "num_prototypes": 10,
        "sk_iters": 3,
        "sk_epsilon": 0.05,
        "freeze_prototypes_epochs": 0,
        "epoch_queue_starts": 1,
    },
    "deepclusterv2": {"temperature": 0.1, "num_prototypes": [5, 5], "kmeans_iters": 2},
    "dino": {
        "num_prototypes": 20,
        "clip_grad": 0,
        "freeze_last_layer": 1,
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "warmup_teacher_temperature": 0.04,
        "warmup_teacher_temperature_epochs": 1,
        "use_bn_in_head": False,
        "norm_last_layer": True,
    },
    "wmse": {"whitening_iters": 1, "whitening_size": 10, "whitening_eps": 0.1},
}
