/*
 * fake_drive.c: what drive.cu does, by one thread: as long as something is missing a kernel that
 * waits is not ready, and is asked again. Lines are those of the device.
 */
#include "tests/integration/fake_kernels.h"

#include "base/clock.h"
#include "kernels/cuda/drive.h"

#include <string.h>

static bool
is_open(const cuda_layer_t *x, uint32_t *number)
{
    cuda_drive_t *d = x->drive;

    *number = d->first + x->number;
    if (d->first == 0 || d->failed != 0) {
        return false;
    }
    d->end_ns = d->end_ns == 0 ? attn_now_ns() + d->limit_ns : d->end_ns;
    return true;
}

/* Is the step given up? */
static bool
gives_up(const cuda_layer_t *x)
{
    cuda_drive_t *d      = x->drive;
    cuda_lane_head_t *at = (cuda_lane_head_t *)(void *)d->lane;
    uint32_t why         = 0;

    if (__atomic_load_n(&x->word->abort, __ATOMIC_ACQUIRE) == d->first) {
        why = CUDA_DRIVE_ABORTED;
    } else if (x->runner && __atomic_load_n(&at->given_up, __ATOMIC_ACQUIRE) == d->first) {
        why = CUDA_DRIVE_LEFT;
    } else if (attn_now_ns() >= d->end_ns) {
        why = CUDA_DRIVE_LATE;
    }
    if (why != 0) {
        d->failed = why;
        __atomic_store_n(&x->word->failed, why, __ATOMIC_RELEASE);
    }
    return why != 0;
}

static uint32_t *
line_at(uint8_t *lines, uint32_t i)
{
    return (uint32_t *)(void *)(lines + 16 * (uint64_t)i);
}

/* Word w of a message, where it lies among its lines. */
static uint32_t *
word_at(uint8_t *lines, uint32_t words, uint32_t w)
{
    uint32_t n = CUDA_LINES(words);

    return line_at(lines, w % n) + w / n;
}

static void
number_lines(uint8_t *lines, uint32_t words, uint32_t number)
{
    for (uint32_t i = 0; i < CUDA_LINES(words); i++) {
        __atomic_store_n(line_at(lines, i) + 3, number, __ATOMIC_RELEASE);
    }
}

static bool
have_come(uint8_t *lines, uint32_t words, uint32_t number)
{
    for (uint32_t i = 0; i < CUDA_LINES(words); i++) {
        if (__atomic_load_n(line_at(lines, i) + 3, __ATOMIC_ACQUIRE) != number) {
            return false;
        }
    }
    return true;
}

/* ---- the runner's half ---- */

static void
send_tensor(uint8_t *lines, uint32_t words, uint32_t from, const cuda_tensor_t *t)
{
    for (uint32_t w = 0; w < t->words; w++) {
        uint32_t c = w % t->head_words, head = w / t->head_words % t->heads;
        uint64_t row                     = w / t->head_words / t->heads;
        *word_at(lines, words, from + w) = t->at[row * t->row_stride + head * t->head_stride + c];
    }
}

bool
fake_ask_ready(uint64_t begun_ns, void *const *args)
{
    const cuda_ask_t *x = args[0];
    uint32_t number, words = x->q.words + x->k.words + x->v.words;

    (void)begun_ns;
    if (!is_open(&x->layer, &number)) {
        return true;
    }
    uint8_t *lane = x->layer.drive->lane, *in = lane + CUDA_LANE_HEAD;
    if (!have_come(in, words, number)) { /* what the worker has taken is not written again */
        send_tensor(in, words, 0, &x->q);
        send_tensor(in, words, x->q.words, &x->k);
        send_tensor(in, words, x->q.words + x->k.words, &x->v);
        number_lines(in, words, number);
    }
    return have_come(lane + x->layer.drive->answers, x->o_words + x->lse_words + x->lse_skip,
                     number) ||
           gives_up(&x->layer);
}

