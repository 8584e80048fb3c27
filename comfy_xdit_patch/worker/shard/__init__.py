"""ComfyUI's own forward on this rank's shard of the tokens."""
