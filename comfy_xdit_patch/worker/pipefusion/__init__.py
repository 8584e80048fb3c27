"""PipeFusion: blocks in stages, tokens in pipeline patches."""
