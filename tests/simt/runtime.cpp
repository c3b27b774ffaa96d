// csrc/cuda/runtime.h on the engine, and how a Python test gets a stream.
#include "cuda/runtime.h"

#include "engine/simt.h"

namespace efa_ep::cuda {

namespace {
thread_local int tls_gpu = 0;
}

void use_gpu(int ordinal) { tls_gpu = ordinal; }

Stream create_stream() { return reinterpret_cast<Stream>(simt::stream_create(tls_gpu)); }

void destroy_stream(Stream stream) { simt::stream_sync(reinterpret_cast<simt::stream_t>(stream)); }

void throw_if_launch_failed() {}

bool is_done(Stream stream) {
  simt::stream_sync(reinterpret_cast<simt::stream_t>(stream));
  return true;
}

}  // namespace efa_ep::cuda

/// A stream of the device with that number, for ctypes.
extern "C" __attribute__((visibility("default"))) void* simt_new_stream(int device) {
  return simt::stream_create(device);
}
