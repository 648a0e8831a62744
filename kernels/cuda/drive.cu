/*
 * drive.cu: layers that the devices of a runner and of its worker drive (drive.h has the rules).
 * Each kernel is one CTA. A thread has every 512-th line, four of which it looks at together.
 */
#include "kernels/cuda/drive.h"
#include "kernels/cuda/link.cuh"
#include "kernels/cuda/places.cuh"

#define TOGETHER 4u
#define LOOK_EVERY 32u /* looks at lines between two at the clock and the words */

/* ---- steps, and giving them up ---- */

/* Is there a step, and was it not given up? Its numbers; all threads come to the same. */
__device__ __forceinline__ bool
is_open(const cuda_layer_t &x, uint32_t *number)
{
    const uint32_t first = x.drive->first;
    const bool open      = first != 0 && x.drive->failed == 0;

    *number = first + x.number;
    __syncthreads();
    if (open && threadIdx.x == 0 && x.drive->end_ns == 0) {
        x.drive->end_ns = now_ns() + x.drive->limit_ns;
    }
    return open;
}

/* By one thread. */
__device__ __forceinline__ uint32_t
gives_up(const cuda_layer_t &x)
{
    cuda_drive_t *d            = x.drive;
    const cuda_lane_head_t *at = (const cuda_lane_head_t *)d->lane;
    uint32_t why               = 0;

    if (load_word(&x.word->abort) == d->first) {
        why = CUDA_DRIVE_ABORTED;
    } else if (x.runner && load_word(&at->given_up) == d->first) {
        why = CUDA_DRIVE_LEFT;
    } else if (now_ns() >= d->end_ns) {
        why = CUDA_DRIVE_LATE;
    }
    if (why != 0) {
        d->failed = why;
        store_word(&x.word->failed, why);
    }
    return why;
}

/* ---- lines ---- */

/* All words of a message; get(w) is word w. */
template <typename Get>
__device__ __forceinline__ void
send_lines(uint8_t *to, uint32_t words, uint32_t number, Get get)
{
    const uint32_t lines = CUDA_LINES(words);

    for (uint32_t i = threadIdx.x; i < lines; i += CUDA_DRIVE_THREADS) {
        uint32_t v[3];
#pragma unroll
        for (uint32_t j = 0; j < 3; j++) {
            v[j] = j * lines + i < words ? get(j * lines + i) : 0;
        }
        store_packet(to + (uint64_t)i * 16, make_uint4(v[0], v[1], v[2], number));
    }
}

/* The thread's lines from i on: those that have come. */
template <typename Put>
__device__ __forceinline__ bool
look_at_lines(const uint8_t *from, uint32_t i, uint32_t lines, uint32_t words, uint32_t number,
              Put put)
{
    uint4 v[TOGETHER];
    bool come = true;

#pragma unroll
    for (uint32_t j = 0; j < TOGETHER; j++) {
        const uint32_t at = i + j * CUDA_DRIVE_THREADS;
        if (at < lines) {
            v[j] = load_packet(from + (uint64_t)at * 16);
        }
    }
#pragma unroll
    for (uint32_t j = 0; j < TOGETHER; j++) {
        come = come && (i + j * CUDA_DRIVE_THREADS >= lines || v[j].w == number);
    }
    if (!come) {
        return false;
    }
#pragma unroll
    for (uint32_t j = 0; j < TOGETHER; j++) {
        const uint32_t at = i + j * CUDA_DRIVE_THREADS;
        if (at < lines && at < words) {
            put(at, v[j].x);
        }
        if (at < lines && lines + at < words) {
            put(lines + at, v[j].y);
        }
        if (at < lines && 2 * lines + at < words) {
            put(2 * lines + at, v[j].z);
        }
    }
    return true;
}

/* All words of a message, as they come. False: the step was given up. */
template <typename Put>
__device__ __forceinline__ bool
receive_lines(const cuda_layer_t &x, const uint8_t *from, uint32_t words, uint32_t number, Put put)
{
    __shared__ uint32_t over;
    const uint32_t lines = CUDA_LINES(words);
    uint32_t i           = threadIdx.x;

    for (;;) {
        for (uint32_t looks = 0; i < lines && looks < LOOK_EVERY;) {
            if (look_at_lines(from, i, lines, words, number, put)) {
                i += TOGETHER * CUDA_DRIVE_THREADS;
            } else {
                looks++;
            }
        }
        if (!__syncthreads_or(i < lines)) {
            return true;
        }
        if (threadIdx.x == 0) {
            over = gives_up(x);
        }
        __syncthreads();
        if (over != 0) {
            return false;
        }
    }
}

