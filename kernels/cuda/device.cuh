/*
 * device.cuh: what the attention kernels share: their arguments, what they do on the device, and
 * the arithmetic of states.
 */
#ifndef ATTN_KERNELS_CUDA_DEVICE_CUH
#define ATTN_KERNELS_CUDA_DEVICE_CUH

#include "kernels/cuda/image.h"

#ifdef ATTN_EMULATED /* on the host: tests/emulator */
#include "tests/emulator/primitives.h"
#else
#include "kernels/cuda/primitives.cuh"
#endif

#include "kernels/cuda/states.cuh"

#define LOG2_E 1.44269504088896340736f
#define Y_MAX 1073741824.0f /* 2^30: a logit beyond is an error */

#endif
