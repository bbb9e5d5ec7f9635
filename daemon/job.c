/*
 * The job: one mpirun with its ranks, from launch to the last file it leaves. mpirun runs in a
 * process group of its own, so Ctrl-C on the terminal reaches only the daemon, which drains; it
 * dies with the daemon. Shared memory and session files of a job on this machine lie in a folder of
 * the daemon's, which is removed when the job has ended, however it ended.
 *
 * mpirun's exit status says nothing about ranks (--enable-recovery makes it 0), so whether a job
 * failed is known from the control connections alone.
 */
#include "daemon/up.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/statvfs.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { KILL_AFTER_MS = 3000, CONNECT_MS = 60000 };

#define RUN_DIR_PREFIX "/dev/shm/moed."

/* ---- the command ---- */

/* Words are collected as text separated by zero bytes, then pointed at. */
static ep_status word(ep_buf *text, const char *s)
{
    return ep_buf_add(text, s, strlen(s) + 1);
}

static ep_status fixed_words(const config *cfg, const char *run_dir, ep_buf *text)
{
    /* ob1: 200 ms faster to start; vader and tcp: UCX aborts survivors of a loss; yield: without it
     * every exchange takes milliseconds when ranks outnumber cores; recovery: survivors of a loss
     * live on. */
    static const char *const words[] = {"--oversubscribe",
                                        "--enable-recovery",
                                        "--bind-to",
                                        "none",
                                        "--mca",
                                        "pml",
                                        "ob1",
                                        "--mca",
                                        "btl",
                                        "self,vader,tcp",
                                        "--mca",
                                        "mpi_yield_when_idle",
                                        "1",
                                        "--mca",
                                        "odls_base_sigkill_timeout",
                                        "0",
                                        "-x",
                                        "MOED_JOB"};
    ep_status status = word(text, cfg->launch.mpirun);
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]) && status == EP_OK; i++)
        status = word(text, words[i]);
    static const char *const passed[] = {"MOED_KERNELS", "MOED_LOG", "MOED_CUDA_FORM",
                                         "MOED_CUDA_CHAIN"};
    for (size_t i = 0; i < sizeof(passed) / sizeof(passed[0]) && status == EP_OK; i++) {
        if (getenv(passed[i]) == NULL) continue;
        status = word(text, "-x");
        if (status == EP_OK) status = word(text, passed[i]);
    }
    if (config_is_local(cfg)) {
        static const char *const local[] = {"--mca", "btl_tcp_if_include", "lo",
                                            "--mca", "oob_tcp_if_include", "lo"};
        for (size_t i = 0; i < sizeof(local) / sizeof(local[0]) && status == EP_OK; i++)
            status = word(text, local[i]);
        const char *keys[] = {"btl_vader_backing_directory", "orte_tmpdir_base"};
        for (size_t i = 0; run_dir != NULL && i < 2 && status == EP_OK; i++) {
            status = word(text, "--mca");
            if (status == EP_OK) status = word(text, keys[i]);
            if (status == EP_OK) status = word(text, run_dir);
        }
    }
    return status;
}

static ep_status rank_words(const config *cfg, const char *exe, ep_buf *text)
{
    ep_status status = EP_OK;
    int n = config_n_ranks(cfg);
    for (int i = 0, run; i < n && status == EP_OK; i += run) {
        const char *host = config_rank_at(cfg, i)->host;
        for (run = 1; i + run < n && strcmp(config_rank_at(cfg, i + run)->host, host) == 0;)
            run++;
        char count[16];
        snprintf(count, sizeof(count), "%d", run);
        if (i > 0) status = word(text, ":");
        if (status == EP_OK && strcmp(host, "localhost") != 0) {
            char slots[300];
            snprintf(slots, sizeof(slots), "%s:%d", host, run);
            status = word(text, "--host");
            if (status == EP_OK) status = word(text, slots);
        }
        const char *words[] = {"-np", count, exe, "rank", "-c", cfg->path};
        for (size_t j = 0; j < sizeof(words) / sizeof(words[0]) && status == EP_OK; j++)
            status = word(text, words[j]);
    }
    return status;
}

static ep_status option_words(const char *options, ep_buf *text)
{
    ep_status status = EP_OK;
    while (options != NULL && status == EP_OK) {
        options += strspn(options, " \t");
        size_t n = strcspn(options, " \t");
        if (n == 0) break;
        status = ep_buf_add(text, options, n);
        if (status == EP_OK) status = ep_buf_add(text, "", 1);
        options += n;
    }
    return status;
}

