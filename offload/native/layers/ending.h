/* What becomes of the sum of a token's routed experts. */

#pragma once

#include "siblings.h"

#include "../experts.h"

/* The sum is multiplied by `scale`; then a shared expert is added, which may have a gate of its own. Each result is rounded. */
struct ending {
    float scale;
    int has_shared;
    enum order order; /* of the shared expert's products */
    int64_t up_block, down_block;
    struct expert_weights shared;
    struct gating gating;
    struct siblings gate;       /* one row, or no matrix */
    const uint16_t *gate_logit; /* its product, if that comes from elsewhere; NULL as well if there is no gate */
};

void expertier_end_block(const struct ending *of, const uint16_t *x, int64_t width, const uint16_t *residual, uint16_t *y);
