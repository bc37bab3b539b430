/* The experts that a router chose for one token, from the addresses that are known of a layer's experts to their weighted sum. */

#include "ending.h"

#include "../bfloat16.h"
#include "../stored_matrix.h"

#include <stdlib.h>

/* How a layer's experts are computed, and where their addresses lie in a row of `addresses` for each of them. */
struct routed_experts {
    enum order order;
    int is_rounded; /* weights are bfloat16, and so are products with them; else float32 */
    int64_t up_block, down_block;
    struct expert_weights like; /* without addresses and biases */
    struct gating gating;
    int64_t experts, chosen;
    int64_t addresses, gate_at, linear_at, down_at;
    const uint16_t *const *up_bias, *const *down_bias; /* of all experts; NULL if there are none */
};

/* y = sum_k weight[k] made[k], added in float32 from the first to the last, and rounded. */
void expertier_combine(int is_rounded, const uint16_t *made, const void *weight, int64_t chosen, int64_t width, uint16_t *y) {
    float sum[width];
    memset(sum, 0, sizeof sum);
    for (int64_t k = 0; k < chosen; k++, made += width) {
        float by = is_rounded ? load_bf16(((const uint16_t *)weight)[k]) : ((const float *)weight)[k];
        if (is_rounded)
            for (int64_t i = 0; i < width; i++) sum[i] += load_bf16(round_bf16(load_bf16(made[i]) * by));
        else
            for (int64_t i = 0; i < width; i++) sum[i] += load_bf16(made[i]) * by;
    }
    for (int64_t i = 0; i < width; i++) y[i] = round_bf16(sum[i]);
}

/* Whether all experts are different, and are there. */
static int are_there(const struct routed_experts *of, const void *const *address, const int64_t *expert) {
    for (int64_t k = 0; k < of->chosen; k++) {
        if (expert[k] < 0 || expert[k] >= of->experts || !address[expert[k] * of->addresses]) return 0;
        for (int64_t other = 0; other < k; other++)
            if (expert[other] == expert[k]) return 0;
    }
    return 1;
}

/* y = what the chosen experts make of the row x, as in `expertier_combine`, and then `expertier_end_block` of it; 0, and nothing is
   done, if an expert is not there. `address` has a row for each expert, which begins with 0 while the expert is not there. */
int expertier_routed_experts(const struct routed_experts *of, const void *const *address, const uint16_t *x, const int64_t *expert,
                             const void *weight, const struct ending *ending, const uint16_t *residual, uint16_t *y) {
    if (!are_there(of, address, expert)) return 0;
    int64_t chosen = of->chosen, hidden_width = of->like.down.columns, width = of->like.down.count;
    const void *gate[chosen][PARTS], *linear[chosen][PARTS], *down[chosen][PARTS];
    const uint16_t *up_bias[chosen], *down_bias[chosen];
    int64_t token[chosen], start[chosen + 1];
    uint16_t *made = malloc((size_t)(chosen * (width + hidden_width)) * sizeof *made), *out[chosen];
    for (int64_t k = 0; k < chosen; k++) {
        const void *const *row = address + expert[k] * of->addresses;
        memcpy(gate[k], row + of->gate_at, sizeof gate[k]);
        memcpy(linear[k], row + of->linear_at, sizeof linear[k]);
        memcpy(down[k], row + of->down_at, sizeof down[k]);
        if (of->up_bias) up_bias[k] = of->up_bias[expert[k]];
        if (of->down_bias) down_bias[k] = of->down_bias[expert[k]];
        token[k] = 0, start[k] = k, out[k] = made + k * width;
    }
    start[chosen] = chosen;
    struct expert_weights weights = of->like;
    weights.gate.part = gate[0], weights.linear.part = linear[0], weights.down.part = down[0];
    weights.up_bias = of->up_bias ? up_bias : NULL, weights.down_bias = of->down_bias ? down_bias : NULL;
    expertier_experts(of->order, of->up_block, of->down_block, &weights, &of->gating, chosen, x, token, start,
                      made + chosen * width, out);
    expertier_combine(of->is_rounded, made, weight, chosen, width, y);
    expertier_end_block(ending, x, width, residual, y);
    free(made);
    return 1;
}
