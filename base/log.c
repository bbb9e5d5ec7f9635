/*
 * Logging: one line to stderr per call, written with one system call so that lines of several
 * threads and processes do not mix. Under systemd (JOURNAL_STREAM is set) each line starts with its
 * syslog priority, which journald parses; elsewhere with the level in words. Never used inside a
 * step.
 */
#include "base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char log_who[64] = "moed";
static ep_level log_level = EP_LOG_INFO;
static bool log_journal;

static const char *const level_names[] = {"error", "warn", "info", "debug"};

void ep_log_open(const char *who, ep_level level)
{
    snprintf(log_who, sizeof(log_who), "%s", who);
    log_level = level;
    log_journal = getenv("JOURNAL_STREAM") != NULL;
    const char *env = getenv("MOED_LOG");
    for (int i = 0; env != NULL && i < 4; i++)
        if (strcmp(env, level_names[i]) == 0) log_level = (ep_level)i;
}

void ep_standard_files(void)
{
    int fd;
    do {
        fd = open("/dev/null", O_RDWR);
    } while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0) close(fd);
}

void ep_log(ep_level level, const char *fmt, ...)
{
    static const int priority[] = {3, 4, 6, 7};
    if (level > log_level) return;
    int saved_errno = errno;
    char line[2048];
    int n = log_journal ? snprintf(line, sizeof(line), "<%d>%s: ", priority[level], log_who)
                        : snprintf(line, sizeof(line), "%s: %s%s", log_who,
                                   level == EP_LOG_INFO ? "" : level_names[level],
                                   level == EP_LOG_INFO ? "" : ": ");
    va_list ap;
    va_start(ap, fmt);
    errno = saved_errno; /* %m */
    int m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, fmt, ap);
    va_end(ap);
    size_t len = (size_t)n + (m < 0 ? 0 : (size_t)m);
    if (len > sizeof(line) - 2) len = sizeof(line) - 2;
    line[len++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, len);
    (void)written; /* there is nowhere to report a broken stderr */
    errno = saved_errno;
}
