/* See router.h. The order of summation is ours, and the same for every number of rows, on every processor. This file must be compiled
   without contraction of products and sums. */

#include "router.h"

#include "../bfloat16.h"

enum { ONE_THREAD = 1 << 16, VECTORS = 4, LANES = 16 };

typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

/* Column c is added to sum c % 64; halves of the sums are added to each other. */
static float dot(const float *x, const float *w, int64_t width) {
    lanes sum[VECTORS] = {{0}};
    int64_t c = 0;
    for (; c + VECTORS * LANES <= width; c += VECTORS * LANES)
        for (int v = 0; v < VECTORS; v++) sum[v] += *(const lanes *)(x + c + v * LANES) * *(const lanes *)(w + c + v * LANES);
    float column[VECTORS * LANES];
    memcpy(column, sum, sizeof column);
    for (int64_t i = 0; c + i < width; i++) column[i] += x[c + i] * w[c + i];
    for (int half = VECTORS * LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) column[i] += column[i + half];
    return column[0];
}

static void widen(const uint16_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) to[i] = load_bf16(from[i]);
}

/* y = x w^T in float32, [rows, experts]. The caller sees to it that a row fits on the stack. */
void expertier_multiply_wide(const float *x, int64_t rows, const uint16_t *w, int64_t experts, int64_t width, float *y) {
#pragma omp parallel for schedule(static) if (rows * experts * width > ONE_THREAD)
    for (int64_t e = 0; e < experts; e++) {
        float wide[width];
        widen(w + e * width, width, wide);
        for (int64_t row = 0; row < rows; row++) y[row * experts + e] = dot(x + row * width, wide, width);
    }
}

/* What a router says of the row x. Whether experts were chosen by that: their numbers and weights are then in `expert` and `weight`,
   which are NULL if there is no choice. */
int expertier_route(const struct router *router, const uint16_t *x, void *logits, int64_t *expert, void *weight) {
    if (router->wide) {
        float wide[router->width];
        widen(x, router->width, wide);
        expertier_multiply_wide(wide, 1, router->wide, router->choice.experts, router->width, logits);
    } else {
        multiply_siblings(&router->product, x, (uint16_t *const[]){logits});
    }
    return expert && expertier_choose(&router->choice, logits, expert, weight);
}