ep_status job_command(const config *cfg, const char *exe, const char *run_dir, ep_buf *text,
                      char ***words)
{
    ep_status status = fixed_words(cfg, run_dir, text);
    if (status == EP_OK) status = option_words(cfg->launch.options, text);
    if (status == EP_OK) status = rank_words(cfg, exe, text);
    if (status != EP_OK) return status;
    size_t n = 0;
    for (size_t i = 0; i < text->len; i++)
        n += text->data[i] == '\0';
    char **list = ep_calloc(n + 1, sizeof(*list));
    if (list == NULL) return EP_ERR_NOMEM;
    char *at = (char *)text->data;
    for (size_t i = 0; i < n; i++, at += strlen(at) + 1)
        list[i] = at;
    *words = list;
    return EP_OK;
}

/* ---- files ---- */

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *f)
{
    (void)st;
    (void)type;
    (void)f;
    return remove(path);
}

static void remove_tree(const char *path)
{
    nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

/* Folders of daemons that were killed: the name carries the process id. Only one's own: anybody may
 * make a folder there, and removing a stranger's could be led elsewhere. */
static void sweep_stale(void)
{
    DIR *dir = opendir("/dev/shm");
    if (dir == NULL) return;
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        long pid;
        char path[512];
        if (sscanf(e->d_name, "moed.%ld.", &pid) != 1 || pid <= 0 || kill((pid_t)pid, 0) == 0 ||
            errno != ESRCH)
            continue;
        struct stat st;
        snprintf(path, sizeof(path), "/dev/shm/%s", e->d_name);
        if (lstat(path, &st) == 0 && S_ISDIR(st.st_mode) && st.st_uid == geteuid())
            remove_tree(path);
    }
    closedir(dir);
}

static ep_status make_run_dir(up *u, ep_err *err)
{
    sweep_stale();
    /* Open MPI takes 4 MiB a rank there and dies of a bus error where they are missing. */
    struct statvfs space;
    unsigned long long need = (unsigned long long)u->n_ranks * 5 << 20;
    if (config_is_local(u->cfg) && statvfs("/dev/shm", &space) == 0 &&
        (unsigned long long)space.f_bavail * space.f_frsize < need)
        return ep_fail(err, EP_ERR_IO, "/dev/shm has %llu MiB free, %d ranks need %llu",
                       (unsigned long long)space.f_bavail * space.f_frsize >> 20, u->n_ranks,
                       need >> 20);
    char name[64];
    snprintf(name, sizeof(name), RUN_DIR_PREFIX "%ld.XXXXXX", (long)getpid());
    if (mkdtemp(name) == NULL) return ep_fail(err, EP_ERR_IO, "%s: %s", name, strerror(errno));
    u->run_dir = ep_strdup(name);
    return u->run_dir != NULL ? EP_OK : ep_fail(err, EP_ERR_NOMEM, "out of memory");
}

void job_clean(up *u)
{
    if (u->run_dir == NULL) return;
    remove_tree(u->run_dir);
    ep_free(u->run_dir);
    u->run_dir = NULL;
    for (int i = 0; i < u->cfg->n_routers && config_is_local(u->cfg); i++) {
        char path[128]; /* the data socket of a router that was killed */
        snprintf(path, sizeof(path), "%s.r%d", u->cfg->front.socket, i);
        unlink(path);
    }
}

/* ---- life ---- */

static void new_secret(up *u)
{
    uint8_t bytes[16];
    if (getrandom(bytes, sizeof(bytes), 0) != (ssize_t)sizeof(bytes))
        memset(bytes, getpid() & 0xff, sizeof(bytes));
    for (size_t i = 0; i < sizeof(bytes); i++)
        snprintf(u->job + 2 * i, 3, "%02x", bytes[i]);
}

static void exec_mpirun(const up *u, char **words)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setpgid(0, 0);
    signal(SIGPIPE, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    int null = open("/dev/null", O_RDONLY);
    if (null >= 0) dup2(null, STDIN_FILENO);
    setenv("MOED_JOB", u->job, 1);
    if (geteuid() == 0) { /* mpirun wants both to run as root, which containers do */
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    }
    dup2(STDERR_FILENO, STDOUT_FILENO); /* stdout is the daemon's */
    execvp(words[0], words);
    fprintf(stderr, "moed: cannot start %s: %s\n", words[0], strerror(errno));
    _exit(127);
}

