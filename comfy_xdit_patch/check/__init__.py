"""``comfy-xdit check``: whether the product works on this machine's GPUs, in a few minutes."""
