// What a build without nvcc has in the place of the kernels and of CUDA's runtime.
#include "cuda/halves.h"
#include "cuda/runtime.h"
#include "errors.h"

namespace efa_ep::cuda {
namespace {

[[noreturn]] void refuse() {
  throw CudaError("this build has no CUDA kernels; build it with nvcc of CUDA 13 on PATH");
}

}  // namespace

void launch_dispatch_send(const HalfLaunch&, const DispatchInput&) { refuse(); }
void launch_dispatch_recv(const HalfLaunch&, const DispatchOutput&) { refuse(); }
void launch_combine_send(const HalfLaunch&, const CombineInput&) { refuse(); }
void launch_combine_recv(const HalfLaunch&, std::byte*) { refuse(); }
void use_gpu(int) { refuse(); }
Stream create_stream() { refuse(); }
void destroy_stream(Stream) {}
void throw_if_launch_failed() {}
bool is_done(Stream) { refuse(); }

}  // namespace efa_ep::cuda
