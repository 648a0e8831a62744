/* Limits, defaults, the copy of the layer table, and what counts as the same geometry. */
#include "balancer/geometry.h"
#include "balancer/test_directory.h"

#include <math.h>

static attn_geometry_t
good(void)
{
    return small_geometry(ATTN_PLACE_AUTO);
}

static void
assert_good(attn_geometry_t geometry)
{
    if (directory_geometry_check(&geometry)) {
        fail_msg("refused: %s", attn_last_error());
    }
}

static void
assert_bad(attn_geometry_t geometry, const char *words)
{
    assert_int_equal(directory_geometry_check(&geometry), ATTN_ERR_INVALID);
    assert_sentence(words);
}

#define WITH(...) with(&(attn_geometry_t){__VA_ARGS__})

/* good(), with every field of `changed` that is not 0 taken over. */
static attn_geometry_t
with(const attn_geometry_t *changed)
{
    attn_geometry_t geometry = good();
    const char *from         = (const char *)changed;
    char *to                 = (char *)&geometry;
    const uint32_t zero      = 0;

    for (size_t at = offsetof(attn_geometry_t, layers); at <= offsetof(attn_geometry_t, placement);
         at += 4) {
        if (memcmp(from + at, &zero, 4) != 0) {
            memcpy(to + at, from + at, 4);
        }
    }
    geometry.layer_table = changed->layer_table;
    return geometry;
}

static void
test_every_field_has_its_limits(void **state)
{
    attn_geometry_t zero;
    (void)state;
    assert_good(good());
    assert_good(WITH(.layers = 1));
    assert_good(WITH(.layers = 1024));
    assert_bad(WITH(.layers = 1025), "geometry.layers is 1025: the limits are 1 to 1024");
    assert_good(WITH(.q_heads = 1024));
    assert_bad(WITH(.q_heads = 1026), "geometry.q_heads is 1026");
    assert_bad(WITH(.q_heads = 3), "geometry.q_heads is 3: it must be a multiple of kv_heads, 2");
    assert_bad(WITH(.kv_heads = 8), "geometry.q_heads is 4: it must be a multiple of kv_heads, 8");
    assert_bad(WITH(.kv_heads = 1025), "geometry.kv_heads is 1025");
    assert_good(WITH(.head_dim_k = 32, .head_dim_v = 256));
    assert_bad(WITH(.head_dim_k = 24), "geometry.head_dim_k is 24: the limits are 32 to 256");
    assert_bad(WITH(.head_dim_v = 264), "geometry.head_dim_v is 264");
    assert_bad(WITH(.head_dim_v = 36), "geometry.head_dim_v is 36: it must be a multiple of 8");
    assert_bad(WITH(.kv_dtype = (attn_dtype_t)4), "geometry.kv_dtype is 4");
    assert_good(WITH(.page_size = 256));
    assert_good(WITH(.page_size = 1));
    assert_bad(WITH(.page_size = 257), "geometry.page_size is 257");
    assert_good(WITH(.chunk_size = 1u << 20));
    assert_bad(WITH(.chunk_size = 1u << 21), "geometry.chunk_size is 2097152");
    assert_bad(WITH(.chunk_size = 128), "geometry.chunk_size is 128");
    assert_bad(WITH(.chunk_size = 768), "geometry.chunk_size is 768: it must be a power of two");
    assert_bad(WITH(.placement = (attn_placement_t)3), "geometry.placement is 3");
    for (size_t at = offsetof(attn_geometry_t, layers); at <= offsetof(attn_geometry_t, kv_dtype);
         at += 4) {
        zero = good();
        memset((char *)&zero + at, 0, 4);
        assert_bad(zero, " is 0: the limits are"); /* here 0 is no default */
    }
    /* The largest of everything still has a size. */
    assert_good(WITH(.layers = 1024, .q_heads = 1024, .kv_heads = 1024, .head_dim_k = 256,
                     .head_dim_v = 256, .kv_dtype = ATTN_F32, .page_size = 256,
                     .chunk_size = 1u << 20));
}

