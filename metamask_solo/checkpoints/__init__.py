"""Reading checkpoints safely, and folding a mask into an ordinary backbone."""
