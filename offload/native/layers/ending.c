/* See ending.h. Sigmoids are those of aten/src/ATen/native/cpu/UnaryOpsKernel.cpp of PyTorch for a single number. */

#include "ending.h"

#include "../bfloat16.h"

#include <math.h>
#include <stdlib.h>

/* The sigmoid of a token's product with one row. */
static float gate_of(const struct ending *of, const uint16_t *x) {
    uint16_t logit;
    if (of->gate_logit)
        logit = *of->gate_logit;
    else
        multiply_siblings(&of->gate, x, (uint16_t *const[]){&logit});
    return load_bf16(round_bf16(1.0f / (1.0f + expf(-load_bf16(logit)))));
}

/* y += what the shared expert makes of x. */
static void add_shared(const struct ending *of, const uint16_t *x, int64_t width, uint16_t *y) {
    int64_t hidden_width = of->shared.down.columns;
    uint16_t *hidden = malloc((size_t)(hidden_width + width) * sizeof *hidden), *made = hidden + hidden_width;
    expertier_experts(of->order, of->up_block, of->down_block, &of->shared, &of->gating, 1, x, (const int64_t[]){0},
                      (const int64_t[]){0, 1}, hidden, (uint16_t *const[]){made});
    if (of->gate.num || of->gate_logit) {
        float by = gate_of(of, x);
        for (int64_t i = 0; i < width; i++) made[i] = round_bf16(load_bf16(made[i]) * by);
    }
    for (int64_t i = 0; i < width; i++) y[i] = round_bf16(load_bf16(y[i]) + load_bf16(made[i]));
    free(hidden);
}

/* From the sum of routed experts, what their block makes of the row x, in its place; then added to `residual` if there is one. The sum
   stays as it is if `of` is NULL. */
void expertier_end_block(const struct ending *of, const uint16_t *x, int64_t width, const uint16_t *residual, uint16_t *y) {
    if (of && of->scale != 1)
        for (int64_t i = 0; i < width; i++) y[i] = round_bf16(load_bf16(y[i]) * of->scale);
    if (of && of->has_shared) add_shared(of, x, width, y);
    if (!residual) return;
    for (int64_t i = 0; i < width; i++) y[i] = round_bf16(load_bf16(residual[i]) + load_bf16(y[i]));
}
