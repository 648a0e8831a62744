# A file as bytes of a program: attn_embed(NAME file) gives NAME.c, to be named among the sources,
# which defines `const unsigned char NAME[]` and `const size_t NAME_size`.
function(attn_embed name file)
  set(in ${CMAKE_CURRENT_SOURCE_DIR}/${file})
  add_custom_command(
    OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/${name}.c
    COMMAND ${CMAKE_COMMAND} -DNAME=${name} -DIN=${in} -DOUT=${CMAKE_CURRENT_BINARY_DIR}/${name}.c
            -P ${PROJECT_SOURCE_DIR}/cmake/embed.cmake
    DEPENDS ${in} ${PROJECT_SOURCE_DIR}/cmake/embed.cmake
    VERBATIM)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE)
  file(READ ${IN} hex HEX)
  string(REGEX REPLACE "(................)" "\\1\n" hex ${hex})
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes ${hex})
  file(WRITE ${OUT} "#include <stddef.h>\nextern const unsigned char ${NAME}[];\n"
       "extern const size_t ${NAME}_size;\n"
       "const unsigned char ${NAME}[] = {\n${bytes}};\nconst size_t ${NAME}_size = sizeof(${NAME});\n")
endif()