void
fake_ask_play(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    const cuda_ask_t *x = args[0];
    uint32_t number, words = x->o_words + x->lse_words + x->lse_skip;

    (void)kernel;
    (void)grid;
    if (!is_open(&x->layer, &number)) {
        return;
    }
    uint8_t *answers = x->layer.drive->lane + x->layer.drive->answers;
    for (uint32_t w = 0; w < x->o_words; w++) {
        x->o[w] = *word_at(answers, words, w);
    }
    for (uint32_t w = 0; w < x->lse_words; w++) {
        x->lse[w] = *word_at(answers, words, x->o_words + w);
    }
}

/* ---- the worker's ---- */

bool
fake_take_ready(uint64_t begun_ns, void *const *args)
{
    const cuda_take_t *x = args[0];
    uint32_t number;

    (void)begun_ns;
    return x->bring.head->serial == 0 || !is_open(&x->layer, &number) ||
           have_come(x->layer.drive->lane + CUDA_LANE_HEAD, x->q_words + x->k_words + x->v_words,
                     number) ||
           gives_up(&x->layer);
}

static uint32_t
store_word(const cuda_bring_t *b, bool of_v, uint32_t w, uint32_t v)
{
    uint32_t row_bytes = of_v ? b->v_row_bytes : b->k_row_bytes, row_words = row_bytes / 4;
    uint32_t c = w % row_words, head = w / row_words % b->kv_heads;
    uint32_t row = w / row_words / b->kv_heads, special = v & b->exponent;
    uint32_t offset = b->offsets[row];
    uint8_t *page   = of_v ? b->v_store + b->pages[row] * b->v_page_stride
                           : b->k_store + b->pages[row] * b->k_page_stride;

    if ((special & 0xffff) == (b->exponent & 0xffff) || special >> 16 == b->exponent >> 16) {
        return CUDA_NOT_FINITE;
    }
    uint8_t *piece =
        page + ((uint64_t)head * b->page_size + offset) * row_bytes + 16 * ((c / 4) ^ (offset & 7));
    memcpy(piece + 4 * (c % 4), &v, sizeof(v));
    return 0;
}

void
fake_take_play(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    const cuda_take_t *x = args[0];
    uint32_t number, words = x->q_words + x->k_words + x->v_words, trouble = 0;

    (void)kernel;
    (void)grid;
    if (x->bring.head->serial == 0) {
        return;
    }
    bool open = is_open(&x->layer, &number);
    for (uint32_t w = 0; open && w < words; w++) {
        uint32_t v = *word_at(x->layer.drive->lane + CUDA_LANE_HEAD, words, w);
        if (w < x->q_words) {
            x->q[w] = v;
        } else {
            bool of_v = w - x->q_words >= x->k_words;
            trouble |= store_word(&x->bring, of_v, w - x->q_words - (of_v ? x->k_words : 0), v);
        }
    }
    x->bring.mark->trouble |= open ? trouble : CUDA_NOT_COME;
    if (x->k_words > 0) {
        x->bring.mark->stored = x->bring.head->serial;
    }
    fake_kernels_are_of(x->bring.exponent);
}

void
fake_answer_play(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    const cuda_give_t *x = args[0];
    cuda_drive_t *d      = x->layer.drive;
    uint32_t number, words = x->o_words + x->lse_words;

    (void)kernel;
    (void)grid;
    if (is_open(&x->layer, &number)) {
        for (uint32_t w = 0; w < words; w++) {
            *word_at(d->lane + d->answers, words, w) =
                w < x->o_words ? x->o[w] : x->lse[w - x->o_words];
        }
        number_lines(d->lane + d->answers, words, number);
    } else if (d->first != 0) {
        __atomic_store_n(&((cuda_lane_head_t *)(void *)d->lane)->given_up, d->first,
                         __ATOMIC_RELEASE);
    }
}
