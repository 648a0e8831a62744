# GPU kernels: CUDA files compiled ahead of time into one fat binary each, which is embedded in the
# library and loaded through the driver. ATTN_CUDA: ON, OFF, or AUTO (ON where there is an nvcc).
set(ATTN_CUDA AUTO CACHE STRING "GPU kernels: ON, OFF or AUTO (where the CUDA toolkit is)")
set(ATTN_CUDA_ARCHS "80;89;90a;ptx" CACHE STRING "Architectures of the GPU kernels; ptx: for later ones")
find_program(ATTN_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(ATTN_CUDA STREQUAL "ON" AND NOT ATTN_NVCC)
  message(FATAL_ERROR "ATTN_CUDA is ON, and there is no nvcc: set CUDA_HOME, or PATH")
endif()
set(ATTN_CUDA_BUILD OFF CACHE INTERNAL "")
if(ATTN_NVCC AND NOT ATTN_CUDA STREQUAL "OFF")
  set(ATTN_CUDA_BUILD ON CACHE INTERNAL "" FORCE)
  get_filename_component(cuda_bin ${ATTN_NVCC} REALPATH)
  get_filename_component(cuda_bin ${cuda_bin} DIRECTORY)
  find_path(ATTN_CUDA_INCLUDE cuda.h HINTS ${cuda_bin}/../include ${cuda_bin}/../targets/x86_64-linux/include
            REQUIRED)
endif()
message(STATUS "GPU kernels: ${ATTN_CUDA_BUILD}")

# An eighth of the size, where the compiler can.
set(cuda_small "")
if(ATTN_CUDA_BUILD)
  execute_process(COMMAND ${ATTN_NVCC} --help OUTPUT_VARIABLE cuda_help ERROR_QUIET)
  if(cuda_help MATCHES "compress-mode")
    set(cuda_small --compress-mode=size)
  endif()
endif()

set(cuda_codes "")
foreach(arch ${ATTN_CUDA_ARCHS})
  if(arch STREQUAL "ptx")
    list(APPEND cuda_codes -gencode=arch=compute_90,code=compute_90)
  else()
    list(APPEND cuda_codes -gencode=arch=compute_${arch},code=sm_${arch})
  endif()
endforeach()

# What needs wgmma has one architecture; on others it is not loaded.
set(cuda_wide_codes -gencode=arch=compute_90a,code=sm_90a)

# attn_cuda(NAME file definitions...): NAME.fatbin in the binary folder. WIDE: for sm_90a alone.
function(attn_cuda name file)
  cmake_parse_arguments(PARSE_ARGV 2 arg "WIDE" "" "")
  if(arg_WIDE)
    set(cuda_codes ${cuda_wide_codes})
  endif()
  add_custom_command(
    OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/${name}.fatbin
    COMMAND ${ATTN_NVCC} -std=c++17 -O3 -fatbin ${cuda_small} -I${PROJECT_SOURCE_DIR} ${cuda_codes}
            ${arg_UNPARSED_ARGUMENTS}
            -MD -MF ${CMAKE_CURRENT_BINARY_DIR}/${name}.d -MT ${name}.fatbin
            -o ${CMAKE_CURRENT_BINARY_DIR}/${name}.fatbin ${CMAKE_CURRENT_SOURCE_DIR}/${file}
    DEPENDS ${file}
    DEPFILE ${CMAKE_CURRENT_BINARY_DIR}/${name}.d
    VERBATIM)
endfunction()

# attn_cuda_blobs(NAMES...): blobs.c in the binary folder, a table of these files (cuda_int.h).
function(attn_cuda_blobs)
  set(text "#include \"kernels/cuda/cuda_int.h\"\n\n#include <stddef.h>\n\n")
  set(table "")
  set(files "")
  foreach(name ${ARGN})
    set(file ${CMAKE_CURRENT_BINARY_DIR}/${name}.fatbin)
    string(APPEND text "extern const unsigned char cuda_blob_${name}[];\n"
           "__asm__(\".section .rodata\\n.balign 64\\n.hidden cuda_blob_${name}\\n\"\n"
           "        \".globl cuda_blob_${name}\\ncuda_blob_${name}:\\n\"\n"
           "        \".incbin \\\"${file}\\\"\\n.previous\");\n")
    string(APPEND table "    {\"${name}\", cuda_blob_${name}},\n")
    list(APPEND files ${file})
  endforeach()
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/blobs.c
       CONTENT "${text}\nconst cuda_blob_t cuda_blobs[] = {\n${table}    {NULL, NULL},\n};\n" @ONLY)
  set_source_files_properties(${CMAKE_CURRENT_BINARY_DIR}/blobs.c PROPERTIES OBJECT_DEPENDS "${files}")
endfunction()
