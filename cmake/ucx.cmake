# Shared memory through UCX. ATTN_UCX: ON, OFF, or AUTO (ON where its headers are). The library itself
# is opened at run time, so nothing links it.
set(ATTN_UCX AUTO CACHE STRING "Runs over shared memory: ON, OFF or AUTO (where UCX's headers are)")
set(ATTN_UCX_BUILD OFF)
if(NOT ATTN_UCX STREQUAL "OFF")
  pkg_check_modules(UCX ucx>=1.13)
  if(UCX_FOUND)
    set(ATTN_UCX_BUILD ON)
  elseif(ATTN_UCX STREQUAL "ON")
    message(FATAL_ERROR "ATTN_UCX is ON, and pkg-config finds no ucx 1.13 or later: install libucx-dev")
  endif()
endif()
message(STATUS "UCX: ${ATTN_UCX_BUILD}")
