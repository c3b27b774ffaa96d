#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

#include <string>

#include "errors.h"

namespace efa_ep::cuda {
namespace {

[[noreturn]] void refuse(const char* what, cudaError_t error) {
  const char* remedy = "";
  if (error == cudaErrorNoKernelImageForDevice) {
    remedy =
        "; this build has no kernels for this GPU (`vllm_efa_ep.__cuda__` lists those it has): build with "
        "CMAKE_ARGS=-DEFA_EP_CUDA_ARCHITECTURES=...";
  } else if (error == cudaErrorInsufficientDriver) {
    remedy = "; the driver is missing, or older than the CUDA release that this build was made with";
  }
  throw CudaError(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                  ")" + remedy);
}

}  // namespace

void use_gpu(int ordinal) {
  if (const cudaError_t error = cudaSetDevice(ordinal); error != cudaSuccess)
    refuse("a thread cannot use its GPU", error);
}

Stream create_stream() {
  cudaStream_t stream = nullptr;
  if (const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      error != cudaSuccess)
    refuse("a stream could not be created", error);
  return stream;
}

void destroy_stream(Stream stream) {
  cudaStreamSynchronize(stream);  // whatever went wrong in it was reported to who waited for it
  cudaStreamDestroy(stream);
}

void throw_if_launch_failed() {
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    refuse("a kernel could not be launched", error);
}

bool is_done(Stream stream) {
  const cudaError_t state = cudaStreamQuery(stream);
  if (state == cudaErrorNotReady) return false;
  if (state != cudaSuccess) refuse("a kernel, of this package or an earlier one, failed", state);
  return true;
}

}  // namespace efa_ep::cuda
