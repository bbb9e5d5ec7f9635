moed_add_test(dist_hosts dist 120 ${CMAKE_CURRENT_LIST_DIR}/hosts.sh ${PROJECT_BINARY_DIR} ${PROJECT_SOURCE_DIR})
set_tests_properties(dist_hosts PROPERTIES RUN_SERIAL TRUE)
