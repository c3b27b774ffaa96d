// The CUDA runtime, as far as the host needs it beside launches.
#pragma once

#include "cuda/halves.h"

namespace efa_ep::cuda {

/// Lets the calling thread work with a GPU.
void use_gpu(int ordinal);

/// A stream of this thread's GPU that waits for no other.
Stream create_stream();
/// Waits for its work.
void destroy_stream(Stream stream);

/// Throws CudaError if a launch of this thread was refused since the last call.
void throw_if_launch_failed();

/// Whether all work in the stream is done. Throws CudaError if some of it crashed.
bool is_done(Stream stream);

}  // namespace efa_ep::cuda
