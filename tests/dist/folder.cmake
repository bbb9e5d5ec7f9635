# After daemon.cmake in the order of names, which defines moed_cluster_test.
moed_program(make_folder ${CMAKE_CURRENT_LIST_DIR}/make_folder.c ${PROJECT_SOURCE_DIR}/tests/hf_make.c)
target_link_libraries(make_folder PRIVATE moed_model moed_kernels PkgConfig::JANSSON m)
moed_cluster_test(dist_folder 180 folder.py)
