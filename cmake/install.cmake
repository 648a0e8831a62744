# What `cmake --install` puts where. Included at the end, when all targets are there.
include(CMakePackageConfigHelpers)

if(TARGET attn)
  set_target_properties(attn PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})
  install(TARGETS attn LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(FILES ${PROJECT_SOURCE_DIR}/client/attn.h ${PROJECT_SOURCE_DIR}/base/attn_types.h
          DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

  list(TRANSFORM attn_outside_libraries PREPEND "-l" OUTPUT_VARIABLE attn_libs_private)
  list(JOIN attn_libs_private " " attn_libs_private)
  # From where attn.pc lies up to the prefix, so that a tree that was moved still works.
  file(RELATIVE_PATH attn_pc_up ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
  configure_file(${CMAKE_CURRENT_LIST_DIR}/attn.pc.in ${PROJECT_BINARY_DIR}/attn.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/attn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

  set(attn_package ${CMAKE_INSTALL_LIBDIR}/cmake/attn)
  configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/attnConfig.cmake.in
    ${PROJECT_BINARY_DIR}/attnConfig.cmake INSTALL_DESTINATION ${attn_package}
    PATH_VARS CMAKE_INSTALL_LIBDIR CMAKE_INSTALL_INCLUDEDIR)
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/attnConfigVersion.cmake
    COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/attnConfig.cmake ${PROJECT_BINARY_DIR}/attnConfigVersion.cmake
          DESTINATION ${attn_package})
endif()

if(TARGET attn_static)
  install(TARGETS attn_static ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()

# Programs find libattn beside them, wherever the prefix is moved to. The old kind of tag holds for
# the libraries of libraries, too: a bundle (deploy/bundle) has them all in one folder.
file(RELATIVE_PATH attn_lib_from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
foreach(target attnd attnctl runner attn)
  if(TARGET ${target})
    set_target_properties(${target} PROPERTIES INSTALL_RPATH "$ORIGIN/${attn_lib_from_bin};$ORIGIN/../lib")
    target_link_options(${target} PRIVATE LINKER:--disable-new-dtags)
    install(TARGETS ${target} RUNTIME DESTINATION bin COMPONENT bundle EXCLUDE_FROM_ALL
            LIBRARY DESTINATION lib COMPONENT bundle EXCLUDE_FROM_ALL)
  endif()
endforeach()
foreach(target bench_scaling bench_latency bench_exchange) # deploy/bundle -b
  if(TARGET ${target})
    set_target_properties(${target} PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
    target_link_options(${target} PRIVATE LINKER:--disable-new-dtags)
    install(TARGETS ${target} RUNTIME DESTINATION bench COMPONENT bundle_bench EXCLUDE_FROM_ALL)
  endif()
endforeach()
foreach(program attnd attnctl)
  if(TARGET ${program})
    install(TARGETS ${program} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
endforeach()
install(FILES ${PROJECT_SOURCE_DIR}/deploy/attnd.conf DESTINATION ${CMAKE_INSTALL_DATADIR}/attnd)
install(FILES ${PROJECT_SOURCE_DIR}/proto/attn/v1/attn.proto
        DESTINATION ${CMAKE_INSTALL_DATADIR}/attnd/proto/attn/v1)
# Manual pages, where man(1) looks for them.
install(FILES ${PROJECT_SOURCE_DIR}/docs/man/attnd.1 ${PROJECT_SOURCE_DIR}/docs/man/attnctl.1
        DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
install(FILES ${PROJECT_SOURCE_DIR}/docs/man/attnd.conf.5 DESTINATION ${CMAKE_INSTALL_MANDIR}/man5)

# Units and the user of the daemons. Units name the program where it comes to lie.
install(CODE "
  set(ATTN_BINDIR \"\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_BINDIR}\")
  foreach(unit attnd-coordinator attnd-worker)
    configure_file(${PROJECT_SOURCE_DIR}/deploy/systemd/\${unit}.service.in
                   ${PROJECT_BINARY_DIR}/units/\${unit}.service @ONLY)
  endforeach()" COMPONENT service)
install(FILES ${PROJECT_BINARY_DIR}/units/attnd-coordinator.service
              ${PROJECT_BINARY_DIR}/units/attnd-worker.service
        DESTINATION lib/systemd/system COMPONENT service)
install(FILES ${PROJECT_SOURCE_DIR}/deploy/systemd/attnd.sysusers DESTINATION lib/sysusers.d
        RENAME attnd.conf COMPONENT service)
