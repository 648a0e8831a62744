/* Which tokens of a leaf are read, and where they lie: masks, sparse lists, page tables. */
#include "kernels/cpu/attend.h"

#include "base/checked.h"

#include <string.h>

/* The tokens of the leaf that some row sees: [first, end). */
typedef struct hull {
    int32_t first, end;
    bool full; /* each row sees all of it */
} hull_t;

static int32_t
clamp(int64_t x, int32_t top)
{
    return x < 0 ? 0 : x > top ? top : (int32_t)x;
}

/* Causality and window: what a row sees of a leaf is one range of slots. */
static hull_t
mask_rows(const cpu_attend_t *x, const cpu_scratch_t *scratch, const attn_work_t *work,
          const attn_leaf_t *at)
{
    const attn_problem_t *problem = &x->plan->problem;
    int32_t tokens                = (int32_t)at->tokens;
    int64_t window                = (int64_t)attn_min(problem->window, INT32_MAX);
    hull_t hull                   = {.first = tokens, .end = 0, .full = true};

    for (uint32_t r = 0; r < work->rows; r++) {
        int64_t behind = scratch->position[r] - at->position; /* slot of the query's own position */
        int32_t lo     = problem->window > 0 ? clamp(behind - window + 1, tokens) : 0;
        int32_t hi     = problem->causal ? clamp(behind + 1, tokens) : tokens;
        scratch->lo[r] = lo;
        scratch->hi[r] = hi;
        scratch->distance[r] = (int32_t)-behind;
        if (lo < hi) {
            hull.full  = hull.full && (r == 0 || (lo == hull.first && hi == hull.end));
            hull.first = lo < hull.first ? lo : hull.first;
            hull.end   = hi > hull.end ? hi : hull.end;
        } else {
            hull.full = false;
        }
    }
    return hull;
}

/* Whether the leaf has tokens that some entry's mask is about. */
static bool
is_masked(const cpu_attend_t *x, const attn_work_t *work, const attn_leaf_t *at)
{
    for (uint32_t m = 0; x->plan->masked && m < work->n_members; m++) {
        const attn_problem_entry_t *entry =
            &x->plan->problem.entries[x->plan->members[work->member_first + m].entry];
        if (entry->mask != NULL &&
            at->position + at->tokens > (int64_t)entry->kv_length - entry->mask_tokens) {
            return true;
        }
    }
    return false;
}

/*
 * What a row sees of a leaf with tokens that its query's mask is about: the committed ones by
 * their position; of the others those named, each at the position that it has on the path.
 */
static void
place_by_mask(const attn_problem_t *problem, const attn_problem_entry_t *entry, const uint8_t *mask,
              int64_t position, const attn_leaf_t *at, int32_t *place)
{
    int64_t base  = (int64_t)entry->kv_length - entry->mask_tokens;
    int64_t first = problem->window > 0
                        ? position - (int64_t)attn_min(problem->window, INT32_MAX) + 1
                        : INT64_MIN;
    int64_t next  = base; /* position of the next token that is named */

    for (int64_t t = base; t < at->position; t++) {
        next += attn_mask_bit(mask, (uint32_t)(t - base));
    }
    for (uint32_t slot = 0; slot < at->tokens; slot++) {
        int64_t t   = at->position + slot;
        bool named  = t < base || attn_mask_bit(mask, (uint32_t)(t - base));
        int64_t key = t < base ? t : next;
        next += t >= base && named;
        place[slot] = named && key >= first ? (int32_t)(key - position) : CPU_HIDDEN;
    }
}

/* As place_by_mask(), of a row without a mask: its range is known. */
static void
place_by_range(const cpu_scratch_t *scratch, uint32_t row, uint32_t tokens, int32_t *place)
{
    for (int32_t slot = 0; slot < (int32_t)tokens; slot++) {
        bool sees   = slot >= scratch->lo[row] && slot < scratch->hi[row];
        place[slot] = sees ? slot + scratch->distance[row] : CPU_HIDDEN;
    }
}

/* Narrow a row to what its places show, and the hull to its rows. */
static void
narrow_row(const cpu_scratch_t *scratch, uint32_t row, uint32_t tokens, hull_t *hull)
{
    const int32_t *place = scratch->place + (size_t)row * CPU_LEAF;
    int32_t lo = 0, hi = (int32_t)tokens;

    while (lo < hi && place[lo] == CPU_HIDDEN) {
        lo++;
    }
    while (lo < hi && place[hi - 1] == CPU_HIDDEN) {
        hi--;
    }
    scratch->lo[row] = lo;
    scratch->hi[row] = hi;
    if (lo < hi) {
        hull->first = lo < hull->first ? lo : hull->first;
        hull->end   = hi > hull->end ? hi : hull->end;
    }
}

