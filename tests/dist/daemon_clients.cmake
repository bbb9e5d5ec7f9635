# After daemon.cmake in the order of names, which defines moed_cluster_test.
moed_cluster_test(dist_clients 180 clients.py)
