/* The emulator of primitives.h, and the prefill kernel compiled with it. */
#define ATTN_EMULATED
#include "tests/emulator/primitives.h"

#include "tests/emulator/emulator.h"

#include <deque>
#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
#include <vector>

#define STACK_BYTES (256u << 10)
#define SHARED_BYTES (232448u)

emu_index threadIdx, blockIdx;
static uint8_t memory[SHARED_BYTES] __attribute__((aligned(1024)));
uint8_t *const emu_memory = memory;

namespace
{

struct mbarrier {
    int64_t count, left, bytes;
    uint32_t phase;
};
struct meeting {
    uint32_t arrived, turn;
};
struct product {
    bool bf16, sum;
    int n, add;
    float *d;
    const uint32_t *a;
    uint64_t a_at, b_at;
};
struct small_copy {
    uint32_t to;
    const void *from;
};
struct large_copy {
    std::vector<small_copy> pieces;
    uint32_t bar, bytes; /* 0: pieces of 16 bytes, and an arrival in place of bytes */
};
struct fiber {
    ucontext_t context;
    std::vector<uint8_t> stack;
    bool done;
    std::deque<std::vector<product>> products; /* groups; the last is open */
    std::deque<std::vector<small_copy>> copies;
};

std::vector<fiber> fibers;
ucontext_t scheduler;
std::map<uint32_t, mbarrier> barriers;
std::map<uint32_t, meeting> named, meetings;
std::vector<large_copy> flying;
uint32_t values[64][32];
uint64_t chance_state, progress;

uint64_t
chance()
{
    chance_state ^= chance_state << 13;
    chance_state ^= chance_state >> 7;
    chance_state ^= chance_state << 17;
    return chance_state;
}

fiber &
self()
{
    return fibers[threadIdx.x];
}

void
yield()
{
    uint32_t me = threadIdx.x;
    swapcontext(&fibers[me].context, &scheduler);
    threadIdx.x = me;
}

void
turned(mbarrier &b)
{
    if (b.left == 0 && b.bytes == 0) {
        b.phase++;
        b.left = b.count;
        progress++;
    }
}

void
meet(meeting &m, uint32_t threads, bool wait)
{
    uint32_t turn = m.turn;
    progress++;
    if (++m.arrived == threads) {
        m.arrived = 0;
        m.turn++;
        return;
    }
    while (wait && m.turn == turn) {
        yield();
    }
}

float
of_bits(bool bf16, uint16_t u)
{
    if (bf16) {
        return __uint_as_float((uint32_t)u << 16);
    }
    _Float16 h;
    memcpy(&h, &u, 2);
    return (float)h;
}

/* An element of 16 bits by a logical address: the swizzle of 128 bytes is in addresses. */
float
element(bool bf16, uint32_t at)
{
    uint16_t u;
    at ^= at >> 7 << 4 & 0x70;
    if (at + 2 > SHARED_BYTES) {
        fprintf(stderr, "emulator: a product reads beyond shared memory\n");
        abort();
    }
    memcpy(&u, memory + at, 2);
    return of_bits(bf16, u);
}

float
of_word(bool bf16, uint32_t word, int half)
{
    return of_bits(bf16, (uint16_t)(word >> 16 * half));
}

void
multiply(uint32_t group, size_t g, size_t i)
{
    const product &first = fibers[group * 128].products[g][i];
    static float a[64][16], b[256][16];
    uint32_t b_at = (first.b_at & 0x3fff) << 4, leading = (first.b_at >> 16 & 0x3fff) << 4,
             stride = (first.b_at >> 32 & 0x3fff) << 4;

    if (first.b_at >> 62 != 1 || (b_at & 1023 & ~0x60u)) {
        fprintf(stderr, "emulator: descriptor %llx\n", (unsigned long long)first.b_at);
        abort();
    }
    for (int n = 0; n < first.n; n++) {
        for (int k = 0; k < 16; k++) {
            uint32_t at = first.sum ? n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2
                                    : n / 8 * stride + n % 8 * 128 + k * 2;
            b[n][k]     = element(first.bf16, b_at + at);
        }
    }
    for (int r = 0; r < 64; r++) {
        for (int k = 0; k < 16; k++) {
            if (first.a == nullptr) {
                uint32_t a_at = (first.a_at & 0x3fff) << 4, step = (first.a_at >> 32 & 0x3fff) << 4;
                a[r][k] = element(first.bf16, a_at + r / 8 * step + r % 8 * 128 + k * 2);
            } else {
                uint32_t t = group * 128 + r / 16 * 32 + r % 8 * 4 + k % 8 / 2;
                a[r][k] =
                    of_word(first.bf16, fibers[t].products[g][i].a[k / 8 * 2 + r % 16 / 8], k % 2);
            }
        }
    }
    for (uint32_t t = 0; t < 128; t++) {
        const product &p = fibers[group * 128 + t].products[g][i];
        for (int j = 0; j < p.n / 8; j++) {
            for (int v = 0; v < 4; v++) {
                int r = t / 32 * 16 + t % 32 / 4 + v / 2 * 8, n = 8 * j + t % 4 * 2 + v % 2;
                float x = 0;
                for (int k = 0; k < 16; k++) {
                    x = fmaf(a[r][k], b[n][k], x);
                }
                p.d[4 * j + v] = p.add ? p.d[4 * j + v] + x : x;
            }
        }
    }
}

void
do_large(size_t i)
{
    large_copy c = flying[i];
    flying.erase(flying.begin() + (long)i);
    for (const small_copy &s : c.pieces) {
        memcpy(memory + s.to, s.from, c.bytes > 0 ? 128 : 16);
    }
    if (c.bytes == 0) {
        barriers[c.bar].left--;
    }
    barriers[c.bar].bytes -= c.bytes;
    turned(barriers[c.bar]);
    progress++;
}

} // namespace

