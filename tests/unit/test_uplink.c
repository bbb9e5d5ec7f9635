/*
 * Proves the end of a rank's control connection: a rank whose daemon hangs up leaves; one that is
 * closing already goes on to its own end, since other ranks may wait for it in MPI_Finalize. Each
 * case is a process of its own, because leaving ends the process.
 */
#include "daemon/uplink.h"
#include "tests/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LEFT = 0, WENT_ON = 42, BROKEN = 43 };

static char folder[] = "/tmp/moed-test.XXXXXX";

static int listen_at(char *address, size_t n)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof(a.sun_path), "%s/control", folder);
    snprintf(address, n, "unix:%s", a.sun_path);
    unlink(a.sun_path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof(a)) != 0 || listen(fd, 1) != 0)
        exit(BROKEN);
    return fd;
}

/* A rank: connects, waits until the daemon's end is closed and its thread has seen it (or not yet),
 * and closes or lingers. The daemon's end lives in the same process. */
static int run_rank(unsigned after_us, bool closes, bool sends)
{
    pid_t pid = fork();
    if (pid != 0) {
        int status;
        if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status)) return BROKEN;
        return WEXITSTATUS(status);
    }
    char address[160];
    int listener = listen_at(address, sizeof(address));
    ep_queue *in;
    uplink *u;
    ep_err err;
    if (ep_queue_open(&in, 16, NULL, NULL) != EP_OK) _exit(BROKEN);
    if (uplink_open(&u, address, in, &err) != EP_OK) _exit(BROKEN);
    int fd = accept(listener, NULL, NULL);
    if (fd < 0) _exit(BROKEN);
    close(fd);
    usleep(after_us);
    if (sends) {
        Moed__Drained d = MOED__DRAINED__INIT;
        Moed__Envelope e = MOED__ENVELOPE__INIT;
        e.body_case = MOED__ENVELOPE__BODY_DRAINED;
        e.drained = &d;
        uplink_send(u, &e);
    }
    if (!closes) pause();
    uplink_close(u);
    _exit(WENT_ON);
}

static void a_rank_leaves_with_its_daemon(void)
{
    CHECK_INT(run_rank(0, false, false), LEFT);
    CHECK_INT(run_rank(0, false, true), LEFT);
}

/* The thread gives the engine a fifth of a second; a machine that holds this process up for longer
 * makes it leave rightly, so one of some tries must get through. */
static void a_closing_rank_goes_on(void)
{
    for (int sends = 0; sends < 2; sends++) {
        int got = LEFT;
        for (int i = 0; i < 10 && got == LEFT; i++)
            got = run_rank(20000, true, sends == 1);
        CHECK_INT(got, WENT_ON);
    }
}

int main(int argc, char **argv)
{
    static const test_case cases[] = {
        {"a_rank_leaves_with_its_daemon", a_rank_leaves_with_its_daemon},
        {"a_closing_rank_goes_on", a_closing_rank_goes_on},
    };
    if (mkdtemp(folder) == NULL) return 1;
    int status = test_main(argc, argv, cases, (int)(sizeof(cases) / sizeof(cases[0])));
    char path[160];
    snprintf(path, sizeof(path), "%s/control", folder);
    unlink(path);
    rmdir(folder);
    return status;
}
