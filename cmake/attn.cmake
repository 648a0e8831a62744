# How a folder is built: attn_library(kvstore kvstore.c), attn_test(kvstore_test kvstore).

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# Asserts state what we believe and stay on in every build.
foreach(type RELEASE RELWITHDEBINFO MINSIZEREL)
  string(REPLACE "-DNDEBUG" "" CMAKE_C_FLAGS_${type} "${CMAKE_C_FLAGS_${type}}")
endforeach()

find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PROTOBUF_C REQUIRED IMPORTED_TARGET libprotobuf-c)
find_library(GRPC_LIBRARY grpc REQUIRED)
find_library(GPR_LIBRARY gpr REQUIRED)
find_library(CRYPTO_LIBRARY crypto REQUIRED)

add_library(attn_flags INTERFACE)
target_compile_definitions(attn_flags INTERFACE _GNU_SOURCE)
# No contraction unless a kernel writes fma itself: merges promise exact roundings.
target_compile_options(attn_flags INTERFACE -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes
                       -Wpointer-arith -Wvla -ffp-contract=off -fno-fast-math)
target_include_directories(attn_flags INTERFACE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/base)
target_link_libraries(attn_flags INTERFACE Threads::Threads m)
if(ATTN_SANITIZE)
  list(JOIN ATTN_SANITIZE "," sanitizers)
  target_compile_options(attn_flags INTERFACE -fsanitize=${sanitizers} -fno-omit-frame-pointer)
  target_link_options(attn_flags INTERFACE -fsanitize=${sanitizers})
endif()

# attn_library(NAME source...): the static library attn_NAME of this folder.
function(attn_library name)
  add_library(attn_${name} STATIC ${ARGN})
  target_link_libraries(attn_${name} PUBLIC attn_flags)
endfunction()

# attn_program(NAME source...)
function(attn_program name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE attn_flags)
endfunction()

# attn_timeout(SECONDS test...): how long tests that are there may take; several times as long with
# sanitizers.
function(attn_timeout seconds)
  if(ATTN_SANITIZE)
    math(EXPR seconds "4 * ${seconds}")
  endif()
  set_tests_properties(${ARGN} PROPERTIES TIMEOUT ${seconds})
endfunction()

# attn_test(NAME library... [TIMEOUT s]): NAME.c of this folder, with CMocka. Its ctest name is
# attn.<folder>.<NAME without _test>; exit 77 is a skip.
function(attn_test name)
  if(NOT ATTN_TESTS)
    return()
  endif()
  cmake_parse_arguments(arg "" "TIMEOUT" "" ${ARGN})
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 60)
  endif()
  find_library(CMOCKA_LIBRARY cmocka REQUIRED)
  add_executable(${name} ${name}.c)
  list(TRANSFORM arg_UNPARSED_ARGUMENTS PREPEND attn_)
  target_link_libraries(${name} PRIVATE ${arg_UNPARSED_ARGUMENTS} attn_flags ${CMOCKA_LIBRARY})
  cmake_path(RELATIVE_PATH CMAKE_CURRENT_SOURCE_DIR BASE_DIRECTORY ${PROJECT_SOURCE_DIR} OUTPUT_VARIABLE folder)
  string(REPLACE "/" "." folder ${folder})
  string(REGEX REPLACE "_test$" "" short ${name})
  add_test(NAME attn.${folder}.${short} COMMAND ${name})
  attn_timeout(${arg_TIMEOUT} attn.${folder}.${short})
  set_tests_properties(attn.${folder}.${short} PROPERTIES SKIP_RETURN_CODE 77)
endfunction()
