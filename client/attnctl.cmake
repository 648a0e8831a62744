# attnctl. Its commands stand on the public header alone, but for the thin client of bench, which is
# no part of libattn: so it is linked from the static libraries. Included by this folder's
# CMakeLists.txt.
find_library(CJSON_LIBRARY cjson REQUIRED)
attn_program(attnctl attnctl.c attnctl_status.c attnctl_sample.c attnctl_top.c attnctl_doctor.c
             attnctl_doctor_trip.c attnctl_seq.c attnctl_move.c attnctl_bench.c attnctl_bench_load.c
             attnctl_bench_data.c attnctl_bench_dev.c attnctl_explain.c attnctl_measure.c
             attnctl_words.c)
target_include_directories(attnctl PRIVATE ${PROJECT_SOURCE_DIR}/client)
target_link_libraries(attnctl PRIVATE attn_door attn_client ${CJSON_LIBRARY} ${CRYPTO_LIBRARY})
attn_test(attnctl_bench_test client)
if(ATTN_TESTS)
  target_sources(attnctl_bench_test PRIVATE attnctl_bench_data.c)
endif()
