"""An arena in GPU memory, by CUDA's virtual memory management: the range of addresses stays, what is behind it goes."""

import ctypes
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from engine.arena import Arena

_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class AccessDescription(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class Mapping:
    """Addresses for at least `num_bytes` on GPU number `index`: reserved once, mapped to memory or not."""

    def __init__(self, driver: Any, num_bytes: int, index: int):
        self.driver = driver
        self.mapped = False
        self._properties = AllocationProperties(type=_PINNED, location=Location(_DEVICE, index))
        granularity = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 0)
        self.size = ctypes.c_size_t(-(-num_bytes // granularity.value) * granularity.value)
        self.address = ctypes.c_uint64()
        anywhere = ctypes.c_size_t(), ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(self.address), self.size, *anywhere, ctypes.c_uint64())

    def map(self) -> None:
        handle = ctypes.c_uint64()
        self._call("cuMemCreate", ctypes.byref(handle), self.size, ctypes.byref(self._properties), ctypes.c_uint64())
        try:
            self._call("cuMemMap", self.address, self.size, ctypes.c_size_t(), handle, ctypes.c_uint64())
        finally:
            self._call("cuMemRelease", handle)  # the mapping keeps the memory until it is undone
        self.mapped = True
        access = AccessDescription(self._properties.location, _READ_WRITE)
        self._call("cuMemSetAccess", self.address, self.size, ctypes.byref(access), ctypes.c_size_t(1))

    def unmap(self) -> None:
        self._call("cuMemUnmap", self.address, self.size)
        self.mapped = False

    def free(self) -> None:
        if self.mapped:
            self.unmap()
        self._call("cuMemAddressFree", self.address, self.size)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self.driver, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            what = (text.value or b"unknown error").decode()
            raise CUDAError(status, f"{name} of {self.size.value if hasattr(self, 'size') else 0} bytes: {what}")


class CUDAError(RuntimeError):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class CUDAArena(Arena):
    def __init__(self, num_bytes: int, device: torch.device):
        super().__init__(num_bytes, device)
        torch.cuda.synchronize(device)  # the device's context exists from here on
        index = torch.cuda.current_device() if device.index is None else device.index
        self._mapping = Mapping(ctypes.CDLL("libcuda.so.1"), num_bytes, index)
        self.restore()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self._mapping.address.value
        return {"shape": (self.num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}

    def bytes(self) -> Tensor:
        return torch.as_tensor(self, device=self.device)

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        self._mapping.unmap()
        self.held = False

    def restore(self) -> None:
        if self.held:
            return
        try:
            self._mapping.map()
        except CUDAError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            torch.cuda.empty_cache()  # torch may hold free memory
            self._mapping.map()
        self.held = True

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end there may be no driver any more
            torch.cuda.synchronize(self.device)
            self._mapping.free()
