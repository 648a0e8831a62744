# attnctl, over the public header alone. Included by this folder's CMakeLists.txt.
if(TARGET attn)
  find_library(CJSON_LIBRARY cjson REQUIRED)
  attn_program(attnctl attnctl.c attnctl_status.c attnctl_seq.c)
  target_link_libraries(attnctl PRIVATE attn ${CJSON_LIBRARY})
endif()
