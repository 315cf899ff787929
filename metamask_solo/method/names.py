"""Names that mask, hypergradient and settings share; without torch, since ``--help`` reads them."""

from typing import Literal

# of a mask: sigmoid for m = σ(a), linear for m = a
Kind = Literal["sigmoid", "linear"]
# of the ways to the hypergradient
Method = Literal["exact", "double_backward", "finite_difference", "first_order"]
