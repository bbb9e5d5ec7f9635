moed_add_test(config_files config 120 ${CMAKE_CURRENT_LIST_DIR}/run.sh $<TARGET_FILE:moed> ${PROJECT_SOURCE_DIR})
