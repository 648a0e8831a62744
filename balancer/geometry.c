/*
 * The limits of attn_geometry_t in one table, and what follows from them: with every field
 * inside its limits the bytes of a page stay below 2^40 and those of a chunk below 2^52; the
 * products are checked all the same, for the table may grow.
 */
#include "balancer/geometry.h"

#include "balancer/directory.h"
#include "base/checked.h"
#include "base/status.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SIZE_MIN_ACCEPTED offsetof(attn_geometry_t, region_bytes)
#define SIZE_MAX_ACCEPTED 4096u /* of a later header; nothing sane is larger */
#define PAGE_SIZE_DEFAULT 16u
#define CHUNK_SIZE_DEFAULT 2048u

/* The 32-bit fields in the order in which differences are looked for. */
static const struct {
    const char *name;
    size_t offset;
    uint32_t least, most;
    uint32_t multiple; /* of which the value must be one */
} fields[] = {
    {"layers", offsetof(attn_geometry_t, layers), 1, 1024, 1},
    {"q_heads", offsetof(attn_geometry_t, q_heads), 1, 1024, 1},
    {"kv_heads", offsetof(attn_geometry_t, kv_heads), 1, 1024, 1},
    {"head_dim_k", offsetof(attn_geometry_t, head_dim_k), 32, 256, 8},
    {"head_dim_v", offsetof(attn_geometry_t, head_dim_v), 32, 256, 8},
    {"kv_dtype", offsetof(attn_geometry_t, kv_dtype), ATTN_F32, ATTN_BF16, 1},
    {"page_size", offsetof(attn_geometry_t, page_size), 1, 256, 1},
    {"chunk_size", offsetof(attn_geometry_t, chunk_size), 256, 1u << 20, 1},
    {"placement", offsetof(attn_geometry_t, placement), ATTN_PLACE_AUTO, ATTN_PLACE_WHOLE, 1},
};

#define FIELDS_N (sizeof(fields) / sizeof(fields[0]))

_Static_assert(sizeof(attn_dtype_t) == 4 && sizeof(attn_placement_t) == 4, "read as 32-bit fields");

static uint32_t
field_of(const attn_geometry_t *geometry, size_t i)
{
    uint32_t value;
    memcpy(&value, (const char *)geometry + fields[i].offset, sizeof(value));
    return value;
}

static attn_status_t
check_fields(const attn_geometry_t *geometry)
{
    for (size_t i = 0; i < FIELDS_N; i++) {
        uint32_t value = field_of(geometry, i);
        if (value < fields[i].least || value > fields[i].most) {
            return attn_fail(ATTN_ERR_INVALID, "geometry.%s is %u: the limits are %u to %u",
                             fields[i].name, value, fields[i].least, fields[i].most);
        }
        if (value % fields[i].multiple != 0) {
            return attn_fail(ATTN_ERR_INVALID, "geometry.%s is %u: it must be a multiple of %u",
                             fields[i].name, value, fields[i].multiple);
        }
    }
    if (geometry->q_heads % geometry->kv_heads != 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "geometry.q_heads is %u: it must be a multiple of kv_heads, %u",
                         geometry->q_heads, geometry->kv_heads);
    }
    if ((geometry->chunk_size & (geometry->chunk_size - 1)) != 0) {
        return attn_fail(ATTN_ERR_INVALID, "geometry.chunk_size is %u: it must be a power of two",
                         geometry->chunk_size);
    }
    return ATTN_OK;
}

static attn_status_t
check_per_head(const float *values, uint32_t n, uint32_t layer, const char *name)
{
    for (uint32_t i = 0; values && i < n; i++) {
        if (!isfinite(values[i])) {
            return attn_fail(ATTN_ERR_INVALID,
                             "geometry.layer_table[%u].%s[%u] is %g: it must be finite", layer,
                             name, i, (double)values[i]);
        }
    }
    return ATTN_OK;
}

static attn_status_t
check_layer(const attn_layer_t *row, uint32_t layer, uint32_t q_heads)
{
    attn_status_t status;

    if (!isfinite(row->scale) || row->scale < 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "geometry.layer_table[%u].scale is %g: it must be finite and not below 0",
                         layer, (double)row->scale);
    }
    if (!isfinite(row->softcap) || row->softcap < 0) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "geometry.layer_table[%u].softcap is %g: it must be finite and not below 0", layer,
            (double)row->softcap);
    }
    status = check_per_head(row->slopes, q_heads, layer, "slopes");
    return status ? status : check_per_head(row->sinks, q_heads, layer, "sinks");
}

attn_status_t
directory_geometry_check(attn_geometry_t *geometry)
{
    uint64_t page_bytes, chunk_bytes;
    attn_status_t status;

    if (geometry->size < SIZE_MIN_ACCEPTED || geometry->size > SIZE_MAX_ACCEPTED) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "geometry.size is %zu: the limits are %zu to %u; start with attn_geometry_init()",
            geometry->size, SIZE_MIN_ACCEPTED, SIZE_MAX_ACCEPTED);
    }
    geometry->page_size  = geometry->page_size ? geometry->page_size : PAGE_SIZE_DEFAULT;
    geometry->chunk_size = geometry->chunk_size ? geometry->chunk_size : CHUNK_SIZE_DEFAULT;
    status               = check_fields(geometry);
    if (status) {
        return status;
    }
    if (!attn_mul4(cost_kv_token_bytes(geometry), geometry->layers, geometry->page_size, 1,
                   &page_bytes) ||
        !attn_mul(page_bytes, attn_div_up(geometry->chunk_size, geometry->page_size),
                  &chunk_bytes)) {
        return attn_fail(ATTN_ERR_INVALID,
                         "geometry: the bytes of a page or chunk of all layers exceed 2^64");
    }
    for (uint32_t i = 0; geometry->layer_table && i < geometry->layers; i++) {
        status = check_layer(&geometry->layer_table[i], i, geometry->q_heads);
        if (status) {
            return status;
        }
    }
    return ATTN_OK;
}

