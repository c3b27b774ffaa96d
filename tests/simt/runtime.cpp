// csrc/cuda/runtime.h on the engine, and how a Python test gets a stream.
#include "cuda/runtime.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "engine/simt.h"

namespace efa_ep::cuda {

namespace {
thread_local int tls_gpu = 0;
thread_local std::vector<simt::stream_t> tls_streams;

simt::stream_t new_stream(int device) { return tls_streams.emplace_back(simt::stream_create(device)); }
}  // namespace

void use_gpu(int ordinal) { tls_gpu = ordinal; }

Stream create_stream() { return reinterpret_cast<Stream>(new_stream(tls_gpu)); }

void destroy_stream(Stream stream) { simt::stream_sync(reinterpret_cast<simt::stream_t>(stream)); }

void throw_if_launch_failed() {}

bool is_done(Stream stream) {
  if (!simt::stream_idle(reinterpret_cast<simt::stream_t>(stream))) return false;
  simt::stream_sync(reinterpret_cast<simt::stream_t>(stream));
  return true;
}

}  // namespace efa_ep::cuda

// For ctypes: streams, and what CUDA and torch do in them.
#define EXPORTED extern "C" __attribute__((visibility("default")))

/// A stream of the device with that number.
EXPORTED void* simt_new_stream(int device) { return efa_ep::cuda::new_stream(device); }

/// cuCtxSynchronize, where each rank is a thread: waits for the streams that this one has made.
EXPORTED void simt_synchronize() {
  for (const simt::stream_t stream : efa_ep::cuda::tls_streams) simt::stream_sync(stream);
}

/// cuMemsetD32Async.
EXPORTED void simt_fill_words(void* stream, uint32_t* words, uint32_t value, size_t count) {
  simt::launch_raw(
      static_cast<simt::stream_t>(stream), dim3(1), dim3(1), [=] { std::fill_n(words, count, value); },
      "fill");
}

EXPORTED void simt_capture_begin(void* stream) { simt::capture_begin(static_cast<simt::stream_t>(stream)); }

/// A graph, which lives to the end of the process.
EXPORTED void* simt_capture_end(void* stream) {
  return new std::shared_ptr<simt::Graph>(simt::capture_end(static_cast<simt::stream_t>(stream)));
}

EXPORTED size_t simt_graph_size(void* graph) {
  return simt::graph_size(**static_cast<std::shared_ptr<simt::Graph>*>(graph));
}

EXPORTED void simt_graph_launch(void* graph, void* stream) {
  simt::graph_launch(**static_cast<std::shared_ptr<simt::Graph>*>(graph),
                     static_cast<simt::stream_t>(stream));
}
