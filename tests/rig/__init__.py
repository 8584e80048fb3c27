"""The test rig: environment, ComfyUI trees, tiny models, real servers, and the demo.

Runs in: ``install.py``, the tests, and the demo; never inside ComfyUI (``shim/`` apart).
"""
