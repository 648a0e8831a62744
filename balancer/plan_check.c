/* What comes from the engine is checked once, here: kernels index memory by it. */
#include "balancer/plan_int.h"

#include "base/checked.h"
#include "base/status.h"

static bool
power_of_two(uint32_t x)
{
    return x != 0 && (x & (x - 1)) == 0;
}

static attn_status_t
check_shape(const attn_problem_t *p, uint32_t parallelism, uint32_t few, uint32_t many)
{
    if (p->kv_heads == 0 || p->q_heads == 0 || p->q_heads % p->kv_heads != 0) {
        return attn_fail(ATTN_ERR_INVALID, "q_heads is %u: must be a multiple of kv_heads, %u",
                         p->q_heads, p->kv_heads);
    }
    if (p->page_size == 0 || !power_of_two(p->chunk_size) || !power_of_two(few) ||
        !power_of_two(many) || parallelism == 0) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "page_size %u, chunk_size %u, leaves of %u and %u tokens, parallelism %u: none may "
            "be 0, chunks and leaves must be powers of two",
            p->page_size, p->chunk_size, few, many, parallelism);
    }
    return ATTN_OK;
}

static attn_status_t
check_runs(const attn_problem_t *p, const attn_problem_entry_t *entry)
{
    for (uint32_t i = 0; i < entry->n_runs; i++) {
        const attn_kv_run_t *run = &entry->runs[i];
        if (i > 0 && run->chunk <= run[-1].chunk) {
            return attn_fail(ATTN_ERR_INVALID,
                             "run %u is chunk %u after chunk %u: they must ascend", i, run->chunk,
                             run[-1].chunk);
        }
        if (run->length == 0 || run->length > p->chunk_size ||
            (uint64_t)run->chunk * p->chunk_size + run->length > entry->kv_length) {
            return attn_fail(ATTN_ERR_INVALID,
                             "chunk %u has %u tokens: at least 1, at most %u, and none beyond the "
                             "sequence's length %llu",
                             run->chunk, run->length, p->chunk_size,
                             (unsigned long long)entry->kv_length);
        }
    }
    return ATTN_OK;
}

static bool
node_holds(attn_node_t node, uint32_t key)
{
    return (uint64_t)key >> node.level == node.index;
}

uint32_t
plan_node_of(const attn_problem_entry_t *entry, uint32_t chunk_key)
{
    uint32_t low = 0, high = entry->n_nodes;

    /* The last node that begins at or before the key. */
    while (high - low > 1) {
        uint32_t middle  = low + (high - low) / 2;
        attn_node_t node = entry->nodes[middle];
        if ((uint64_t)node.index << node.level <= chunk_key) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

static attn_status_t
check_nodes(const attn_problem_entry_t *entry)
{
    for (uint32_t i = 0; i < entry->n_nodes; i++) {
        const attn_node_t *node = &entry->nodes[i];
        if (node->level > 32 || (uint64_t)node->index << node->level > UINT32_MAX) {
            return attn_fail(ATTN_ERR_INVALID,
                             "node %u is (%u, %u): levels go to 32, keys to 2^32 - 1", i,
                             node->level, node->index);
        }
        if (i > 0 && (uint64_t)node->index << node->level < ((uint64_t)node[-1].index + 1)
                                                                << node[-1].level) {
            return attn_fail(ATTN_ERR_INVALID, "node %u begins inside or before the node before it",
                             i);
        }
    }
    for (uint32_t i = 0; i < entry->n_runs && entry->n_nodes > 0; i++) {
        uint32_t key = attn_tree_key(entry->runs[i].chunk);
        if (!node_holds(entry->nodes[plan_node_of(entry, key)], key)) {
            return attn_fail(ATTN_ERR_INVALID, "chunk %u is below none of the %u nodes",
                             entry->runs[i].chunk, entry->n_nodes);
        }
    }
    return ATTN_OK;
}

static attn_status_t
check_lists(const attn_problem_t *p, const attn_problem_entry_t *entry)
{
    if (entry->n_lists != 0 && entry->n_lists != 1 && entry->n_lists != p->kv_heads) {
        return attn_fail(ATTN_ERR_INVALID, "n_lists is %u: must be 0, 1 or kv_heads, %u",
                         entry->n_lists, p->kv_heads);
    }
    for (uint32_t list = 0; list < entry->n_lists; list++) {
        uint32_t first = entry->sparse_indptr[list], end = entry->sparse_indptr[list + 1];
        if (first > end) {
            return attn_fail(ATTN_ERR_INVALID, "sparse_indptr[%u] is %u, below the one before it",
                             list + 1, end);
        }
        for (uint32_t i = first + 1; i < end; i++) {
            if (entry->sparse_pages[i] <= entry->sparse_pages[i - 1]) {
                return attn_fail(ATTN_ERR_INVALID,
                                 "sparse_pages[%u] is %u: pages of a list must ascend", i,
                                 entry->sparse_pages[i]);
            }
        }
    }
    return ATTN_OK;
}

static attn_status_t
check_mask(const attn_problem_entry_t *entry)
{
    if (entry->mask == NULL) {
        return ATTN_OK;
    }
    if (entry->mask_tokens > entry->kv_length) {
        return attn_fail(ATTN_ERR_INVALID, "mask_tokens is %u: the sequence has %llu tokens",
                         entry->mask_tokens, (unsigned long long)entry->kv_length);
    }
    return attn_mask_check(entry->mask, entry->n_q, entry->mask_tokens);
}

attn_status_t
plan_check(const attn_problem_t *problem, uint32_t parallelism, uint32_t few, uint32_t many)
{
    attn_status_t status = check_shape(problem, parallelism, few, many);
    uint64_t queries     = 0;

    for (uint32_t i = 0; i < problem->n && status == ATTN_OK; i++) {
        const attn_problem_entry_t *entry = &problem->entries[i];
        queries += entry->n_q;
        if (entry->kv_length > ATTN_PLAN_LENGTH_MAX) {
            status = attn_fail(ATTN_ERR_TOO_LARGE, "kv_length is %llu: at most %llu",
                               (unsigned long long)entry->kv_length,
                               (unsigned long long)ATTN_PLAN_LENGTH_MAX);
        } else if (queries > ATTN_PLAN_QUERIES_MAX) {
            status =
                attn_fail(ATTN_ERR_TOO_LARGE, "the batch has more than %llu queries up to here",
                          (unsigned long long)ATTN_PLAN_QUERIES_MAX);
        } else if ((status = check_runs(problem, entry)) == ATTN_OK &&
                   (status = check_nodes(entry)) == ATTN_OK &&
                   (status = check_mask(entry)) == ATTN_OK) {
            status = check_lists(problem, entry);
        }
        if (status != ATTN_OK) {
            attn_fail_in(status, "entry %u: ", i);
        }
    }
    return status;
}
