"""What is made of finished runs: curves, and the analyses of the paper."""
