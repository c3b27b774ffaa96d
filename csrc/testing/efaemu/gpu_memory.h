// What stands for GPU memory where there is no GPU: a memfd that the application has mapped.
#pragma once

#include <rdma/fi_domain.h>
#include <sys/uio.h>

#include <cstdint>

namespace efaemu {

/// The addresses of GPU memory that is to be registered. Of a dma-buf it checks what a kernel would find out:
/// that the descriptor has these bytes, and that they are what is mapped at the addresses. Memory given by
/// address needs $EFAEMU_PEER_MEMORY=1. Returns a libfabric error.
int find_gpu_memory(const fi_mr_attr& attributes, uint64_t flags, iovec& range);

}  // namespace efaemu