uint32_t
emu_address(const void *p)
{
    const uint8_t *at = (const uint8_t *)p;
    if (at >= memory && at < memory + SHARED_BYTES) {
        return (uint32_t)(at - memory);
    }
    return 0x40000; /* barriers: only a name */
}

void
emu_barrier_init(uint32_t bar, uint32_t count)
{
    barriers[bar] = {count, count, 0, 0};
}

void
emu_barrier_arrive(uint32_t bar, int64_t bytes)
{
    mbarrier &b = barriers[bar];
    b.bytes += bytes;
    b.left--;
    turned(b);
    progress++;
}

void
emu_barrier_wait(uint32_t bar, uint32_t phase)
{
    while ((barriers[bar].phase & 1) == phase) {
        yield();
    }
}

/* A map of the tests: base, strides of dimensions 1 to 4, box of dimensions 1 to 3. */
void
emu_copy_box(uint32_t to, const cuda_map_t *map, uint32_t c3, uint32_t c4, uint32_t bar)
{
    const uint64_t *m = map->words;
    large_copy c      = {{}, bar, (uint32_t)(m[5] * m[6] * m[7] * 128)};
    for (uint64_t g = 0; g < m[7]; g++) {
        for (uint64_t part = 0; part < m[6]; part++) {
            for (uint64_t t = 0; t < m[5]; t++) {
                c.pieces.push_back(
                    {(uint32_t)(to + ((g * m[6] + part) * m[5] + t) * 128),
                     (const uint8_t *)m[0] + t * m[1] + part * m[2] + (c3 + g) * m[3] + c4 * m[4]});
            }
        }
    }
    flying.push_back(c);
}

void
emu_copy_16(uint32_t to, const void *from)
{
    self().copies.back().push_back({to, from});
}

void
emu_copies_arrive(uint32_t bar)
{
    flying.push_back({self().copies.back(), bar, 0});
    self().copies.back().clear();
}

void
emu_copies_commit()
{
    self().copies.push_back({});
}

void
emu_copies_wait(int n)
{
    std::deque<std::vector<small_copy>> &groups = self().copies;
    while ((int)groups.size() - 1 > n) {
        for (const small_copy &s : groups.front()) {
            memcpy(memory + s.to, s.from, 16);
        }
        groups.pop_front();
    }
}

