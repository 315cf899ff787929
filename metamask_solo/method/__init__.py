"""What MetaMask is: mask, losses, hypergradient, trial step and the method itself."""