ep_status job_launch(up *u, ep_err *err)
{
    ranks_reset(u);
    u->job_lost = false;
    u->drain_sent = false;
    u->launched = ep_now();
    u->kill_at = EP_TIME_NEVER;
    u->launches++;
    if (u->no_launch) {
        const char *job = getenv("MOED_JOB");
        snprintf(u->job, sizeof(u->job), "%s", job != NULL ? job : "");
        return EP_OK;
    }
    new_secret(u);
    ep_status status = make_run_dir(u, err);
    if (status != EP_OK) return status;
    ep_buf text = {0};
    char **words = NULL;
    status = job_command(u->cfg, u->exe, u->run_dir, &text, &words);
    if (status == EP_OK) {
        u->mpirun = fork();
        if (u->mpirun == 0) exec_mpirun(u, words);
        if (u->mpirun < 0) {
            u->mpirun = 0;
            status = ep_fail(err, EP_ERR_IO, "cannot start a process: %s", strerror(errno));
        }
    } else {
        ep_fail(err, status, "out of memory");
    }
    ep_free(words);
    ep_buf_fini(&text);
    return status;
}

void job_rank_lost(up *u, rank_link *r, const char *why)
{
    r->state = RANK_LOST;
    if (u->job_lost ||
        u->drain_sent) { /* the first loss tells the story; the rest follow from it */
        if (u->drain_sent) r->drained = true;
        up_advance(u);
        return;
    }
    u->job_lost = true;
    log_error("%s; %d running request%s end%s", why, u->n_running, u->n_running == 1 ? "" : "s",
              u->n_running == 1 ? "s" : "");
    if (u->state == UP_READY || u->state == UP_LOADING) u->state = UP_RELAUNCHING;
    requests_fail_running(u, -1, EP_ERR_PEER_LOST, why);
    if (u->mpirun > 0) {
        kill(u->mpirun, SIGTERM);
        u->kill_at = ep_time_after_ms(ep_now(), KILL_AFTER_MS);
    } else {
        up_advance(u);
    }
}

void job_child_ended(up *u)
{
    int status;
    if (u->mpirun <= 0 || waitpid(u->mpirun, &status, WNOHANG) != u->mpirun) return;
    u->mpirun = 0;
    u->kill_at = EP_TIME_NEVER;
    if (!u->job_lost && !u->drain_sent) {
        bool exec_failed = WIFEXITED(status) && WEXITSTATUS(status) == 127;
        u->job_lost = true;
        u->relaunch_held |= exec_failed;
        log_error("mpirun ended (%s %d)", WIFEXITED(status) ? "exit status" : "signal",
                  WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
        if (u->state == UP_READY || u->state == UP_LOADING) u->state = UP_RELAUNCHING;
        requests_fail_running(u, -1, EP_ERR_PEER_LOST, "mpirun ended");
    }
    job_clean(u);
    up_advance(u);
}

void job_tick(up *u, ep_time now)
{
    if (u->mpirun > 0 && ep_time_is_past(u->kill_at, now)) {
        kill(-u->mpirun, SIGKILL);
        kill(u->mpirun, SIGKILL);
        u->kill_at = EP_TIME_NEVER;
    }
    if (u->state != UP_LOADING || u->job_lost || u->no_launch) return;
    const int64_t load_ms = (int64_t)u->cfg->limits.load_s * 1000;
    const bool connect = ep_time_is_past(ep_time_after_ms(u->launched, CONNECT_MS), now);
    const bool load = ep_time_is_past(ep_time_after_ms(u->launched, load_ms), now);
    for (int i = 0; i < u->n_ranks; i++) {
        bool late = (connect && u->ranks[i].state == RANK_STARTING) ||
                    (load && u->ranks[i].state != RANK_READY);
        if (!late) continue;
        char name[160], text[256];
        snprintf(
            text, sizeof(text), "%s was not %s within %lld s", ranks_name(u, i, name, sizeof(name)),
            u->ranks[i].state == RANK_STARTING ? "there" : "ready",
            (long long)(u->ranks[i].state == RANK_STARTING && !load ? CONNECT_MS : load_ms) / 1000);
        job_rank_lost(u, &u->ranks[i], text);
        return;
    }
}

void job_kill(up *u)
{
    if (u->mpirun > 0) {
        kill(u->mpirun, SIGTERM);
        for (int i = 0; i < 300 && u->mpirun > 0; i++) {
            if (waitpid(u->mpirun, NULL, WNOHANG) == u->mpirun) u->mpirun = 0;
            if (u->mpirun > 0) usleep(10000);
        }
        if (u->mpirun > 0) {
            kill(-u->mpirun, SIGKILL);
            kill(u->mpirun, SIGKILL);
            waitpid(u->mpirun, NULL, 0);
            u->mpirun = 0;
        }
    }
    job_clean(u);
}
