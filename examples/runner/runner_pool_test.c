#include "pool.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h uses the four above. */
#include <cmocka.h>

#include <stdatomic.h>
#include <unistd.h>

static atomic_uint calls[100];

static void
count(const void *arg, uint32_t task)
{
    if (task % 8 >= 6) {
        usleep(50); /* long enough for others to wake up, and for this one to be the last */
    }
    atomic_fetch_add(&calls[task], *(const uint32_t *)arg);
}

/** Every task of every job once, when pool_run() returns, and none of a job that is over. */
static void
test_each_task_runs_once(void **state)
{
    const uint32_t one = 1;
    (void)state;

    for (uint32_t threads = 1; threads <= 4; threads++) {
        pool_t *pool = pool_create(threads);
        assert_non_null(pool);
        for (uint32_t job = 0; job < 120; job++) {
            uint32_t tasks = job % 101;
            pool_run(pool, count, &one, tasks);
            for (uint32_t task = 0; task < 100; task++) {
                assert_int_equal(atomic_exchange(&calls[task], 0), task < tasks);
            }
        }
        pool_destroy(pool);
    }
}

static void
test_an_unused_pool_ends(void **state)
{
    (void)state;
    pool_destroy(pool_create(0));
    pool_destroy(pool_create(POOL_THREADS_MAX + 1));
    pool_destroy(NULL);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_task_runs_once),
        cmocka_unit_test(test_an_unused_pool_ends),
    };
    return cmocka_run_group_tests_name("examples.runner.pool", tests, NULL, NULL);
}
