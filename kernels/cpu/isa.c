/*
 * Which instruction set. One that is not a row here yet takes a file isa_NAME.c that
 * includes leaf.inc, a line in kernels/CMakeLists.txt and a row, best first. Rows with the
 * same kind have the same bits: leaf.inc fixes the order of every sum without regard to
 * lanes, so a fused multiply-add is all that tells one from the other.
 */
#include "kernels/cpu/leaf.h"

#include "base/status.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

static bool
always(void)
{
    return true;
}

#if defined(__x86_64__)
static bool
has_avx2(void)
{
    unsigned a, b, c, d; /* clang's builtin does not know f16c, of which cpuid tells */

    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

static bool
has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(__x86_64__)
#if defined(__linux__)
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_TILE_DATA 18

/*
 * Tiles are 8 KiB of registers, which the kernel saves for a process only if it asks: signal
 * frames grow, and a thread with too small an alternate stack makes it refuse. Threads made
 * before or after have the permission alike; asking again does no harm.
 */
static bool
tiles_permitted(void)
{
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
}
#else
static bool
tiles_permitted(void)
{
    return false;
}
#endif

static bool
has_amx(void)
{
    uint32_t a, b, c, d;

    if (!has_avx512() || __get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & 1u << 5) == 0) {
        return false; /* no vectors of bf16 */
    }
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & 1u << 22) != 0 &&
           (d & 1u << 24) != 0 && tiles_permitted();
}
#endif

static const struct {
    const cpu_isa_t *isa;
    bool (*present)(void);
} rows[] = {
#if defined(__x86_64__)
    {&cpu_isa_amx, has_amx},
    {&cpu_isa_avx512, has_avx512},
    {&cpu_isa_avx2, has_avx2},
#endif
    {&cpu_isa_baseline, always},
};

attn_status_t
cpu_isa_choose(const cpu_isa_t **isa_p)
{
    const char *asked = getenv("ATTN_CPU_ISA");

    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        bool named = asked == NULL || *asked == 0 || strcmp(asked, rows[i].isa->name) == 0;
        if (named && rows[i].present()) {
            *isa_p = rows[i].isa;
            return ATTN_OK;
        }
    }
    return attn_fail(ATTN_ERR_UNSUPPORTED,
                     "ATTN_CPU_ISA asks for \"%s\": this build has amx (bf16 tiles, beside "
                     "avx512), avx512 (f, bw, dq, vl) and avx2 (with fma and f16c), where the "
                     "machine and its kernel have them, and baseline",
                     asked);
}