void
emu_named(uint32_t id, uint32_t threads, bool wait)
{
    meet(named[id], threads, wait);
}

void
emu_sync(uint32_t threads)
{
    uint32_t name = threads > 128    ? 1000
                    : threads == 128 ? 500 + threadIdx.x / 128
                                     : threadIdx.x / 32;
    meet(meetings[name], threads, true);
}

uint64_t
emu_all(uint32_t value, uint32_t *all)
{
    uint32_t warp                  = threadIdx.x / 32;
    values[warp][threadIdx.x % 32] = value;
    emu_sync(32);
    memcpy(all, values[warp], 128);
    emu_sync(32);
    return 0;
}

void
emu_wgmma(bool bf16, int n, float *d, const uint32_t *a, uint64_t a_at, uint64_t b_at, int add,
          bool sum)
{
    self().products.back().push_back({bf16, sum, n, add, d, a, a_at, b_at});
}

void
emu_wgmma_commit()
{
    self().products.push_back({});
}

void
emu_wgmma_wait(int n)
{
    emu_sync(128);
    uint32_t group = threadIdx.x / 128;
    if (threadIdx.x % 128 == 0) { /* nobody else runs meanwhile */
        while ((int)self().products.size() - 1 > n) {
            for (size_t i = 0; i < self().products[0].size(); i++) {
                multiply(group, 0, i);
            }
            for (uint32_t t = 0; t < 128; t++) {
                fibers[group * 128 + t].products.pop_front();
            }
        }
    }
    emu_sync(128);
}

#include "kernels/cuda/prefill.cu"

static const cuda_args_t *run_args;
static const cuda_map_t *run_maps;
static int run_mode;

static void
enter()
{
    if (run_mode == 0) {
        prefill_plain(*run_args, run_maps[0], run_maps[1]);
    } else if (run_mode == 1) {
        prefill_general(*run_args, run_maps[0], run_maps[1]);
    } else {
        prefill_parts(*run_args, run_maps[0], run_maps[1]);
    }
    self().done = true;
    swapcontext(&self().context, &scheduler);
}

static void
run_cta(uint32_t cta)
{
    blockIdx.x = cta;
    barriers.clear();
    named.clear();
    meetings.clear();
    memset(memory, 0xff, sizeof(memory)); /* NaN */
    for (uint32_t t = 0; t < CUDA_MANY_THREADS; t++) {
        fiber &f = fibers[t];
        f.done   = false;
        f.products.assign(1, {});
        f.copies.assign(1, {});
        f.stack.resize(STACK_BYTES);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = f.stack.data();
        f.context.uc_stack.ss_size = STACK_BYTES;
        f.context.uc_link          = nullptr;
        makecontext(&f.context, enter, 0);
    }
    for (uint32_t left = CUDA_MANY_THREADS, idle = 0; left > 0;) {
        uint64_t before = progress;
        uint32_t from   = (uint32_t)(chance() % CUDA_MANY_THREADS);
        for (uint32_t i = 0; i < CUDA_MANY_THREADS; i++) {
            threadIdx.x = (from + i) % CUDA_MANY_THREADS;
            if (!self().done) {
                uint32_t t = threadIdx.x;
                swapcontext(&scheduler, &fibers[t].context);
                left -= fibers[t].done;
                progress += fibers[t].done;
            }
        }
        bool stuck = progress == before;
        while (!flying.empty() && (stuck || chance() % 4 == 0)) {
            do_large(chance() % flying.size());
            stuck = false;
        }
        idle = progress == before ? idle + 1 : 0;
        if (idle > 10) {
            fprintf(stderr, "emulator: CTA %u hangs, %u threads left\n", cta, left);
            abort();
        }
    }
}

extern "C" void
emulate_prefill(const cuda_args_t *args, const cuda_map_t maps[2], uint32_t grid, int mode,
                uint64_t seed)
{
    fibers.resize(CUDA_MANY_THREADS);
    chance_state = seed | 1;
    run_args     = args;
    run_maps     = maps;
    run_mode     = mode;
    for (uint32_t i = 0; i < grid; i++) {
        run_cta(i);
    }
}
