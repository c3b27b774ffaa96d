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