/* ---- the runner's half ---- */

__device__ __forceinline__ uint32_t
word_of(const cuda_tensor_t &t, uint32_t w)
{
    const uint32_t c = w % t.head_words, head = w / t.head_words % t.heads;

    return t.at[w / t.head_words / t.heads * t.row_stride + head * t.head_stride + c];
}

extern "C" __global__ void
__launch_bounds__(CUDA_DRIVE_THREADS) ask_layer(const __grid_constant__ cuda_ask_t x)
{
    uint32_t number;

    if (!is_open(x.layer, &number)) {
        return;
    }
    uint8_t *lane     = x.layer.drive->lane;
    const uint32_t qk = x.q.words + x.k.words;

    send_lines(lane + CUDA_LANE_HEAD, qk + x.v.words, number, [&](uint32_t w) {
        return w < x.q.words ? word_of(x.q, w)
               : w < qk      ? word_of(x.k, w - x.q.words)
                             : word_of(x.v, w - qk);
    });
    receive_lines(x.layer, lane + x.layer.drive->answers, x.o_words + x.lse_words + x.lse_skip,
                  number, [&](uint32_t w, uint32_t v) {
                      if (w < x.o_words) {
                          x.o[w] = v;
                      } else if (w - x.o_words < x.lse_words) {
                          x.lse[w - x.o_words] = v;
                      }
                  });
}

/* ---- the worker's ---- */

/* Word w of k or v to its place. Returns what is wrong with it. */
__device__ __forceinline__ uint32_t
store_kv(const cuda_bring_t &b, uint8_t *store, uint64_t page_stride, uint32_t row_bytes,
         uint32_t w, uint32_t v)
{
    const uint32_t row_words = row_bytes / 4, c = w % row_words, head = w / row_words % b.kv_heads;
    const uint32_t row = w / row_words / b.kv_heads;

    if (has_special(v, b.exponent)) {
        return CUDA_NOT_FINITE;
    }
    uint4 *piece = piece_at(store + b.pages[row] * page_stride, b.page_size, row_bytes,
                            b.offsets[row], head, c / 4);
    ((uint32_t *)piece)[c % 4] = v;
    return 0;
}

extern "C" __global__ void
__launch_bounds__(CUDA_DRIVE_THREADS) take_layer(const __grid_constant__ cuda_take_t x)
{
    const uint32_t qk = x.q_words + x.k_words;
    uint32_t number, trouble = 0;

    wait_for_states();
    const unsigned long long serial = x.bring.head->serial;
    const bool open                 = is_open(x.layer, &number);

    if (serial == 0) {
        return;
    }
    if (!open ||
        !receive_lines(x.layer, x.layer.drive->lane + CUDA_LANE_HEAD, qk + x.v_words, number,
                       [&](uint32_t w, uint32_t v) {
                           if (w < x.q_words) {
                               x.q[w] = v;
                           } else if (w < qk) {
                               trouble |= store_kv(x.bring, x.bring.k_store, x.bring.k_page_stride,
                                                   x.bring.k_row_bytes, w - x.q_words, v);
                           } else {
                               trouble |= store_kv(x.bring, x.bring.v_store, x.bring.v_page_stride,
                                                   x.bring.v_row_bytes, w - qk, v);
                           }
                       })) {
        trouble = CUDA_NOT_COME;
    }
    if (trouble != 0) {
        atomicOr(&x.bring.mark->trouble, trouble);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && x.k_words > 0) {
        x.bring.mark->stored = serial;
    }
}

extern "C" __global__ void
__launch_bounds__(CUDA_DRIVE_THREADS) answer_layer(const __grid_constant__ cuda_give_t x)
{
    uint32_t number;

    wait_for_states();
    cuda_drive_t *d = x.layer.drive;
    if (is_open(x.layer, &number)) {
        send_lines(d->lane + d->answers, x.o_words + x.lse_words, number,
                   [&](uint32_t w) { return w < x.o_words ? x.o[w] : x.lse[w - x.o_words]; });
    } else if (d->first != 0 && threadIdx.x == 0) {
        store_word(&((cuda_lane_head_t *)d->lane)->given_up, d->first);
    }
}