/* Rows first, then the floats of all rows: one block. */
static attn_status_t
copy_table(attn_geometry_t *geometry, void **table_p)
{
    const attn_layer_t *from = geometry->layer_table;
    size_t bytes             = geometry->q_heads * sizeof(float);
    size_t arrays            = 0;

    for (uint32_t i = 0; from && i < geometry->layers; i++) {
        arrays += (from[i].slopes != NULL) + (from[i].sinks != NULL);
    }
    attn_layer_t *rows = malloc(geometry->layers * sizeof(*rows) + arrays * bytes);
    if (!rows) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a layer table of %u rows",
                         geometry->layers);
    }
    float *values = (float *)(rows + geometry->layers);
    for (uint32_t i = 0; i < geometry->layers; i++) {
        attn_layer_t row         = from ? from[i] : (attn_layer_t){.causal = true};
        const float **per_head[] = {&row.slopes, &row.sinks};

        /* == 0 takes in -0, whose bits would differ from those of 0. */
        row.scale   = row.scale == 0 ? 1.0f / sqrtf((float)geometry->head_dim_k) : row.scale;
        row.softcap = row.softcap == 0 ? 0 : row.softcap;
        for (size_t j = 0; j < 2; j++) {
            if (*per_head[j]) {
                memcpy(values, *per_head[j], bytes);
                *per_head[j] = values;
                values += geometry->q_heads;
            }
        }
        rows[i] = row;
    }
    geometry->layer_table = rows;
    *table_p              = rows;
    return ATTN_OK;
}

attn_status_t
geometry_copy(const attn_geometry_t *from, attn_geometry_t *copy, void **table_p)
{
    attn_geometry_t whole = {0};
    attn_status_t status;

    /* A size that is refused is read no further than itself. */
    whole.size = from->size;
    if (from->size >= SIZE_MIN_ACCEPTED) {
        memcpy(&whole, from, attn_min(from->size, sizeof(whole)));
    }
    status = directory_geometry_check(&whole);
    if (status) {
        return status;
    }
    whole.size = sizeof(whole);
    status     = copy_table(&whole, table_p);
    if (status == ATTN_OK) {
        *copy = whole;
    }
    return status;
}

static attn_status_t
compare_per_head(const float *there, const float *asked, uint32_t n, uint32_t layer,
                 const char *name)
{
    if (!there != !asked) {
        return attn_fail(ATTN_ERR_EXISTS, "layer_table[%u].%s is %s there, %s here", layer, name,
                         there ? "given" : "absent", asked ? "given" : "absent");
    }
    for (uint32_t i = 0; there && i < n; i++) {
        if (memcmp(&there[i], &asked[i], sizeof(float)) != 0) {
            return attn_fail(ATTN_ERR_EXISTS, "layer_table[%u].%s[%u] is %.9g there, %.9g here",
                             layer, name, i, (double)there[i], (double)asked[i]);
        }
    }
    return ATTN_OK;
}

static attn_status_t
compare_layer(const attn_layer_t *there, const attn_layer_t *asked, uint32_t layer,
              uint32_t q_heads)
{
    attn_status_t status;

    if (memcmp(&there->scale, &asked->scale, sizeof(float)) != 0) {
        return attn_fail(ATTN_ERR_EXISTS, "layer_table[%u].scale is %.9g there, %.9g here", layer,
                         (double)there->scale, (double)asked->scale);
    }
    if (memcmp(&there->softcap, &asked->softcap, sizeof(float)) != 0) {
        return attn_fail(ATTN_ERR_EXISTS, "layer_table[%u].softcap is %.9g there, %.9g here", layer,
                         (double)there->softcap, (double)asked->softcap);
    }
    if (there->window != asked->window) {
        return attn_fail(ATTN_ERR_EXISTS,
                         "layer_table[%u].window is %" PRIu64 " there, %" PRIu64 " here", layer,
                         there->window, asked->window);
    }
    if (there->causal != asked->causal) {
        return attn_fail(ATTN_ERR_EXISTS, "layer_table[%u].causal is %d there, %d here", layer,
                         there->causal, asked->causal);
    }
    status = compare_per_head(there->slopes, asked->slopes, q_heads, layer, "slopes");
    return status ? status : compare_per_head(there->sinks, asked->sinks, q_heads, layer, "sinks");
}

attn_status_t
geometry_compare(const attn_geometry_t *there, const attn_geometry_t *asked)
{
    for (size_t i = 0; i < FIELDS_N; i++) {
        if (field_of(there, i) != field_of(asked, i)) {
            return attn_fail(ATTN_ERR_EXISTS, "%s is %u there, %u here", fields[i].name,
                             field_of(there, i), field_of(asked, i));
        }
    }
    for (uint32_t i = 0; i < there->layers; i++) {
        attn_status_t status =
            compare_layer(&there->layer_table[i], &asked->layer_table[i], i, there->q_heads);
        if (status) {
            return status;
        }
    }
    if (asked->region_bytes != 0 && asked->region_bytes != there->region_bytes) {
        return attn_fail(ATTN_ERR_EXISTS, "region_bytes is %" PRIu64 " there, %" PRIu64 " here",
                         there->region_bytes, asked->region_bytes);
    }
    return ATTN_OK;
}
