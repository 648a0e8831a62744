/*
 * primitives.h: what exchange.cu and states.cuh need of CUDA, for the host: threads of all ranks
 * are fibers of one thread (emulator.cc), and what is stored to an inbox comes there later, at a
 * random time, before or after what was stored earlier to other places.
 */
#ifndef ATTN_TESTS_EXCHANGE_PRIMITIVES_H
#define ATTN_TESTS_EXCHANGE_PRIMITIVES_H

#include "tests/emulator/language.h"

/* ---- emulator.cc ---- */

extern emu_index threadIdx, blockIdx, gridDim;

void emu_store(void *to, const void *from, uint32_t bytes); /* on its way */
void emu_meet_warp();
void emu_meet_block();
void emu_all(uint32_t value, uint32_t *values); /* of the warp's lanes, exchanged */
uint64_t emu_now();
float *emu_shared(); /* of the CTA */

/* ---- the language's, among threads ---- */

static inline uint32_t
atomicAdd(uint32_t *at, uint32_t v)
{
    uint32_t old = *at;
    *at += v;
    return old;
}
static inline uint32_t
atomicCAS(uint32_t *at, uint32_t expected, uint32_t v)
{
    uint32_t old = *at;
    *at          = old == expected ? v : old;
    return old;
}
static inline void
__syncthreads()
{
    emu_meet_block();
}
static inline uint32_t
__reduce_and_sync(uint32_t, uint32_t x)
{
    uint32_t v[32], all = ~0u;
    emu_all(x, v);
    for (int i = 0; i < 32; i++) {
        all &= v[i];
    }
    return all;
}
static inline uint32_t
__reduce_max_sync(uint32_t, uint32_t x)
{
    uint32_t v[32], most = 0;
    emu_all(x, v);
    for (int i = 0; i < 32; i++) {
        most = v[i] > most ? v[i] : most;
    }
    return most;
}
static inline bool
__all_sync(uint32_t m, bool p)
{
    return __reduce_and_sync(m, p) != 0;
}
static inline bool
__any_sync(uint32_t m, bool p)
{
    return __reduce_max_sync(m, p) != 0;
}
static inline float
__shfl_sync(uint32_t, float x, uint32_t lane)
{
    uint32_t v[32];
    emu_all(__float_as_uint(x), v);
    return __uint_as_float(v[lane]);
}

/* ---- link.cuh ---- */

#define STACKS(name) float *name = emu_shared()

static inline void
store_packet(void *to, uint4 v)
{
    emu_store(to, &v, sizeof(v));
}
static inline uint4
load_packet(const void *from)
{
    uint4 v;
    memcpy(&v, from, sizeof(v));
    return v;
}
static inline void
store_word(uint32_t *to, uint32_t v)
{
    emu_store(to, &v, sizeof(v));
}
static inline uint32_t
load_word(const uint32_t *from)
{
    return *from;
}
static inline uint64_t
now_ns()
{
    return emu_now();
}
static inline void
wait_for_states()
{
}

#endif
