/*
 * Monotonic time as a type of its own, so that milliseconds and nanoseconds cannot be mixed up.
 */
#include "base/base.h"

#include <time.h>

ep_time ep_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (ep_time){(int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec};
}

ep_time ep_time_after_ms(ep_time t, int64_t ms)
{
    if (ms > (INT64_MAX - t.ns) / 1000000) return EP_TIME_NEVER;
    return (ep_time){t.ns + ms * 1000000};
}

int64_t ep_time_diff_ns(ep_time later, ep_time earlier)
{
    return later.ns - earlier.ns;
}

bool ep_time_is_past(ep_time deadline, ep_time now)
{
    return now.ns >= deadline.ns;
}
