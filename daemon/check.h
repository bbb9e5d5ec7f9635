#ifndef EP_DAEMON_CHECK_H
#define EP_DAEMON_CHECK_H
/*
 * check: looking at a configuration without starting anything. Each prints to standard output
 * (mistakes to standard error) and returns an exit status: 0, or 2 for a configuration that cannot
 * be served.
 */

/* The resolved configuration, rank table, memory plan, expert ownership. */
int check_main(const char *config_path);
/* The mpirun command `moed up` would run. */
int check_print_mpirun(const char *config_path);
/* Every key with type, default and meaning, as YAML comments. */
int check_print_keys(void);

#endif
