moed_program(net_mpi ${PROJECT_SOURCE_DIR}/tests/dist/net_mpi.c)
target_link_libraries(net_mpi PRIVATE moed_transport)
set(net_run ${PROJECT_SOURCE_DIR}/tests/dist/mpirun.sh)
moed_add_test(net_exchange_2 dist 120 ${net_run} 2 $<TARGET_FILE:net_mpi> exchange)
moed_add_test(net_exchange_5 dist 120 ${net_run} 5 $<TARGET_FILE:net_mpi> exchange)
moed_add_test(net_exchange_tcp dist 120 ${CMAKE_COMMAND} -E env MOED_MPIRUN_BTL=self,tcp
  ${net_run} 3 $<TARGET_FILE:net_mpi> exchange)
moed_add_test(net_hosts_exchange dist 120 ${PROJECT_SOURCE_DIR}/tests/dist/net_hosts.sh
  $<TARGET_FILE:net_mpi> exchange)
moed_add_test(net_hosts_idle dist 120 ${PROJECT_SOURCE_DIR}/tests/dist/net_hosts.sh
  $<TARGET_FILE:net_mpi> idle)
moed_add_test(net_oversize dist 120 ${net_run} 3 $<TARGET_FILE:net_mpi> oversize)
moed_add_test(net_idle dist 120 ${net_run} 3 $<TARGET_FILE:net_mpi> idle)
foreach(loss death stopped flood)
  moed_add_test(net_${loss} dist 120 ${PROJECT_SOURCE_DIR}/tests/dist/net_loss.sh $<TARGET_FILE:net_mpi> ${loss})
  set_tests_properties(net_${loss} PROPERTIES RUN_SERIAL ON)
endforeach()
