/* The embedded kernels: loaded when a shape is first asked for, found by type and head dims. */
#include "kernels/cuda/cuda_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The shapes that the build compiles (CMakeLists.txt): attend_TYPE_DK_DV, prefill_TYPE_DK_DV. */
static const struct {
    attn_dtype_t dtype;
    uint32_t d_k, d_v;
} shapes[] = {
    {ATTN_BF16, 64, 64}, {ATTN_BF16, 128, 128}, {ATTN_BF16, 192, 128}, {ATTN_BF16, 256, 256},
    {ATTN_F16, 64, 64},  {ATTN_F16, 128, 128},  {ATTN_F16, 192, 128},  {ATTN_F16, 256, 256},
};

#define SHAPES_N (sizeof(shapes) / sizeof(shapes[0]))

static attn_status_t
load(const char *name, CUmodule *module_p)
{
    for (const cuda_blob_t *blob = cuda_blobs; blob->name != NULL; blob++) {
        if (strcmp(blob->name, name) == 0) {
            attn_status_t status = CUDA_CALL(cuModuleLoadData(module_p, blob->bytes));
            return status == ATTN_OK ? status : attn_fail_in(status, "kernels %s: ", name);
        }
    }
    return attn_fail(ATTN_ERR_INTERNAL, "kernels %s are not in this build", name);
}

attn_status_t
cuda_modules_load(cuda_backend_t *backend)
{
    const struct {
        CUmodule *module;
        CUfunction *function;
        const char *name;
    } wanted[] = {
        {&backend->store_module, &backend->move_rows, "move_rows"},
        {&backend->store_module, &backend->move_places, "move_places"},
        {&backend->store_module, &backend->split_queries, "split_queries"},
        {&backend->store_module, &backend->bring_rows, "bring_rows"},
        {&backend->drive_module, &backend->ask_layer, "ask_layer"},
        {&backend->drive_module, &backend->take_layer, "take_layer"},
        {&backend->drive_module, &backend->answer_layer, "answer_layer"},
        {&backend->merge_module, &backend->merge[0], "merge_64"},
        {&backend->merge_module, &backend->merge[1], "merge_128"},
        {&backend->merge_module, &backend->merge[2], "merge_256"},
        {&backend->merge_module, &backend->merge_rows, "merge_rows"},
        {&backend->exchange_module, &backend->exchange[0], "exchange_64"},
        {&backend->exchange_module, &backend->exchange[1], "exchange_128"},
        {&backend->exchange_module, &backend->exchange[2], "exchange_256"},
    };
    attn_status_t status = load("store", &backend->store_module);

    if (status == ATTN_OK) {
        status = load("merge", &backend->merge_module);
    }
    if (status == ATTN_OK) { /* now, for to load it later may wait for one that waits */
        status = load("exchange", &backend->exchange_module);
    }
    if (status == ATTN_OK) {
        status = load("drive", &backend->drive_module);
    }
    for (size_t i = 0; status == ATTN_OK && i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        status =
            CUDA_CALL(cuModuleGetFunction(wanted[i].function, *wanted[i].module, wanted[i].name));
    }
    for (int i = 0; status == ATTN_OK && i < 6; i++) {
        status = CUDA_CALL(cuFuncSetAttribute(i < 3 ? backend->merge[i] : backend->exchange[i - 3],
                                              CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                              backend->shared_bytes));
    }
    return status;
}

void
cuda_modules_unload(cuda_backend_t *backend)
{
    for (size_t i = 0; backend->shapes != NULL && i < SHAPES_N; i++) {
        if (backend->shapes[i].module != NULL) {
            backend->cu->cuModuleUnload(backend->shapes[i].module);
        }
        if (backend->shapes[i].wide != NULL) {
            backend->cu->cuModuleUnload(backend->shapes[i].wide);
        }
    }
    free(backend->shapes);
    if (backend->store_module != NULL) {
        backend->cu->cuModuleUnload(backend->store_module);
    }
    if (backend->merge_module != NULL) {
        backend->cu->cuModuleUnload(backend->merge_module);
    }
    if (backend->exchange_module != NULL) {
        backend->cu->cuModuleUnload(backend->exchange_module);
    }
    if (backend->drive_module != NULL) {
        backend->cu->cuModuleUnload(backend->drive_module);
    }
}

