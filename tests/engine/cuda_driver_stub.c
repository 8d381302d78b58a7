// The calls of CUDA's virtual memory management that engine/cuda_arena.py makes, over mmap: compiled against the real
// cuda.h, so that a structure that is laid out otherwise, or a missing mapping, shows without a GPU.
#define _GNU_SOURCE
#include <cuda.h>
#include <sys/mman.h>

static size_t created, mapped;  // bytes
static CUdeviceptr writable;

static int fits(const CUmemAllocationProp *p) {
    return p->type == CU_MEM_ALLOCATION_TYPE_PINNED && p->requestedHandleTypes == CU_MEM_HANDLE_TYPE_NONE &&
           p->location.type == CU_MEM_LOCATION_TYPE_DEVICE && p->location.id == 3 && !p->win32HandleMetaData &&
           !p->allocFlags.compressionType && !p->allocFlags.usage;
}

CUresult cuMemGetAllocationGranularity(size_t *out, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) {
    *out = 1 << 21;
    return fits(p) && f == CU_MEM_ALLOC_GRANULARITY_MINIMUM ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemAddressReserve(CUdeviceptr *out, size_t size, size_t alignment, CUdeviceptr at, unsigned long long flags) {
    if (size % (1 << 21) || alignment || at || flags) return CUDA_ERROR_INVALID_VALUE;
    *out = (CUdeviceptr)mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
    return mapped ? CUDA_ERROR_INVALID_VALUE : munmap((void *)at, size) ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *out, size_t size, const CUmemAllocationProp *p, unsigned long long f) {
    if (size > (size_t)1 << 30) return CUDA_ERROR_OUT_OF_MEMORY;
    *out = 77;
    created += size;
    return fits(p) && !f ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    if (!mapped) created = 0;
    return handle == 77 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long f) {
    if (offset || handle != 77 || f || mapped || created != size) return CUDA_ERROR_INVALID_VALUE;
    mapped = size;
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc *access, size_t count) {
    if (count != 1 || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE || access->location.id != 3 ||
        access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE || mapped != size)
        return CUDA_ERROR_INVALID_VALUE;
    mprotect((void *)at, size, PROT_READ | PROT_WRITE);
    return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
    if (mapped != size) return CUDA_ERROR_INVALID_VALUE;
    mmap((void *)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    mapped = created = 0;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **out) {
    *out = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "invalid argument";
    return CUDA_SUCCESS;
}

size_t held(void) { return created; }
