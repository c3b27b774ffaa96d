# efa_ep_cuda: the halves as CUDA kernels and what launches them, or without nvcc nothing but the statement that
# they are missing. Links the CUDA runtime statically and never libcuda, so that the module can be imported on
# machines without a driver.
add_library(efa_ep_cuda INTERFACE)

set(cuda_found OFF)
if(EFA_EP_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(cuda_found ON)
  endif()
elseif(EFA_EP_CUDA STREQUAL "ON")
  set(cuda_found ON)
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cpp)
file(GLOB kernel_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)
if(cuda_found)
  # An architecture's "a" features are in no PTX that another one could compile, so there is no PTX at all.
  list(TRANSFORM EFA_EP_CUDA_ARCHITECTURES APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  find_package(CUDAToolkit REQUIRED)
  add_library(efa_ep_kernels STATIC ${kernel_sources} ${cuda_sources})
  set_target_properties(efa_ep_kernels PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_compile_options(efa_ep_kernels PRIVATE
                         "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra>")
  target_link_libraries(efa_ep_kernels PUBLIC efa_ep_core PRIVATE CUDA::cudart_static)
  list(TRANSFORM EFA_EP_CUDA_ARCHITECTURES PREPEND "sm_" OUTPUT_VARIABLE built_architectures)
  list(JOIN built_architectures "," built_architectures)
  target_link_libraries(efa_ep_cuda INTERFACE efa_ep_kernels)
  message(STATUS "CUDA kernels for ${built_architectures}, by ${CMAKE_CUDA_COMPILER}")
elseif(EFA_EP_CUDA STREQUAL "SIMT")
  set(built_architectures "simt")
  target_link_libraries(efa_ep_cuda INTERFACE simt_device)  # tests/simt
  message(STATUS "CUDA kernels on CPU fibers: for tests, not for use")
else()
  message(WARNING "No CUDA kernels in this build: nvcc was not found (EFA_EP_CUDA=${EFA_EP_CUDA}). The package will "
                  "serve CPU tensors only. Put nvcc of CUDA 13 on PATH, or set CUDACXX, and build again.")
endif()
if(built_architectures)
  target_compile_definitions(efa_ep_cuda INTERFACE EFA_EP_CUDA_ARCHITECTURES="${built_architectures}")
endif()