/* After mask_rows(): the places of all rows in a leaf that is_masked(). */
static hull_t
place_rows(const cpu_attend_t *x, const cpu_scratch_t *scratch, const attn_work_t *work,
           const attn_leaf_t *at)
{
    const attn_problem_t *problem = &x->plan->problem;
    hull_t hull                   = {.first = (int32_t)at->tokens, .end = 0, .full = false};
    uint32_t row                  = 0;

    for (uint32_t m = 0; m < work->n_members; m++) {
        const attn_problem_entry_t *entry =
            &problem->entries[x->plan->members[work->member_first + m].entry];
        uint32_t n_q = work->n_members == 1 ? work->n_q : entry->n_q;
        for (uint32_t i = 0; i < n_q * work->n_heads; i++, row++) {
            uint64_t query = work->q_first + i / work->n_heads;
            int32_t *place = scratch->place + (size_t)row * CPU_LEAF;
            if (entry->mask != NULL) {
                place_by_mask(problem, entry,
                              entry->mask + query * attn_mask_row_bytes(entry->mask_tokens),
                              scratch->position[row], at, place);
            } else {
                place_by_range(scratch, row, at->tokens, place);
            }
            for (uint32_t slot = at->tokens; slot < CPU_LEAF; slot++) {
                place[slot] = CPU_HIDDEN;
            }
            narrow_row(scratch, row, at->tokens, &hull);
        }
    }
    return hull;
}

/* The pages listed for a head: a cursor over them for the pages of one leaf. */
typedef struct listed {
    const uint32_t *at, *end;
} listed_t;

