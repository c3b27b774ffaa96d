# efa_ep_cuda: what launches the halves on a GPU, and the kernels if there is nvcc. Links the CUDA runtime statically
# and never libcuda, so that the module can be imported on machines without a driver.
set(with_kernels ${EFA_EP_CUDA})
if(EFA_EP_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(with_kernels ON)
  else()
    set(with_kernels OFF)
  endif()
endif()

set(architectures "")
if(with_kernels STREQUAL "SIMT")
  set(architectures "simt")
  add_library(efa_ep_cuda INTERFACE)
  target_link_libraries(efa_ep_cuda INTERFACE simt_device)  # tests/simt
  message(STATUS "CUDA kernels on CPU fibers: for tests, not for use")
elseif(with_kernels)
  # An architecture's "a" features are in no PTX that another one could compile, so there is no PTX at all.
  list(TRANSFORM EFA_EP_CUDA_ARCHITECTURES APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  file(GLOB kernel_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)
  add_library(efa_ep_cuda STATIC ${kernel_sources} cuda/device.cpp cuda/device_state.cpp cuda/stand_in.cpp
              cuda/runtime.cpp)
  set_target_properties(efa_ep_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_compile_options(efa_ep_cuda PRIVATE
                         "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra>")
  target_link_libraries(efa_ep_cuda PUBLIC efa_ep_core PRIVATE CUDA::cudart_static)
  list(TRANSFORM EFA_EP_CUDA_ARCHITECTURES PREPEND "sm_" OUTPUT_VARIABLE architectures)
  list(JOIN architectures "," architectures)
  message(STATUS "CUDA kernels for ${architectures}, by ${CMAKE_CUDA_COMPILER}")
else()
  add_library(efa_ep_cuda STATIC cuda/device.cpp cuda/device_state.cpp cuda/stand_in.cpp cuda/no_kernels.cpp)
  target_link_libraries(efa_ep_cuda PUBLIC efa_ep_core)
  message(WARNING "No CUDA kernels in this build: nvcc was not found (EFA_EP_CUDA=${EFA_EP_CUDA}). The package will "
                  "serve CPU tensors only. Put nvcc of CUDA 13 on PATH, or set CUDACXX, and build again.")
endif()
target_compile_definitions(efa_ep_cuda INTERFACE EFA_EP_CUDA_ARCHITECTURES="${architectures}")
