"""Devices and logging. ``lib`` is true here; the real package has None without a driver."""

import os

devctxs: list = []
lib = object() if os.environ.get("EMULATED_GPUS") else None


def init(*args, **kwargs) -> bool:
    return lib is not None


def init_devices(devices) -> bool:
    list(devices)
    return lib is not None


def init_device(*args) -> bool:
    return lib is not None


def deinit(*args) -> None: ...


def get_devctx(device):
    return device


def analyze(*args) -> None: ...


def get_total_vram_usage(*args) -> int:
    return 0


def set_log_none(*a): ...
def set_log_critical(*a): ...
def set_log_error(*a): ...
def set_log_warning(*a): ...
def set_log_info(*a): ...
def set_log_detail(*a): ...
def set_log_debug(*a): ...
