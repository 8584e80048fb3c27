"""Addresses as tensors."""

import ctypes

import torch


def get_tensor_from_raw_ptr(ptr, size, device):
    import emulated_tensors as emulated

    view = (ctypes.c_uint8 * size).from_address(ptr)
    device = torch.device(device)
    return emulated.Emulated(
        torch.frombuffer(view, dtype=torch.uint8),
        torch.device("cuda", device.index or 0),
        counted=False,
    )


def aimdo_to_tensor(alloc, device):
    _, ptr, size = alloc
    return get_tensor_from_raw_ptr(ptr, size, device)


def hostbuf_to_tensor(hostbuf):
    view = (ctypes.c_uint8 * hostbuf.size).from_address(hostbuf.get_raw_address())
    return torch.frombuffer(view, dtype=torch.uint8)


def get_torch_allocator():
    return None
