/* The emulator of primitives.h, and exchange.cu compiled with it. */
#define ATTN_EMULATED
#include "tests/exchange/primitives.h"

#include "kernels/cuda/exchange.cu"
#include "tests/exchange/emulator.h"

#include <deque>
#include <memory>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
#include <vector>

#define STACK_BYTES (48u << 10)
#define THREADS (32 * CUDA_EXCHANGE_WARPS)

emu_index threadIdx, blockIdx, gridDim;

namespace
{

struct meeting {
    uint32_t arrived, turn;
};
struct fiber {
    ucontext_t context; /* to begin with; then `at`, which costs no system call */
    jmp_buf at;
    std::vector<uint8_t> stack;
    bool begun, done;
};
struct warp {
    meeting lanes;
    uint32_t values[32];
};
struct cta {
    fiber fibers[THREADS];
    warp warps[CUDA_EXCHANGE_WARPS];
    meeting all;
    std::vector<float> shared;
    uint32_t left; /* threads */
};
struct rank {
    emulated_rank_t *of;
    uint32_t at, ctas_left; /* launch; of it */
    std::vector<std::unique_ptr<cta>> ctas;
};
struct flight {
    uint8_t *to;
    uint8_t bytes[16];
    uint32_t n;
};

emulation_t *told;
std::vector<rank> ranks;
std::deque<flight> flying;
jmp_buf scheduler;
uint32_t now_rank, now_cta, now_thread;
uint64_t chance_state, clock_ns;

uint64_t
chance()
{
    chance_state ^= chance_state << 13;
    chance_state ^= chance_state >> 7;
    chance_state ^= chance_state << 17;
    return chance_state >> 11;
}

cta &
here()
{
    return *ranks[now_rank].ctas[now_cta];
}

void
yield()
{
    if (_setjmp(here().fibers[now_thread].at) == 0) {
        _longjmp(scheduler, 1);
    }
}

/* Until it yields. */
void
resume(fiber &f)
{
    if (_setjmp(scheduler) == 0) {
        if (f.begun) {
            _longjmp(f.at, 1);
        }
        f.begun = true;
        setcontext(&f.context);
    }
}

void
meet(meeting &m, uint32_t threads)
{
    uint32_t turn = m.turn;
    if (++m.arrived == threads) {
        m.arrived = 0;
        m.turn++;
        return;
    }
    while (m.turn == turn) {
        yield();
    }
}

void
enter()
{
    const cuda_exchange_t &x = ranks[now_rank].of->launches[ranks[now_rank].at];
    if (told->d == 64) {
        exchange_64(x);
    } else if (told->d == 128) {
        exchange_128(x);
    } else {
        exchange_256(x);
    }
    here().fibers[now_thread].done = true;
    here().left--;
    yield();
}

void
launch(rank &r)
{
    const cuda_exchange_t &x = r.of->launches[r.at];

    r.ctas_left = r.of->grid;
    for (uint32_t c = 0; c < r.of->grid; c++) {
        if (r.ctas.size() <= c) {
            r.ctas.emplace_back(new cta);
        }
        cta &to = *r.ctas[c];
        to.left = THREADS;
        to.all  = {0, 0};
        to.shared.assign(CUDA_EXCHANGE_SHARED(told->d, x.depth) / sizeof(float), NAN);
        for (warp &w : to.warps) {
            w.lanes = {0, 0};
        }
        for (fiber &f : to.fibers) {
            f.begun = f.done = false;
            f.stack.resize(STACK_BYTES);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp   = f.stack.data();
            f.context.uc_stack.ss_size = STACK_BYTES;
            f.context.uc_link          = nullptr;
            makecontext(&f.context, enter, 0);
        }
    }
}

/* Each lane of a warp runs until it waits. */
void
turn(uint32_t rank_at, uint32_t cta_at, uint32_t warp_at)
{
    rank &r  = ranks[rank_at];
    now_rank = rank_at;
    now_cta  = cta_at;
    clock_ns += 10 + chance() % 10;
    for (uint32_t lane = 0; lane < 32; lane++) {
        now_thread  = warp_at * 32 + lane;
        threadIdx.x = now_thread;
        blockIdx.x  = cta_at;
        gridDim.x   = r.of->grid;
        if (!here().fibers[now_thread].done) {
            resume(here().fibers[now_thread]);
        }
    }
    if (here().left == 0) {
        here().left = ~0u;
        if (--r.ctas_left == 0) {
            r.of->ended = ++r.at;
            if (r.at < r.of->n) {
                launch(r);
            }
        }
    }
}

/* One store arrives; those to the same place in their order. */
void
deliver()
{
    size_t late = chance() % 64 == 0 ? flying.size() : 128; /* few overtake many */
    size_t at   = chance() % (late < flying.size() ? late : flying.size());
    for (size_t i = 0; i < at; i++) {
        if (flying[i].to == flying[at].to) {
            at = i;
        }
    }
    memcpy(flying[at].to, flying[at].bytes, flying[at].n);
    flying.erase(flying.begin() + (long)at);
}

} // namespace

void
emu_store(void *to, const void *from, uint32_t n)
{
    flight f = {(uint8_t *)to, {}, n};
    memcpy(f.bytes, from, n);
    flying.push_back(f);
}

void
emu_meet_warp()
{
    meet(here().warps[now_thread / 32].lanes, 32);
}

void
emu_meet_block()
{
    meet(here().all, THREADS);
}

void
emu_all(uint32_t value, uint32_t *values)
{
    uint32_t *at        = here().warps[now_thread / 32].values;
    at[now_thread % 32] = value;
    emu_meet_warp();
    memcpy(values, at, 128);
    emu_meet_warp();
}

uint64_t
emu_now()
{
    return clock_ns;
}

float *
emu_shared()
{
    return here().shared.data();
}

extern "C" void
emulate_exchange(emulation_t *e)
{
    uint64_t asleep = 0; /* ranks that do not run for a while */

    told         = e;
    chance_state = e->seed * 2 + 1;
    clock_ns     = 1000;
    flying.clear();
    ranks.clear();
    ranks.resize(e->ranks);
    for (uint32_t r = 0; r < e->ranks; r++) {
        ranks[r].of    = &e->of[r];
        e->of[r].ended = 0;
        if (e->of[r].n > 0) {
            launch(ranks[r]);
        }
    }
    for (uint64_t turns = 1;; turns++) {
        std::vector<uint32_t> awake, busy;
        for (uint32_t r = 0; r < e->ranks; r++) {
            if (ranks[r].at < ranks[r].of->n) {
                busy.push_back(r);
                if (!(asleep >> r & 1)) {
                    awake.push_back(r);
                }
            }
        }
        if (busy.empty()) {
            break;
        }
        if (e->meanwhile != nullptr) {
            e->meanwhile(e->arg, turns);
        }
        if (turns % 512 == 0 || awake.empty()) {
            asleep = chance() % 2 ? chance() : 0;
        } else {
            uint32_t r = awake[chance() % awake.size()];
            uint32_t c = (uint32_t)(chance() % ranks[r].of->grid);
            if (ranks[r].ctas[c]->left != ~0u) {
                turn(r, c, (uint32_t)(chance() % CUDA_EXCHANGE_WARPS));
            }
        }
        for (uint64_t n = flying.size() < 64 ? chance() % 2 : flying.size() / 16;
             n > 0 && !flying.empty(); n--) {
            deliver();
        }
        if (turns > 2000000) {
            fprintf(stderr, "emulator: launches do not end\n");
            abort();
        }
    }
    while (!flying.empty()) {
        deliver();
    }
}