static void
test_size_of_other_headers(void **state)
{
    attn_geometry_t geometry = good(), copy;
    void *table;
    (void)state;
    geometry.size = 0;
    assert_bad(geometry, "attn_geometry_init()");
    geometry.size = offsetof(attn_geometry_t, region_bytes) - 1;
    assert_bad(geometry, "geometry.size is ");
    geometry.size = 1u << 20;
    assert_bad(geometry, "geometry.size is 1048576");
    geometry.size = sizeof(geometry) + 64; /* a later header: what we do not know is left alone */
    assert_good(geometry);

    /* An older header ends before region_bytes: whatever is there is not read. */
    geometry.size         = offsetof(attn_geometry_t, region_bytes);
    geometry.region_bytes = 12345;
    assert_int_equal(geometry_copy(&geometry, &copy, &table), ATTN_OK);
    assert_int_equal(copy.region_bytes, 0);
    assert_int_equal(copy.size, sizeof(copy));
    free(table);
}

static void
test_defaults_are_filled_in(void **state)
{
    attn_geometry_t geometry = good(), copy;
    void *table;
    (void)state;
    geometry.page_size = geometry.chunk_size = 0;
    assert_int_equal(directory_geometry_check(&geometry), ATTN_OK);
    assert_int_equal(geometry.page_size, 16);
    assert_int_equal(geometry.chunk_size, 2048);
    assert_int_equal(geometry_copy(&geometry, &copy, &table), ATTN_OK);
    for (uint32_t i = 0; i < 2; i++) {
        assert_true(copy.layer_table[i].scale == 0.125f);
        assert_true(copy.layer_table[i].causal);
        assert_true(copy.layer_table[i].softcap == 0 && copy.layer_table[i].window == 0);
        assert_null(copy.layer_table[i].slopes);
        assert_null(copy.layer_table[i].sinks);
    }
    free(table);
}

static void
test_layers_are_checked(void **state)
{
    float slopes[4] = {1, 2, 3, 4}, sinks[4] = {-1, 0, 1, -INFINITY};
    attn_layer_t rows[2] = {{.causal = true}, {.scale = 0.5f, .slopes = slopes}};
    (void)state;
    assert_good(WITH(.layer_table = rows));
    rows[1].scale = -0.5f;
    assert_bad(WITH(.layer_table = rows), "geometry.layer_table[1].scale is -0.5");
    rows[1].scale = NAN;
    assert_bad(WITH(.layer_table = rows), "geometry.layer_table[1].scale is");
    rows[1].scale   = 0;
    rows[1].softcap = INFINITY;
    assert_bad(WITH(.layer_table = rows), "geometry.layer_table[1].softcap is inf");
    rows[1].softcap = -1;
    assert_bad(WITH(.layer_table = rows), "geometry.layer_table[1].softcap is -1");
    rows[1].softcap = 30;
    slopes[2]       = NAN;
    assert_bad(WITH(.layer_table = rows), "geometry.layer_table[1].slopes[2] is");
    slopes[2]     = 0;
    rows[0].sinks = sinks;
    assert_bad(WITH(.layer_table = rows), "geometry.layer_table[0].sinks[3] is -inf");
}

static void
test_the_copy_stands_alone(void **state)
{
    float slopes[4] = {1, 2, 3, 4}, sinks[4] = {5, 6, 7, 8};
    attn_layer_t rows[2]     = {{.slopes = slopes, .sinks = sinks, .window = 9, .softcap = -0.0f},
                                {.sinks = sinks, .causal = true}};
    attn_geometry_t geometry = WITH(.layer_table = rows), copy;
    void *table;
    (void)state;
    assert_int_equal(geometry_copy(&geometry, &copy, &table), ATTN_OK);
    memset(slopes, 0, sizeof(slopes));
    memset(sinks, 0, sizeof(sinks));
    memset(rows, 0, sizeof(rows));
    const attn_layer_t *row = copy.layer_table;
    assert_true(row[0].slopes[0] == 1 && row[0].slopes[3] == 4);
    assert_true(row[0].sinks[0] == 5 && row[0].sinks[3] == 8);
    assert_int_equal(row[0].window, 9);
    assert_false(row[0].causal);
    assert_false(signbit(row[0].softcap));
    assert_null(row[1].slopes);
    assert_true(row[1].sinks[0] == 5 && row[1].sinks[3] == 8);
    assert_true(row[1].causal);
    free(table);
}

