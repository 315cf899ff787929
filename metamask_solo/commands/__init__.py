"""The commands: one module each, whose ``main`` takes the arguments behind the name."""

# what each does, in a line; the order is that of `metamask-solo --help`
COMMANDS = {
    "demo": "train and compare three methods on digits, with a table and figures",
    "data": "write small data sets made from Python packages, or split a folder of your own images",
    "pretrain": "pretrain any method of solo-learn from a YAML file",
    "linear": "train a linear probe on a checkpoint's frozen features",
    "finetune": "train backbone and classifier, starting from a checkpoint",
    "knn": "measure the kNN accuracy of a checkpoint's features",
    "umap": "draw a checkpoint's features in two dimensions",
    "embed": "write a checkpoint's features of a folder of images to a file",
    "fold": "fold the mask into the backbone's weights, for tools that know nothing of masks",
    "run": "run a script of your own solo-learn clone with MetaMask registered",
    "plot": "draw what runs logged: losses, online kNN, RankMe and the mask's spread",
    "analyze": "measure and draw what the mask did: redundancy, confounders, bounds",
    "benchmark": "compare methods over seeds: an answer in words, a table and figures",
    "step-cost": "time one training step of each method",
    "doctor": "say what is installed, which solo-learn this is, and which devices there are",
}