bool
cuda_shape_exists(attn_dtype_t dtype, uint32_t d_k, uint32_t d_v)
{
    for (size_t i = 0; i < SHAPES_N; i++) {
        if (shapes[i].dtype == dtype && shapes[i].d_k == d_k && shapes[i].d_v == d_v) {
            return true;
        }
    }
    return false;
}

/* The kernels for many rows, of a module of their own. */
static attn_status_t
load_prefill(const cuda_backend_t *backend, cuda_shape_t *shape, const char *type)
{
    static const char *const names[3] = {"prefill_plain", "prefill_general", "prefill_parts"};
    char name[64];

    snprintf(name, sizeof(name), "prefill_%s_%u_%u", type, shape->d_k, shape->d_v);
    attn_status_t status = load(name, &shape->wide);
    for (int i = 0; i < 3 && status == ATTN_OK; i++) {
        status = CUDA_CALL(cuModuleGetFunction(&shape->prefill[i], shape->wide, names[i]));
        if (status == ATTN_OK) {
            status = CUDA_CALL(cuFuncSetAttribute(shape->prefill[i],
                                                  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                  (int)CUDA_MANY_SHARED(shape->d_k, shape->d_v)));
        }
    }
    if (status != ATTN_OK && shape->wide != NULL) {
        backend->cu->cuModuleUnload(shape->wide);
        shape->wide = NULL;
    }
    return status;
}

static attn_status_t
load_shape(cuda_backend_t *backend, cuda_shape_t *shape)
{
    static const char *const kinds[3]        = {"", "_listed", "_general"};
    static const uint32_t rows[CUDA_CLASSES] = {8, 16, 32, 64};
    char name[64];
    CUmodule module;

    snprintf(name, sizeof(name), "attend_%s_%u_%u", shape->dtype == ATTN_BF16 ? "bf16" : "f16",
             shape->d_k, shape->d_v);
    attn_status_t status = load(name, &module);
    if (status != ATTN_OK) {
        return status;
    }
    for (int c = 0; c < CUDA_CLASSES; c++) {
        for (int g = 0; g < 3 && status == ATTN_OK; g++) {
            snprintf(name, sizeof(name), "attend_%u%s", rows[c], kinds[g]);
            status = CUDA_CALL(cuModuleGetFunction(&shape->attend[c][g], module, name));
            if (status == ATTN_OK) {
                status = CUDA_CALL(cuFuncSetAttribute(
                    shape->attend[c][g], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    backend->shared_bytes));
            }
        }
    }
    if (status == ATTN_OK && backend->wide) {
        status = load_prefill(backend, shape, shape->dtype == ATTN_BF16 ? "bf16" : "f16");
    }
    if (status != ATTN_OK) {
        backend->cu->cuModuleUnload(module);
        return status;
    }
    shape->module = module;
    return ATTN_OK;
}

attn_status_t
cuda_shape_find(cuda_backend_t *backend, attn_dtype_t dtype, uint32_t d_k, uint32_t d_v,
                cuda_shape_t **shape_p)
{
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&backend->lock);
    if (backend->shapes == NULL) {
        backend->shapes = calloc(SHAPES_N, sizeof(*backend->shapes));
        if (backend->shapes == NULL) {
            status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the table of kernels");
        }
    }
    *shape_p = NULL;
    for (size_t i = 0; status == ATTN_OK && i < SHAPES_N; i++) {
        if (shapes[i].dtype != dtype || shapes[i].d_k != d_k || shapes[i].d_v != d_v) {
            continue;
        }
        cuda_shape_t *shape = &backend->shapes[i];
        if (shape->module == NULL) {
            shape->dtype = dtype;
            shape->d_k   = d_k;
            shape->d_v   = d_v;
            status       = load_shape(backend, shape);
        }
        *shape_p = shape;
    }
    pthread_mutex_unlock(&backend->lock);
    if (status == ATTN_OK && *shape_p == NULL) {
        status = attn_fail(ATTN_ERR_UNSUPPORTED, "no kernel for head dims %u and %u", d_k, d_v);
    }
    return status;
}
