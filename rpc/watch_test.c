/* Who is cut off, and when; with calls made here in place of call.c, which the linker leaves out.
 */
#include "rpc/rpc_int.h"

#include "base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <time.h>

#define STALL_MS 160u
#define CALLS 64

struct rpc_call {
    rpc_watched_t watched;
    uint64_t due_ns; /* when it is overdue */
    atomic_bool taken, cut;
    uint64_t looked_ns, gap_ns; /* when it was looked at last, and the longest time between looks */
    uint64_t taken_ns, cut_ns;  /* by the look that found it overdue, and when it was cut */
    rpc_watch_t *leaves;        /* when cut, as a call that ends does; or NULL */
};

static atomic_uint looks;      /* at any call */
static atomic_uint hold_up_ms; /* the next look, as if the process did not run */

rpc_watched_t *
rpc_call_watched(rpc_call_t *call)
{
    return &call->watched;
}

static void
pause_ms(uint32_t ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000},
              NULL);
}

bool
rpc_call_take_stalled(rpc_call_t *call, uint64_t now_ns, uint64_t stall_ns)
{
    uint32_t held = atomic_exchange(&hold_up_ms, 0);

    assert_true(stall_ns == STALL_MS * ATTN_NS_PER_MS);
    atomic_fetch_add(&looks, 1);
    if (call->looked_ns != 0 && now_ns - call->looked_ns > call->gap_ns) {
        call->gap_ns = now_ns - call->looked_ns;
    }
    call->looked_ns = now_ns;
    if (held > 0) {
        pause_ms(held);
        return false;
    }
    if (now_ns < call->due_ns || atomic_exchange(&call->taken, true)) {
        return false;
    }
    call->taken_ns = now_ns;
    return true;
}

void
rpc_call_cut(rpc_call_t *call, uint64_t stall_ns)
{
    (void)stall_ns;
    call->cut_ns = attn_now_ns();
    if (call->leaves != NULL) { /* takes the watch's lock, which is free here */
        rpc_watch_remove(call->leaves, call);
    }
    atomic_store(&call->cut, true);
}

static uint64_t
in_ms(uint64_t ms)
{
    return attn_now_ns() + ms * ATTN_NS_PER_MS;
}

static bool
wait_cut(rpc_call_t *call, uint32_t ms)
{
    for (uint64_t end = in_ms(ms); !atomic_load(&call->cut) && attn_now_ns() < end;) {
        pause_ms(1);
    }
    return atomic_load(&call->cut);
}

static rpc_watch_t *
start(void)
{
    rpc_watch_t *watch = rpc_watch_create(STALL_MS);

    atomic_store(&hold_up_ms, 0);
    assert_int_equal(rpc_watch_start(watch), ATTN_OK);
    return watch;
}

static void
test_who_is_overdue_is_cut_off(void **state)
{
    rpc_watch_t *watch = start();
    rpc_call_t late = {.due_ns = in_ms(60)}, good = {.due_ns = UINT64_MAX};

    (void)state;
    rpc_watch_add(watch, &late);
    rpc_watch_add(watch, &good);
    assert_true(wait_cut(&late, 5000));
    assert_true(late.cut_ns >= late.due_ns);
    assert_false(atomic_load(&good.cut));
    rpc_watch_remove(watch, &late);
    rpc_watch_remove(watch, &good);
    rpc_watch_destroy(watch);
}

static void
test_calls_come_and_go(void **state)
{
    static rpc_call_t calls[CALLS];
    rpc_watch_t *watch = start();

    (void)state;
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < CALLS; i++) {
            calls[i] = (rpc_call_t){.due_ns = i % 3 == 0 ? 0 : UINT64_MAX,
                                    .leaves = i % 2 == 0 ? watch : NULL};
            rpc_watch_add(watch, &calls[i]);
        }
        for (int i = 0; i < CALLS; i++) { /* out of order: the middle, the ends */
            rpc_call_t *call = &calls[(i * 37 + round) % CALLS];
            bool due         = call->due_ns == 0;
            assert_int_equal(due, wait_cut(call, due ? 5000 : 0));
            if (call->leaves == NULL || !due) {
                rpc_watch_remove(watch, call);
            }
        }
    }
    unsigned before = atomic_load(&looks);
    pause_ms(3 * STALL_MS / 8);
    assert_int_equal(atomic_load(&looks), before); /* the list is empty */
    rpc_watch_destroy(watch);
}

static void
test_our_own_pause_is_forgiven(void **state)
{
    rpc_watch_t *watch = start();
    rpc_call_t first   = {.due_ns = UINT64_MAX};

    (void)state;
    rpc_watch_add(watch, &first);
    atomic_store(&hold_up_ms, 2 * STALL_MS);
    while (atomic_load(&hold_up_ms) != 0) {
        pause_ms(1);
    }
    uint64_t back   = in_ms(2 * STALL_MS);
    rpc_call_t late = {.due_ns = in_ms(STALL_MS)}; /* while nobody is there to see what it does */
    pause_ms(2 * STALL_MS);
    rpc_watch_add(watch, &late);
    assert_true(wait_cut(&late, 5000)); /* in the end it is */
    assert_true(late.cut_ns >= back + STALL_MS * ATTN_NS_PER_MS);
    rpc_watch_remove(watch, &late);
    rpc_watch_remove(watch, &first);
    rpc_watch_destroy(watch);
}

/* @return whether a look that came late was followed by others in time, so that who was overdue by
 * then was cut off at once; not so, if this process did pause, for the machine's reasons */
static bool
is_cut_after_a_late_look(void)
{
    rpc_watch_t *watch = start();
    rpc_call_t first   = {.due_ns = UINT64_MAX};

    rpc_watch_add(watch, &first);
    atomic_store(&hold_up_ms, STALL_MS / 4);
    while (atomic_load(&hold_up_ms) != 0) {
        pause_ms(1);
    }
    rpc_call_t late = {.due_ns = in_ms(STALL_MS / 4)};
    pause_ms(STALL_MS / 4);
    rpc_watch_add(watch, &late);
    assert_true(wait_cut(&late, 5000));
    rpc_watch_remove(watch, &late);
    rpc_watch_remove(watch, &first);
    rpc_watch_destroy(watch); /* its thread is over: what it wrote is ours */
    return first.gap_ns >= STALL_MS / 4 * ATTN_NS_PER_MS &&
           first.gap_ns <= STALL_MS / 2 * ATTN_NS_PER_MS &&
           late.taken_ns <= late.due_ns + STALL_MS / 2 * ATTN_NS_PER_MS;
}

static void
test_a_late_look_is_no_pause(void **state)
{
    unsigned tries = 0;

    (void)state;
    while (!is_cut_after_a_late_look()) {
        assert_true(++tries < 30);
    }
}

static void
test_it_ends_at_once(void **state)
{
    rpc_watch_t *watch = rpc_watch_create(3600u * 1000);

    (void)state;
    assert_int_equal(rpc_watch_start(watch), ATTN_OK);
    pause_ms(20);
    uint64_t start_ns = attn_now_ns();
    rpc_watch_destroy(watch);
    assert_true(attn_now_ns() - start_ns < 2000 * ATTN_NS_PER_MS);

    rpc_watch_destroy(rpc_watch_create(STALL_MS)); /* never started */
    rpc_watch_destroy(NULL);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_who_is_overdue_is_cut_off),
        cmocka_unit_test(test_calls_come_and_go),
        cmocka_unit_test(test_our_own_pause_is_forgiven),
        cmocka_unit_test(test_a_late_look_is_no_pause),
        cmocka_unit_test(test_it_ends_at_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