static listed_t
list_from(const attn_problem_entry_t *entry, uint32_t kv_head, uint64_t page)
{
    uint32_t list        = entry->n_lists == 1 ? 0 : kv_head;
    const uint32_t *low  = entry->sparse_pages + entry->sparse_indptr[list];
    const uint32_t *end  = entry->sparse_pages + entry->sparse_indptr[list + 1];
    const uint32_t *high = end;

    while (low < high) {
        const uint32_t *middle = low + (high - low) / 2;
        if (*middle < page) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return (listed_t){.at = low, .end = end};
}

static bool
is_listed(listed_t *list, uint64_t page)
{
    while (list->at < list->end && *list->at < page) {
        list->at++;
    }
    return list->at < list->end && *list->at == page;
}

/* Where the slot's token lies, for one head. */
static const uint8_t *
row_of(const void *store, uint64_t page_stride, uint64_t d, const attn_kv_t *kv,
       const attn_leaf_t *at, uint32_t kv_head, uint32_t slot)
{
    uint64_t page  = at->run->pages[(at->first + slot) / kv->page_size];
    uint64_t token = (at->first + slot) % kv->page_size;
    uint64_t place = (uint64_t)kv_head * kv->page_size + token;
    return (const uint8_t *)store + (page * page_stride + place * d) * attn_dtype_size(kv->dtype);
}

/* The slots [from, to), which lie in one page, are to be read. */
static void
take_tokens(const cpu_attend_t *x, const cpu_tokens_t *tokens, const attn_leaf_t *at,
            uint32_t kv_head, uint32_t from, uint32_t to)
{
    const attn_kv_t *kv = x->kv;
    uint64_t k_size     = kv->head_dim_k * attn_dtype_size(kv->dtype);
    uint64_t v_size     = kv->head_dim_v * attn_dtype_size(kv->dtype);
    const uint8_t *k    = row_of(kv->k, kv->k_page_stride, kv->head_dim_k, kv, at, kv_head, from);
    const uint8_t *v    = row_of(kv->v, kv->v_page_stride, kv->head_dim_v, kv, at, kv_head, from);

    for (uint32_t slot = from; slot < to; slot++, k += k_size, v += v_size) {
        tokens->k[slot] = k;
        tokens->v[slot] = v;
    }
}

/* Slots that are absent, but share a vector with others, read as zeros. */
static void
take_zeros(const cpu_tokens_t *tokens, uint32_t from, uint32_t to)
{
    static const _Alignas(64) float zeros[CPU_DIM_MAX];

    for (uint32_t slot = from; slot < to; slot++) {
        tokens->k[slot] = zeros;
        tokens->v[slot] = zeros;
    }
}

/* Does the head see a page of the leaf at all? Of a long sequence short lists show few leaves, and
 * the others cost no more than this search. */
static bool
leaf_is_listed(const cpu_attend_t *x, const attn_problem_entry_t *entry, uint32_t kv_head,
               const attn_leaf_t *at)
{
    uint64_t size = x->kv->page_size, last = at->first + at->tokens - 1;
    uint64_t base = at->run->chunk * attn_div_up(x->kv->chunk_size, size);

    if (entry->n_lists == 0 || (uint64_t)at->position + at->tokens > entry->dense_from) {
        return true;
    }
    listed_t list = list_from(entry, kv_head, base + at->first / size);
    return list.at < list.end && *list.at <= base + last / size;
}

void
cpu_tokens_of(const cpu_attend_t *x, const cpu_scratch_t *scratch, const attn_work_t *work,
              uint32_t kv_head, const attn_leaf_t *at, cpu_leaf_t *leaf)
{
    uint32_t e                        = x->plan->members[work->member_first].entry;
    const attn_problem_entry_t *entry = &x->plan->problem.entries[e];
    if (!leaf_is_listed(x, entry, kv_head, at)) {
        leaf->first = leaf->end = 0;
        return;
    }
    uint32_t page_size = x->kv->page_size;
    hull_t hull        = mask_rows(x, scratch, work, at);
    bool masked        = is_masked(x, work, at);
    bool sparse        = entry->n_lists > 0;
    uint64_t pages     = attn_div_up(x->kv->chunk_size, page_size); /* of a chunk */
    uint64_t page_base = at->run->chunk * pages;
    if (masked) {
        hull = place_rows(x, scratch, work, at);
    }
    uint32_t first = (uint32_t)hull.first, end = (uint32_t)hull.end;
    uint32_t read_first = CPU_LEAF, read_end = 0;
    listed_t list = {0};

    if (sparse) {
        list = list_from(entry, kv_head, page_base + (at->first + first) / page_size);
        memset(scratch->present, 0, CPU_LEAF * sizeof(*scratch->present));
    }
    for (uint32_t from = first; from < end;) {
        uint32_t page = (at->first + from) / page_size;
        uint32_t to   = (uint32_t)attn_min((uint64_t)(page + 1) * page_size - at->first, end);
        uint32_t take = from;
        if (sparse && !is_listed(&list, page_base + page)) {
            /* Of a page that is not listed, only what lies at dense_from or beyond. */
            uint64_t position = (uint64_t)at->position;
            take              = entry->dense_from <= position + from
                                    ? from
                                    : (uint32_t)attn_min(entry->dense_from - position, to);
        }
        take_zeros(&scratch->tokens, from, take);
        if (take < to) {
            take_tokens(x, &scratch->tokens, at, kv_head, take, to);
            read_first = take < read_first ? take : read_first;
            read_end   = to;
        }
        if (sparse && take < to) {
            memset(scratch->present + take, 0xff, (to - take) * sizeof(*scratch->present));
        }
        from = to;
    }
    if (read_first < read_end) {
        take_zeros(&scratch->tokens, read_first / 32 * 32, read_first);
        take_zeros(&scratch->tokens, read_end, (read_end + 31) / 32 * 32);
    }
    leaf->place   = masked ? scratch->place : NULL;
    leaf->k       = scratch->tokens.k;
    leaf->v       = scratch->tokens.v;
    leaf->present = sparse ? scratch->present : NULL;
    leaf->full    = hull.full && read_first == first && read_end == end;
    leaf->first   = read_first;
    leaf->end     = read_end;
}

cpu_ahead_t
cpu_tokens_ahead(const cpu_attend_t *x, const cpu_scratch_t *scratch, uint32_t kv_head,
                 const attn_leaf_t *at)
{
    const attn_kv_t *kv = x->kv;
    uint32_t size       = kv->page_size;
    uint32_t step       = size % CPU_AHEAD_TOKENS == 0 ? CPU_AHEAD_TOKENS : size;
    uint32_t element    = (uint32_t)attn_dtype_size(kv->dtype);
    uint64_t k_head = (uint64_t)kv_head * size, v_head = k_head * kv->head_dim_v * element;
    cpu_ahead_t ahead = {.k       = scratch->tokens.k_ahead,
                         .v       = scratch->tokens.v_ahead,
                         .k_bytes = step * kv->head_dim_k * element,
                         .v_bytes = step * kv->head_dim_v * element};

    k_head *= kv->head_dim_k * element;
    for (uint32_t from = at->first / step * step; from < at->first + at->tokens; from += step) {
        uint64_t page    = at->run->pages[from / size];
        uint64_t inside  = from % size / step;
        ahead.k[ahead.n] = (const char *)kv->k + page * kv->k_page_stride * element + k_head +
                           inside * ahead.k_bytes;
        ahead.v[ahead.n] = (const char *)kv->v + page * kv->v_page_stride * element + v_head +
                           inside * ahead.v_bytes;
        ahead.n++;
    }
    return ahead;
}
