# A static library whose symbols are limited like the shared one's. Internal libraries are linked
# into one object first; in it, everything that is not ATTN_API becomes local, so that a caller
# can have functions of the same names and cannot lean on ours.

find_program(ATTN_LD ld REQUIRED)

# attn_static_library(NAME library...): NAME becomes libattn.a, made of these static libraries of
# the project (each named once). What they link from outside is attn_outside_libraries.
function(attn_static_library name)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.o)
  set(archives)
  foreach(library ${ARGN})
    list(APPEND archives $<TARGET_FILE:${library}>)
  endforeach()
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${ATTN_LD} -r -o ${object} --whole-archive ${archives}
    COMMAND ${CMAKE_OBJCOPY} --localize-hidden ${object}
    DEPENDS ${ARGN} ${archives}
    COMMENT "Linking ${name}.o, hidden symbols made local"
    VERBATIM)
  set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  add_library(${name} STATIC ${object})
  set_target_properties(${name} PROPERTIES LINKER_LANGUAGE C OUTPUT_NAME attn)
  target_include_directories(${name} INTERFACE ${PROJECT_SOURCE_DIR}/client ${PROJECT_SOURCE_DIR}/base)
  target_link_libraries(${name} INTERFACE ${attn_outside_libraries})
  if(ATTN_SANITIZE)
    list(JOIN ATTN_SANITIZE "," sanitizers)
    target_link_options(${name} INTERFACE -fsanitize=${sanitizers})
  endif()
endfunction()

# What libattn links from outside the project, by the names that -l takes: for static linking, and
# for the installed attn.pc and attnConfig.cmake.
set(attn_outside_libraries grpc gpr protobuf-c crypto pthread m)
