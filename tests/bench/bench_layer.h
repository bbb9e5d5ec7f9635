#ifndef EP_TESTS_BENCH_BENCH_LAYER_H
#define EP_TESTS_BENCH_BENCH_LAYER_H
/* moed-bench layer: see bench_layer.c. argv[0] is the subcommand. Returns the exit status. */
int bench_layer(int argc, char **argv);
#endif
