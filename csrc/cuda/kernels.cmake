# Adds the CUDA kernels to target _C, where XRL_WITH_CUDA and the machine say so. CMAKE_CUDA_ARCHITECTURES, or CUDAARCHS
# in the environment, chooses other devices than the usual ones.
include(CheckLanguage)

set(XRL_OLDEST_NVCC 12.0)  # the first that knows the bulk copies of sm_90

# The usual place need not be on the PATH.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(XRL_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  if(XRL_NVCC)
    set(CMAKE_CUDA_COMPILER ${XRL_NVCC})
  endif()
endif()

set(XRL_NO_CUDA "")
check_language(CUDA)  # compiles a small program: an nvcc that does not fit the host compiler counts as none
if(NOT CMAKE_CUDA_COMPILER)
  set(XRL_NO_CUDA "no nvcc that works was found on the PATH, in CUDA_HOME or in /usr/local/cuda (CUDACXX names one)")
else()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # A100, H100 and H200, B200; later devices translate the last one's PTX.
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
    set(XRL_USUAL_ARCHITECTURES ON)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS XRL_OLDEST_NVCC)
    set(XRL_NO_CUDA "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than ${XRL_OLDEST_NVCC}")
  elseif(NOT TARGET CUDA::cudart_static)
    set(XRL_NO_CUDA "nvcc is there, but not libcudart_static.a")
  elseif(XRL_USUAL_ARCHITECTURES AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  endif()
endif()

if(XRL_NO_CUDA)
  if(XRL_WITH_CUDA STREQUAL "ON")
    message(FATAL_ERROR "XRL_WITH_CUDA=ON: ${XRL_NO_CUDA}")
  endif()
  message(STATUS "xrl: no CUDA kernels: ${XRL_NO_CUDA}")
  return()
endif()

# As the compiler calls them: 90-real is code for sm_90, 90-virtual is PTX, 90 is both.
set(XRL_CUDA_NAMES "")
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(architecture MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
    if(NOT CMAKE_MATCH_2 STREQUAL "-virtual")
      list(APPEND XRL_CUDA_NAMES sm_${CMAKE_MATCH_1})
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-real")
      list(APPEND XRL_CUDA_NAMES compute_${CMAKE_MATCH_1})
    endif()
  else()
    list(APPEND XRL_CUDA_NAMES ${architecture})  # native, all, all-major
  endif()
endforeach()
list(JOIN XRL_CUDA_NAMES "," XRL_CUDA_NAMES)
message(STATUS "xrl: CUDA kernels for ${XRL_CUDA_NAMES}")

file(GLOB XRL_CUDA_KERNELS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)
add_library(xrl_cuda OBJECT ${XRL_CUDA_KERNELS})
set_target_properties(xrl_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
target_include_directories(xrl_cuda PRIVATE ${CMAKE_CURRENT_LIST_DIR}/..)
target_compile_options(xrl_cuda PRIVATE --Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror)

target_sources(_C PRIVATE csrc/bindings/cuda.cpp $<TARGET_OBJECTS:xrl_cuda>)
target_compile_definitions(_C PRIVATE XRL_WITH_CUDA XRL_CUDA_ARCHITECTURES="${XRL_CUDA_NAMES}")
# Static: the module must load on machines without CUDA and beside whatever CUDA torch brings.
target_link_libraries(_C PRIVATE CUDA::cudart_static)
# Nothing is linked on the device, so the C++ compiler links the module as ever.
set_target_properties(_C PROPERTIES LINKER_LANGUAGE CXX)