static void
assert_differs(const attn_geometry_t *there, attn_geometry_t asked, const char *words)
{
    attn_geometry_t copy;
    void *table;

    assert_int_equal(geometry_copy(&asked, &copy, &table), ATTN_OK);
    assert_int_equal(geometry_compare(there, &copy), words ? ATTN_ERR_EXISTS : ATTN_OK);
    if (words) {
        assert_sentence(words);
    }
    free(table);
}

static void
test_the_first_difference_is_named(void **state)
{
    float slopes[8] = {1, 2, 3, 4}, others[8] = {1, 2, 3.5f, 4}; /* one has 8 heads */
    attn_layer_t rows[2]  = {{.causal = true}, {.causal = true, .slopes = slopes, .window = 5}};
    attn_layer_t same[2]  = {{.causal = true, .scale = 0.125f},
                             {.causal = true, .slopes = slopes, .window = 5}};
    attn_geometry_t first = WITH(.layer_table = rows), asked = WITH(.layer_table = same), there;
    void *table;
    (void)state;
    first.region_bytes = 1000;
    assert_int_equal(geometry_copy(&first, &there, &table), ATTN_OK);
    assert_differs(&there, asked, NULL); /* the default scale spelt out, region_bytes 0 */
    assert_differs(&there, WITH(.q_heads = 8, .page_size = 32, .layer_table = rows),
                   "q_heads is 4 there, 8 here");
    assert_differs(&there, WITH(.page_size = 32, .layer_table = rows),
                   "page_size is 16 there, 32 here");
    assert_differs(&there, WITH(.placement = ATTN_PLACE_WHOLE, .layer_table = rows),
                   "placement is 0 there, 2 here");
    same[1].window = 6;
    assert_differs(&there, asked, "layer_table[1].window is 5 there, 6 here");
    same[1].causal = false;
    same[1].window = 5;
    assert_differs(&there, asked, "layer_table[1].causal is 1 there, 0 here");
    same[1].causal = true;
    same[1].slopes = others;
    assert_differs(&there, asked, "layer_table[1].slopes[2] is 3 there, 3.5 here");
    same[1].slopes = NULL;
    assert_differs(&there, asked, "layer_table[1].slopes is given there, absent here");
    same[1].slopes = slopes;
    same[1].sinks  = slopes;
    assert_differs(&there, asked, "layer_table[1].sinks is absent there, given here");
    same[1].sinks = NULL;
    same[0].scale = nextafterf(0.125f, 1);
    assert_differs(&there, asked, "layer_table[0].scale is 0.125 there, 0.125000015 here");
    same[0].scale   = 0;
    same[0].softcap = 2;
    assert_differs(&there, asked, "layer_table[0].softcap is 0 there, 2 here");
    same[0].softcap    = 0;
    asked.region_bytes = 1000;
    assert_differs(&there, asked, NULL);
    asked.region_bytes = 1001;
    assert_differs(&there, asked, "region_bytes is 1000 there, 1001 here");
    free(table);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_field_has_its_limits),
        cmocka_unit_test(test_size_of_other_headers),
        cmocka_unit_test(test_defaults_are_filled_in),
        cmocka_unit_test(test_layers_are_checked),
        cmocka_unit_test(test_the_copy_stands_alone),
        cmocka_unit_test(test_the_first_difference_is_named),
    };
    return cmocka_run_group_tests_name("balancer.geometry", tests, NULL, NULL);
}
