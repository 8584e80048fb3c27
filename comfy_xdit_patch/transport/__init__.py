"""How a call and its tensors cross the process boundary."""
