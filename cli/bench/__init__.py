"""`fedsparse bench`: how long a round takes, against a plain PyTorch loop and method against method."""
