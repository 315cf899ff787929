"""What MetaMask is: mask, losses, hypergradient, trial step and the method itself."""

from typing import Literal

Kind = Literal["sigmoid", "linear"]
Method = Literal["exact", "double_backward", "finite_difference", "first_order"]
